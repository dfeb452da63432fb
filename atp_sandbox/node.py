"""The local node: toolkits in, one outcome for each call out.

The seam to the supervisor is small on purpose (ARCHITECTURE.md, "Beyond one machine"): submit,
drain, state; outcomes and what toolkits say of themselves come back as events.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from atp_sandbox.jails.farewell import PATIENCE_S, Farewells
from atp_sandbox.jails.jail import SetupFailure
from atp_sandbox.jails.janitor_service import Duty, JanitorService
from atp_sandbox.jails.remedies import isolation_error
from atp_sandbox.jails.snapshot import Snapshot, SnapshotHold, prune, take_snapshot
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Kind, Outcome
from atp_sandbox.policy import Reroute
from atp_sandbox.scheduling.pool import UNAVAILABLE_DRAINING, UNAVAILABLE_STOPPED
from atp_sandbox.scheduling.shares import TOTAL_QUEUE, Shares
from atp_sandbox.settings import ServeOptions, ToolkitSettings
from atp_sandbox.state import let_others_pass, prepare, remove_stale_scratch, scratch_prefix
from atp_sandbox.toolkit import ServedToolkit, State

USAGE_SAMPLE_S = 0.02
"""Between two looks at what running calls use; a page fault costs 4 µs, so 20 MB slip through."""
OUTPUT_S = 1.0
"""Between two looks at what toolkits print outside of calls."""
_DISCOVERIES_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class TakenSnapshot:
    """A snapshot that stays until its hold is closed."""

    snapshot: Snapshot
    hold: SnapshotHold


def snapshot_of(settings: ToolkitSettings, state_dir: Path) -> TakenSnapshot:
    """The toolkit as it is now; whoever has it closes its hold. SandboxError as `take_snapshot`."""
    snapshot = take_snapshot(settings.path, settings.data, state_dir / "snapshots")
    return TakenSnapshot(snapshot, SnapshotHold(snapshot))


Prepared = Callable[[ServedToolkit, "Discovery | SandboxError"], None]


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
        *,
        has_janitor: bool = False,
        options: ServeOptions | None = None,
    ) -> None:
        """SandboxError if the state directory cannot be used.

        `has_janitor`: a process of its own clears up at once, should this one be killed; without,
        control groups stay until the next start.
        """
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
        self._has_janitor = has_janitor
        self._janitor: JanitorService | None = None
        self._reroutes = reroutes
        self._egress: EgressService | None = None
        """Started for the first toolkit whose jails have a network of their own."""
        self._holds: dict[ServedToolkit, SnapshotHold] = {}
        self._toolkits: dict[str, ServedToolkit] = {}
        """The version of each toolkit that takes new calls."""
        self._candidates: dict[ServedToolkit, Prepared] = {}
        """Versions that do not serve yet."""
        self._retired: list[ServedToolkit] = []
        """Versions that have calls to finish, and get no new ones."""
        self._versions = itertools.count(1)
        self.on_version_ended: Callable[[], None] = lambda: None
        """Called when a version has ended that others follow: its snapshot may be forgotten."""
        self._to_discover: deque[ServedToolkit] = deque()
        self._discovering: set[ServedToolkit] = set()
        options = options or ServeOptions()
        self._waiting = Shares(TOTAL_QUEUE, options.queue, options.queue_bytes)
        """What may wait of all toolkits together."""
        self._usage_timer: Timer | None = None
        self._output_timer: Timer | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no call waits or runs."""
        return all(toolkit.is_idle for toolkit in self.versions())

    def versions(self) -> Iterator[ServedToolkit]:
        """All that have jails: those that serve, those to be, and those that finish their calls."""
        return iter([*self._toolkits.values(), *self._candidates, *self._retired])

    @property
    def egress(self) -> EgressService | None:
        """None until a toolkit has a network of its own."""
        return self._egress

    def add(self, settings: ToolkitSettings) -> None:
        """Take a snapshot of the toolkit and find out in a jail what it registers.

        ToolkitError if its files cannot be read, IsolationError if control groups are required and
        cannot be had. One of `toolkit_discovered` and `toolkit_failed` follows.
        """
        self._provide(settings)
        taken = snapshot_of(settings, self._state_dir)
        self._toolkits[settings.name] = self._make(settings, taken)
        self._share_out()

    # -- versions ----------------------------------------------------------------------------------

    def serving(self, name: str) -> ServedToolkit | None:
        """The version that takes new calls; None if there is none."""
        return self._toolkits.get(name)

    def retired(self, name: str) -> int:
        """How many versions still finish their calls."""
        return sum(1 for toolkit in self._retired if toolkit.name == name)

    def prepare(self, settings: ToolkitSettings, taken: TakenSnapshot, then: Prepared) -> None:
        """Make a version beside the one that serves, and find out what it registers.

        `then(version, discovery)` or `then(version, error)` follows; after an error nothing of it
        is left. Takes `taken` over. SandboxError as `add`.
        """
        try:
            self._provide(settings)
            toolkit = self._make(settings, taken)
        except BaseException:
            taken.hold.close()
            raise
        self._candidates[toolkit] = then

    def swap(self, toolkit: ServedToolkit) -> None:
        """New calls go to this prepared version; the one before finishes those that it has."""
        del self._candidates[toolkit]
        self.retire(toolkit.name)
        self._toolkits[toolkit.name] = toolkit
        self._share_out()

    def retire(self, name: str) -> None:
        """No new calls for this toolkit; what waits and runs is finished, then its jails end."""
        toolkit = self._toolkits.pop(name, None)
        self._share_out()
        if toolkit is not None:
            self._retired.append(toolkit)
            self._loop.call_soon(self._close_retired)

    def abandon(self, toolkit: ServedToolkit) -> None:
        """End a prepared version that is not to serve."""
        self._candidates.pop(toolkit, None)
        if toolkit in self._to_discover:
            self._to_discover.remove(toolkit)
        self._discovering.discard(toolkit)
        self._end(toolkit)
        self.on_version_ended()
        self._loop.call_soon(self._discover_next)

    def _share_out(self) -> None:
        self._waiting.divide(max(1, len(self._toolkits)))

    def _close_retired(self) -> None:
        ended = [toolkit for toolkit in self._retired if toolkit.is_idle]
        for toolkit in ended:
            self._retired.remove(toolkit)
            self._end(toolkit)
        if ended:
            self.on_version_ended()

    def _end(self, toolkit: ServedToolkit) -> None:
        toolkit.close()
        hold = self._holds.pop(toolkit, None)
        if hold is not None:
            hold.close()

    def _provide(self, settings: ToolkitSettings) -> None:
        """What its jails need beside its own files."""
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
        self._provide_janitor(isolation)

    def _make(self, settings: ToolkitSettings, taken: TakenSnapshot) -> ServedToolkit:
        """Begins its discovery as soon as its turn comes."""
        for line in taken.snapshot.skipped:
            log.emit(log.WARNING, "snapshot_skipped", line, toolkit=settings.name)
        cgroups = self._cgroups if settings.isolation.may_use_cgroups else None
        toolkit = ServedToolkit(
            self._loop,
            settings,
            taken.snapshot,
            self._build_dir,
            cgroups,
            self._mover,
            self._farewells,
            self._provide_egress(settings),
            self,
            self._waiting,
            next(self._versions),
        )
        self._holds[toolkit] = taken.hold
        self._to_discover.append(toolkit)
        self._loop.call_soon(self._discover_next)
        if self._usage_timer is None:
            self._watch_usage()
            self._log_output()
        return toolkit

    def forget_old_snapshots(self) -> None:
        """Remove snapshots that neither this node nor any other process serves."""
        prune(self._store, set())

    def submit(self, call: NodeCall) -> None:
        """Run `call`; `call_finished` follows exactly once."""
        toolkit = self._version_of(call)
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
        for toolkit in self.versions():
            toolkit.refuse(UNAVAILABLE_DRAINING)

    def interrupt(self) -> None:
        """Answer what runs `interrupted` and end it. Calls that wait are not touched."""
        for toolkit in self.versions():
            toolkit.interrupt()

    def close(self, *, patience_s: float = PATIENCE_S) -> None:
        """End every jail and give back what the node owned. Safe to call again.

        `patience_s`: for jails that end in order, before they are killed.
        """
        for timer in (self._usage_timer, self._output_timer):
            if timer is not None:
                timer.cancel()
        self._to_discover.clear()
        for toolkit in self.versions():
            self._end(toolkit)
        self._farewells.close(patience_s)
        if self._egress is not None:
            self._egress.close()
        if self._mover is not None:
            self._mover.close()
        if self._janitor is not None:
            # On version 2 it is in the group that we give back.
            self._janitor.close()
        if self._cgroups is not None:
            self._cgroups.close()

    # -- what toolkits tell ------------------------------------------------------------------------

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None:
        self._discovering.discard(toolkit)
        if toolkit in self._candidates:
            # Later: it has not finished telling us.
            self._loop.call_soon(lambda: self._tell_prepared(toolkit, discovery))
        else:
            self._listener.toolkit_discovered(toolkit, discovery)
        self._discover_next()

    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None:
        self._discovering.discard(toolkit)
        if toolkit in self._candidates:
            self._loop.call_soon(lambda: self._tell_prepared(toolkit, error))
        else:
            self._listener.toolkit_failed(toolkit, error)
        self._discover_next()

    def _tell_prepared(self, toolkit: ServedToolkit, found: Discovery | SandboxError) -> None:
        then = self._candidates.get(toolkit)
        if then is None:
            return  # abandoned meanwhile
        if isinstance(found, SandboxError):
            self.abandon(toolkit)
        then(toolkit, found)

    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None:
        # Of other versions nobody is served by that client, or not yet: the swap looks at it.
        if self._toolkits.get(toolkit.name) is toolkit:
            self._listener.client_stopped(toolkit, client)

    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None:
        self._listener.call_starting(call, go, refuse)

    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None:
        self._listener.call_finished(call, outcome, printed)
        if self._retired:
            self._loop.call_soon(self._close_retired)

    # -- within ------------------------------------------------------------------------------------

    def _discover_next(self) -> None:
        while self._to_discover and len(self._discovering) < _DISCOVERIES_AT_ONCE:
            toolkit = self._to_discover.popleft()
            self._discovering.add(toolkit)
            toolkit.discover()

    def _version_of(self, call: NodeCall) -> ServedToolkit | None:
        """The one whose tool it is; a call that was admitted before a swap is the old one's."""
        serving = self._toolkits.get(call.toolkit)
        if serving is not None and serving.serves(call.tool):
            return serving
        others = (*self._candidates, *self._retired)
        return next((one for one in others if one.serves(call.tool)), None)

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
        """None of these can be served: what is refused to them could not be told apart."""
        for toolkit in self.versions():
            isolation = toolkit.settings.isolation
            if toolkit.state is State.DISCOVERING and isolation.has_namespaces:
                failure = SetupFailure(error.step, str(error))
                told = self if toolkit in self._candidates else self._listener
                told.toolkit_failed(toolkit, isolation_error(failure, isolation))

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

    def _provide_janitor(self, isolation: Isolation) -> None:
        """Have somebody clear up what a jail of this isolation would leave if we were killed."""
        if not self._has_janitor or (self._cgroups is None and isolation.has_namespaces):
            return
        groups = None if self._cgroups is None else self._cgroups.place
        duty = Duty(scratch_prefix(self._build_dir.parent), groups)
        if self._janitor is not None and self._janitor.duty != duty:
            self._janitor.close()
            self._janitor = None
        if self._janitor is None:
            self._janitor = JanitorService(self._loop, duty)

    def _watch_usage(self) -> None:
        for toolkit in self.versions():
            toolkit.watch_usage()
        self._usage_timer = self._loop.call_later(USAGE_SAMPLE_S, self._watch_usage)

    def _log_output(self) -> None:
        for toolkit in self.versions():
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
