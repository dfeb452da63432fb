"""The local node: toolkits in, one outcome for each call out.

The seam to the supervisor is small on purpose (ARCHITECTURE.md, "Beyond one machine"): submit,
drain, state; outcomes and what toolkits say of themselves come back as events.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from atp_sandbox import log
from atp_sandbox.discovery import Discovery
from atp_sandbox.egress import authority
from atp_sandbox.egress.jail_network import Denial
from atp_sandbox.egress.service import EgressError, EgressService
from atp_sandbox.errors import SandboxError
from atp_sandbox.isolation import WITHOUT, Isolation, Waivable
from atp_sandbox.jails.cgroup_mover import Mover
from atp_sandbox.jails.cgroups import CgroupSupport, CgroupTree, detect, remove_stale
from atp_sandbox.jails.farewell import Farewells
from atp_sandbox.jails.jail import SetupFailure
from atp_sandbox.jails.remedies import isolation_error
from atp_sandbox.jails.snapshot import SnapshotHold, prune, take_snapshot
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.outcome import Failure, Kind, Outcome
from atp_sandbox.policy import Reroute
from atp_sandbox.scheduling.pool import UNAVAILABLE_DRAINING, UNAVAILABLE_STOPPED
from atp_sandbox.scheduling.shares import TOTAL_QUEUE, Shares
from atp_sandbox.settings import ServeOptions, ToolkitSettings
from atp_sandbox.state import let_others_pass, prepare, remove_stale_scratch
from atp_sandbox.toolkit import NodeCall, ServedToolkit, State

USAGE_SAMPLE_S = 0.02
"""Between two looks at what running calls use; a page fault costs 4 µs, so 20 MB slip through."""
OUTPUT_S = 1.0
"""Between two looks at what toolkits print outside of calls."""
_DISCOVERIES_AT_ONCE = 4


class NodeListener(Protocol):
    """What a node tells the supervisor."""

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None: ...
    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None: ...
    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None: ...
    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        """`call` is assigned: `go` hands it to its worker, `refuse` ends it instead."""

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None: ...
    def connection_denied(self, toolkit: str, denial: Denial) -> None: ...


class Node:
    """Owns the toolkits of this machine, their snapshots and the directory jails are built on."""

    def __init__(
        self,
        loop: Loop,
        state_dir: Path,
        listener: NodeListener,
        reroutes: Sequence[Reroute] = (),
        options: ServeOptions | None = None,
    ) -> None:
        """SandboxError if the state directory cannot be used."""
        prepare(state_dir)
        self._state_dir = state_dir
        self._loop = loop
        self._listener = listener
        self._store = state_dir / "snapshots"
        self._build_dir = _make_build_dir(state_dir)
        self._cgroup_support: CgroupSupport | None = None
        """What was found; None until a toolkit is to have control groups."""
        self._cgroups: CgroupTree | None = None
        self._mover: Mover | None = None
        self._farewells = Farewells(loop)
        self._reroutes = reroutes
        self._egress: EgressService | None = None
        """Started for the first toolkit whose jails have a network of their own."""
        self._holds: list[SnapshotHold] = []
        self._toolkits: dict[str, ServedToolkit] = {}
        self._to_discover: deque[ServedToolkit] = deque()
        self._discovering: set[str] = set()
        options = options or ServeOptions()
        self._waiting = Shares(TOTAL_QUEUE, options.queue, options.queue_bytes)
        """What may wait of all toolkits together."""
        self._usage_timer: Timer | None = None
        self._output_timer: Timer | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no call waits or runs."""
        return all(toolkit.is_idle for toolkit in self._toolkits.values())

    @property
    def toolkits(self) -> Iterable[ServedToolkit]:
        return self._toolkits.values()

    @property
    def egress(self) -> EgressService | None:
        """None until a toolkit has a network of its own."""
        return self._egress

    def add(self, settings: ToolkitSettings) -> None:
        """Take a snapshot of the toolkit and find out in a jail what it registers.

        ToolkitError if its files cannot be read, IsolationError if control groups are required and
        cannot be had. One of `toolkit_discovered` and `toolkit_failed` follows.
        """
        isolation = settings.isolation
        for warning in isolation.warnings():
            log.emit(log.WARNING, "isolation_weakened", warning, toolkit=settings.name)
        if settings.egress.inject and not authority.is_available():
            raise SandboxError(
                f"Toolkit {settings.name}: its tokens cannot be put in outside the jail.",
                cause="the package cryptography is not installed",
                tip='pip install "atp-sandbox[inject]"',
            )
        if isolation.may_use_cgroups:
            self._provide_cgroups(isolation)
        if os.geteuid() == 0 and not isolation.has_namespaces:
            let_others_pass(self._state_dir)
        snapshot = take_snapshot(settings.path, settings.data, self._store)
        for line in snapshot.skipped:
            log.emit(log.WARNING, "snapshot_skipped", line, toolkit=settings.name)
        self._holds.append(SnapshotHold(snapshot))
        cgroups = self._cgroups if isolation.may_use_cgroups else None
        toolkit = ServedToolkit(
            self._loop,
            settings,
            snapshot,
            self._build_dir,
            cgroups,
            self._mover,
            self._farewells,
            self._provide_egress(settings),
            self,
            self._waiting,
        )
        self._toolkits[settings.name] = toolkit
        self._waiting.divide(len(self._toolkits))
        self._to_discover.append(toolkit)
        self._discover_next()
        if self._usage_timer is None:
            self._watch_usage()
            self._log_output()

    def forget_old_snapshots(self) -> None:
        """Remove snapshots that neither this node nor any other process serves."""
        prune(self._store, set())

    def submit(self, call: NodeCall) -> None:
        """Run `call`; `call_finished` follows exactly once."""
        toolkit = self._toolkits.get(call.toolkit)
        if toolkit is None or toolkit.state is State.FAILED:
            failure = Failure(Kind.UNAVAILABLE, f"The toolkit {call.toolkit} is not served.")
            self.call_finished(call, failure, "")
        else:
            toolkit.submit(call)

    def stop_toolkit(self, name: str) -> None:
        """Take no more calls for one toolkit; what runs goes on."""
        self._toolkits[name].refuse(UNAVAILABLE_STOPPED)

    def drain(self) -> None:
        """Take no more calls; those that wait are answered `unavailable`, those that run go on."""
        for toolkit in self._toolkits.values():
            toolkit.refuse(UNAVAILABLE_DRAINING)

    def close(self) -> None:
        """End every jail and give back what the node owned. Safe to call again."""
        for timer in (self._usage_timer, self._output_timer):
            if timer is not None:
                timer.cancel()
        for toolkit in self._toolkits.values():
            toolkit.close()
        self._farewells.close()
        if self._egress is not None:
            self._egress.close()
        for hold in self._holds:
            hold.close()
        self._holds.clear()
        if self._mover is not None:
            self._mover.close()
        if self._cgroups is not None:
            self._cgroups.close()

    # -- what toolkits tell ------------------------------------------------------------------------

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        self._discovering.discard(toolkit.name)
        self._listener.toolkit_discovered(toolkit, discovery)
        self._discover_next()

    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None:
        self._discovering.discard(toolkit.name)
        self._listener.toolkit_failed(toolkit, error)
        self._discover_next()

    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None:
        self._listener.client_stopped(toolkit, client)

    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        self._listener.call_starting(call, go, refuse)

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None:
        self._listener.call_finished(call, outcome, printed)

    # -- within ------------------------------------------------------------------------------------

    def _discover_next(self) -> None:
        while self._to_discover and len(self._discovering) < _DISCOVERIES_AT_ONCE:
            toolkit = self._to_discover.popleft()
            self._discovering.add(toolkit.name)
            toolkit.discover()

    def _provide_egress(self, settings: ToolkitSettings) -> EgressService | None:
        if not settings.isolation.has_namespaces:
            return None
        if self._egress is None:
            self._egress = EgressService(
                self._loop,
                reroutes=self._reroutes,
                on_failed=self._on_egress_failed,
                on_denied=self._listener.connection_denied,
            )
        self._egress.expect(settings.egress, settings.isolation)
        return self._egress

    def _on_egress_failed(self, error: EgressError) -> None:
        """Nothing was served yet, and nothing can be: what is refused could not be told apart."""
        for toolkit in self._toolkits.values():
            isolation = toolkit.settings.isolation
            if toolkit.state is State.DISCOVERING and isolation.has_namespaces:
                failure = SetupFailure(error.step, str(error))
                self._listener.toolkit_failed(toolkit, isolation_error(failure, isolation))

    def _provide_cgroups(self, isolation: Isolation) -> None:
        """Control groups for our jails, if they can be made; else what is missing is told."""
        if self._cgroup_support is None:
            self._cgroup_support = support = detect()
            if support.is_usable:
                for group in remove_stale(support):
                    message = "removed groups of a dead supervisor"
                    log.emit(log.INFO, "cgroup_removed", message, group=group)
                self._cgroups = CgroupTree(support)
                self._mover = Mover(self._loop.call_from_thread)
            else:
                log.emit(
                    log.WARNING,
                    "cgroup_missing",
                    f"no control group can be written: {WITHOUT[Waivable.CGROUP]}",
                    cause=support.reason,
                    tip=support.remedy,
                )
        if self._cgroups is None and isolation.requires_cgroups(is_root=os.geteuid() == 0):
            reason = self._cgroup_support.reason
            error = isolation_error(SetupFailure("cgroup", reason), isolation)
            error.tip = f"{self._cgroup_support.remedy} {error.tip}"
            raise error

    def _watch_usage(self) -> None:
        for toolkit in self._toolkits.values():
            toolkit.watch_usage()
        self._usage_timer = self._loop.call_later(USAGE_SAMPLE_S, self._watch_usage)

    def _log_output(self) -> None:
        for toolkit in self._toolkits.values():
            toolkit.log_output()
        if self._egress is not None:
            self._egress.log_output()
        self._output_timer = self._loop.call_later(OUTPUT_S, self._log_output)


def _make_build_dir(state_dir: Path) -> Path:
    """The empty directory on which jails are built, each in a mount namespace of its own.

    One serves all, and nothing ever shows in it here. A jail of a root supervisor reaches it as an
    unprivileged user, so it then lies outside the state directory, which is closed to others.
    """
    path = Path("/run/atp-sandbox/root") if os.geteuid() == 0 else state_dir / "run" / "root"
    try:
        path.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise SandboxError(
            f"cannot make the directory {path}",
            cause=str(error.strerror),
            tip="Jails are put together there; make it, empty, with mode 0755.",
        ) from error
    remove_stale_scratch(path.parent)
    return path
