"""Sample calls, as the SDK makes them at registration: in a jail, with the normal limits.

Each declared parameter is the string "sample_value" and the token "sample_token".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from atp_sandbox.admission import ServedTool
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Outcome

_TOKEN = b'"sample_token"'


class SampleCalls:
    """Makes one sample call a registration; `on_done` follows the last outcome."""

    def __init__(
        self,
        tools: Sequence[ServedTool],
        submit: Callable[[NodeCall], None],
        on_done: Callable[[], None],
    ) -> None:
        self._tools = tools
        self._submit = submit
        self._on_done = on_done
        self._outcomes: dict[tuple[str, int], Outcome] = {}

    def start(self, now: float) -> None:
        """Submit all of them, with this as their context; the deadline of each runs from `now`."""
        if not self._tools:
            self._on_done()
        for served in self._tools:
            params = dict.fromkeys(served.tool.params, "sample_value")
            self._submit(
                NodeCall(
                    toolkit=served.toolkit,
                    tool=served.tool,
                    params=json.dumps(params).encode(),
                    token=_TOKEN,
                    received_at=now,
                    context=self,
                    is_sample=True,
                )
            )

    def finished(self, call: NodeCall, outcome: Outcome) -> None:
        """One of them ended."""
        self._outcomes[call.toolkit, call.tool.index] = outcome
        if len(self._outcomes) == len(self._tools):
            self._on_done()

    def outcome(self, served: ServedTool) -> Outcome | None:
        """How the sample call of `served` ended; None if there was none."""
        return self._outcomes.get((served.toolkit, served.tool.index))
