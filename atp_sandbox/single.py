"""One toolkit without a backend: discovered in its jail, perhaps called once, and gone again.

What `call`, `inspect` and `doctor` have in common with `serve` is all of the node.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from atp_sandbox.discovery import Discovery, Tool
from atp_sandbox.egress.jail_network import Denial
from atp_sandbox.errors import SandboxError
from atp_sandbox.learned import Learned
from atp_sandbox.loop import Loop
from atp_sandbox.node import Node
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Outcome
from atp_sandbox.policy import Reroute
from atp_sandbox.settings import ToolkitSettings
from atp_sandbox.toolkit import ServedToolkit

_SPARE_S = 30.0
"""Beyond the toolkit's own limits, which the node keeps: only a bug of ours takes longer."""


class SingleToolkit:
    """A node with one toolkit, discovered when the constructor returns.

    SandboxError says why it cannot be. To be used as a context manager.
    """

    def __init__(self, settings: ToolkitSettings, reroutes: Sequence[Reroute] = ()) -> None:
        self._state = tempfile.TemporaryDirectory(prefix="atp-sandbox-")
        self._loop = Loop()
        self._discovery: Discovery | None = None
        self._error: SandboxError | None = None
        self._result: tuple[Outcome, str] | None = None
        self._limits = settings.limits
        self.lifetime = settings.lifetime
        self.landlock_abi = 0
        self.layers: list[str] = []
        self.learned = Learned({settings.name: settings.egress})
        self._node = Node(self._loop, Path(self._state.name), self, reroutes)
        try:
            # One call is to come, if any: more processes ahead of need would be for nothing.
            limits = replace(settings.limits, concurrency=1)
            self._node.add(replace(settings, limits=limits))
            longest_s = settings.limits.import_time_s + _SPARE_S
            self._loop.run_until(lambda: bool(self._discovery or self._error), longest_s)
            if self._discovery is None:
                raise self._error or SandboxError("The toolkit did not report in time.")
        except BaseException:
            self.close()
            raise

    @property
    def discovery(self) -> Discovery:
        assert self._discovery is not None
        return self._discovery

    def call(self, tool: Tool, params: bytes, token: bytes | None) -> tuple[Outcome, str]:
        """The outcome of one call, and what it printed."""
        self._node.submit(NodeCall(self._name, tool, params, token, received_at=self._loop.now()))
        self._loop.run_until(lambda: self._result is not None, self._limits.time_s + _SPARE_S)
        if self._result is None:
            raise SandboxError("The call did not end in time; this is a bug in atp-sandbox.")
        return self._result

    def close(self) -> None:
        """End the jail; safe to call again."""
        self._node.close()
        self._loop.close()
        self._state.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- what the node tells -----------------------------------------------------------------------

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        self._name = toolkit.name
        self.lifetime = toolkit.lifetime
        self.landlock_abi = toolkit.landlock_abi
        self.layers = toolkit.layers
        self._discovery = discovery

    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None:
        self._error = error

    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None:
        pass  # a client that stops itself is of no account to a single call

    def connection_denied(self, toolkit: str, denial: Denial) -> None:
        self.learned.note(toolkit, denial.host, denial.port, denial.reason)

    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        go()

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None:
        self._result = (outcome, printed)
