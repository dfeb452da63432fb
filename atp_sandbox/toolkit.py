"""One served toolkit: its snapshot, its jails, its pool, and the shell that joins them.

Carries out what `scheduling.pool` decides and tells it what `jails.jail` saw. Every call that is
submitted ends in one `call_finished`.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Protocol, assert_never
from weakref import WeakKeyDictionary

from atp_sandbox import log
from atp_sandbox.confinement.plan import JailSpec, NetworkView, ToolkitView, jail_processes
from atp_sandbox.discovery import Discovery, Tool, parse_report
from atp_sandbox.egress.jail_network import JailNetwork, with_denials
from atp_sandbox.egress.service import EgressService
from atp_sandbox.egress.tokens import substitute
from atp_sandbox.errors import SandboxError, ToolkitError
from atp_sandbox.jails.cgroup_mover import Mover
from atp_sandbox.jails.cgroups import CallEvidence, CgroupTree
from atp_sandbox.jails.farewell import Farewells
from atp_sandbox.jails.jail import Jail, SetupFailure
from atp_sandbox.jails.remedies import isolation_error
from atp_sandbox.jails.snapshot import Snapshot
from atp_sandbox.jails.worker import Exited
from atp_sandbox.limits import format_duration, format_size
from atp_sandbox.loop import Loop, Timer
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Kind, Limit, Outcome, Success
from atp_sandbox.scheduling import pool, verdict
from atp_sandbox.scheduling.quarantine import TRYING_S, WINDOW_S, Quarantine
from atp_sandbox.scheduling.shares import Shares
from atp_sandbox.settings import Lifetime, LifetimeKind, ToolkitSettings
from atp_sandbox.state import scratch_directory
from workers.frames import CALL_ID_BYTES, FrameError, FrameTooLong, is_oversize

RESTING_BYTES = 32 * 1024 * 1024
"""A zygote before its import: the interpreter and our modules, with room to spare."""
_FIRST_RESTART_S = 0.1
_MAX_RESTART_S = 30.0
_STABLE_S = 10.0
_CALL_IDS = 64
_START_LATER_S = 0.002
_SLOW_LOOK_S = 0.5
"""Between two looks at scratch that the kernel does not limit, and at a zygote that serves."""


class State(Enum):
    DISCOVERING = auto()
    SERVING = auto()
    RESTARTING = auto()
    FAILED = auto()
    STOPPED = auto()


class ToolkitListener(Protocol):
    """What a toolkit tells its node."""

    def toolkit_discovered(self, toolkit: ServedToolkit, discovery: Discovery) -> None: ...
    def toolkit_failed(self, toolkit: ServedToolkit, error: SandboxError) -> None: ...
    def client_stopped(self, toolkit: ServedToolkit, client: int) -> None: ...
    def call_starting(
        self, call: NodeCall, go: Callable[[], None], refuse: Callable[[Failure], None]
    ) -> None: ...
    def call_finished(self, call: NodeCall, outcome: Outcome, printed: str) -> None: ...


class ServedToolkit:
    """Owns the jails of one toolkit."""

    def __init__(
        self,
        loop: Loop,
        settings: ToolkitSettings,
        snapshot: Snapshot,
        build_dir: Path,
        cgroups: CgroupTree | None,
        mover: Mover | None,
        farewells: Farewells,
        egress: EgressService | None,
        listener: ToolkitListener,
        waiting: Shares,
        version: int = 1,
    ) -> None:
        """`waiting`: what may wait of all toolkits; each is a member by its name.

        `build_dir` is an empty directory, in one where plain scratch directories may be made.

        `egress` is None where jails have no network of their own. `version` is a number that no
        other version of this toolkit has.
        """
        self._loop = loop
        self.settings = settings
        self.name = settings.name
        self.lifetime = settings.lifetime
        self.version = version
        self.snapshot = snapshot
        self._build_dir = build_dir
        self._cgroups = cgroups
        self._mover = mover
        self._farewells = farewells
        self._egress = egress
        self._networks: WeakKeyDictionary[Jail, JailNetwork] = WeakKeyDictionary()
        self._jails_made = 0
        self._listener = listener
        self._total_waiting = waiting
        self._pool = self._make_pool()
        self.state = State.DISCOVERING
        self.discovery: Discovery | None = None
        self.landlock_abi = 0
        self._main: Jail | None = None
        """The jail of discovery; it goes on as the one that forks, or whose threads live."""
        self._stopped_clients: set[int] = set()
        self._own_jails: dict[Jail, int] = {}
        """Lifetime `jail`: each worker's own jail and its number."""
        self._ready_jails: dict[int, Jail] = {}
        self._timer: Timer | None = None
        self._import_timer: Timer | None = None
        self._restart_s = _FIRST_RESTART_S
        self._restart_error: SandboxError | None = None
        """Why it could not be started again, as long as that is so."""
        self.quarantine = Quarantine()
        self._following: dict[int, list[Callable[[], None]]] = {}
        """What came from each worker whose scratch is looked at, for the answer before that."""
        self._is_timer_due = False
        self._to_start: list[int] = []
        """Workers of the present jail that are to be started soon."""
        self._call_ids: list[bytes] = []
        self._up_since = 0.0
        self._next_slow_look = 0.0
        self._overloads = 0
        """Calls answered `overloaded` that the log was not told of yet."""
        self._overloaded_by: Limit | None = None

    # -- for the node ------------------------------------------------------------------------------

    def discover(self) -> None:
        """Launch the jail in which the toolkit is imported."""
        try:
            self._main = self._make_jail()
        except (SandboxError, OSError) as error:
            self._fail_import(_start_error(error))
            return
        self._import_timer = self._loop.call_later(
            self.settings.limits.import_time_s, self._on_import_timeout
        )

    def submit(self, call: NodeCall) -> None:
        """Take over `call`; its deadline runs from `call.received_at`."""
        refusal = self._out_of_service(self._loop.now())
        if refusal is not None:
            self._listener.call_finished(call, refusal, "")
            return
        if call.token is not None and self.settings.egress.inject:
            try:
                call.token, call.stands_for = substitute(call.token)
            except ValueError as error:
                sentence = f"The token cannot be kept outside of the jail: {error}."
                failure = Failure(Kind.AUTH_REQUIRED, sentence)
                self.quarantine.call_vanished()
                self._listener.call_finished(call, failure, "")
                return
        entry = pool.Call(
            call,
            tool=call.tool.name,
            received_at=call.received_at,
            deadline=call.received_at + self.settings.limits.time_s,
            size_bytes=len(call.params),
        )
        self._obey(self._pool.submit(entry, self._loop.now()))

    def _out_of_service(self, now: float) -> Failure | None:
        if self._restart_error is None:
            return self.quarantine.refusal(self.name, now)
        wait_s = TRYING_S
        if self._main is None and self._import_timer is not None:
            wait_s = self._import_timer.when - now
        return Failure(
            Kind.UNAVAILABLE,
            f"The toolkit {self.name} could not be started again: {self._restart_error.message}",
            retry_after_s=round(max(0.1, wait_s), 1),
        )

    def _dismiss_waiting(self) -> None:
        """Those that wait hear what those hear that come now."""
        refusal = self._out_of_service(self._loop.now())
        if refusal is not None:
            self._obey(self._pool.dismiss(refusal))

    def refuse(self, failure: Failure) -> None:
        """Answer what waits and what comes with `failure`; what runs goes on."""
        self._obey(self._pool.refuse(failure))

    def serves(self, tool: Tool) -> bool:
        """Whether `tool` was registered by this version: workers go by its place among them all."""
        found = () if self.discovery is None else self.discovery.registrations
        return tool.index < len(found) and found[tool.index] is tool

    @property
    def stopped_clients(self) -> frozenset[int]:
        """Clients that the toolkit itself has stopped."""
        return frozenset(self._stopped_clients)

    def interrupt(self) -> None:
        """Answer what runs `interrupted`, and end it."""
        self._obey(self._pool.interrupt(self._loop.now()))

    @property
    def is_idle(self) -> bool:
        return self._pool.is_idle

    @property
    def running(self) -> int:
        return self._pool.running

    @property
    def waiting(self) -> int:
        return self._pool.waiting

    @property
    def layers(self) -> list[str]:
        """What confines it, in words; complete once it is discovered."""
        version = 0 if self._cgroups is None else self._cgroups.version
        return self.settings.isolation.layers(self.landlock_abi, version)

    def watch_usage(self) -> None:
        """Compare what each running call, or a running import, has used with what it may."""
        most = self.settings.limits.memory_bytes
        if self.state in (State.DISCOVERING, State.RESTARTING):
            if self._zygote_memory_bytes() > most + RESTING_BYTES:
                self._fail_import(
                    ToolkitError(
                        f"Toolkit {self.name}: its import used more than {format_size(most)}.",
                        tip="Raise --memory, or load large data inside the tools.",
                    )
                )
            return
        limits, now = self.settings.limits, self._loop.now()
        if now >= self._next_slow_look:
            self._next_slow_look = now + _SLOW_LOOK_S
            if not self._watch_slowly():
                return
        has_groups, may_start = self._cgroups is not None, self.settings.may_start_programs
        if has_groups and limits.cpu_s is None and not may_start:
            return
        for number, _ in list(self._pool.running_workers()):
            jail = self._jail_of(number)
            try:
                used = jail.usage(number)
            except OSError as error:  # such as EMFILE: what cannot be looked at does not run
                jail.end(f"a call cannot be looked at: {error.strerror}")
                return
            # Where there is a control group, the kernel itself keeps the limit of memory; version 1
            # kills one process of a call, and then the others are to go too.
            is_over = used.added_memory_bytes > most and not has_groups
            if may_start and _seen(jail.counted(number), scratch_was_full=False).oom_kills:
                is_over = True
            if is_over:
                self._obey(self._pool.stop_worker(number, verdict.memory_exceeded(limits), now))
            elif limits.cpu_s is not None and used.cpu_s > limits.cpu_s:
                self._obey(self._pool.stop_worker(number, verdict.cpu_exceeded(limits), now))

    def _zygote_memory_bytes(self) -> int:
        """0 if it is gone, and also if it cannot be looked at: then its jail was ended."""
        if self._main is None:
            return 0
        try:
            return self._main.zygote_memory_bytes()
        except OSError as error:
            self._main.end(f"its zygote cannot be looked at: {error.strerror}")
            return 0

    def _watch_slowly(self) -> bool:
        """What the kernel does not limit here, and what grows at rest; False if the jail ended."""
        most = self.settings.limits.memory_bytes + RESTING_BYTES
        if self._main is not None and self._cgroups is None and self._zygote_memory_bytes() > most:
            # Nobody else counts what it takes for itself while it serves.
            self._main.end("its zygote used more memory than it may")
            return False
        if not self.settings.isolation.has_namespaces:
            for number, _ in list(self._pool.running_workers()):
                seen = partial(self._on_scratch_seen, number, self._pool.call_of(number))
                self._jail_of(number).measure_scratch(number, seen)
        return True

    def _on_scratch_seen(self, number: int, call: pool.Call | None, is_full: bool) -> None:
        if is_full and self._pool.call_of(number) is call:
            self._stop(number, verdict.disk_exceeded(self.settings.limits))

    def log_output(self) -> None:
        """Log what the toolkit printed outside of calls, and how many calls were too many."""
        self._log_overloads()
        if self._main is not None:
            self._log_output(self._main)

    def close(self) -> None:
        """End all jails; calls that still run are not answered any more. Safe to call again."""
        self.state = State.STOPPED
        self._log_overloads()
        for timer in (self._timer, self._import_timer):
            if timer is not None:
                timer.cancel()
        for jail in (self._main, *self._own_jails):
            if jail is not None:
                self._log_output(jail)
                jail.close()
        self._main = None
        self._own_jails.clear()
        self._ready_jails.clear()

    # -- what jails tell ---------------------------------------------------------------------------

    def jail_discovered(self, jail: Jail, report: bytes, threads: int) -> None:
        self._log_output(jail)
        number = self._own_jails.get(jail)
        try:
            discovery = parse_report(report)
            self._check(discovery)
        except ToolkitError as error:
            if number is None:
                self._fail_import(error)
            else:
                self._lose_own_jail(jail, "it registered other tools than at first")
            return
        if number is not None:
            self._ready_jails[number] = jail
            jail.become_worker(number)
            return
        self._cancel_import_timer()
        self._restart_error = None
        self.landlock_abi = jail.landlock_abi
        is_first = self.discovery is None
        self.state, self._up_since = State.SERVING, self._loop.now()
        if is_first:
            self.discovery = discovery
            self._settle_lifetime(threads)
            self._pool.divide(max(1, len({tool.name for tool in discovery.registrations})))
            self._listener.toolkit_discovered(self, discovery)
        if self.state is State.SERVING:
            self._obey(self._pool.supply_up(self._loop.now()))

    def jail_broken(self, jail: Jail, what: str, traceback_end: str) -> None:
        self._log_output(jail)
        if jail in self._own_jails:
            self._lose_own_jail(jail, f"its import {log.printable(what)}")
            return
        self._fail_import(
            ToolkitError(
                f"Toolkit {self.name} could not be imported: it {log.printable(what)}.",
                cause=log.printable(traceback_end.rstrip(), keep_newlines=True),
            )
        )

    def jail_setup_failed(self, jail: Jail, failure: SetupFailure) -> None:
        error = isolation_error(failure, self.settings.isolation)
        if jail in self._own_jails:
            log.emit(log.ERROR, "jail_failed", error.message, toolkit=self.name, cause=error.cause)
            self._lose_own_jail(jail, error.message)
        else:
            self._fail_import(error)

    def jail_ended(self, jail: Jail, reason: str) -> None:
        self._log_output(jail)
        if jail in self._own_jails:
            self._lose_own_jail(jail, reason)
        elif self.state in (State.DISCOVERING, State.RESTARTING):
            self._fail_import(
                ToolkitError(
                    f"Toolkit {self.name} ended while it was imported: {reason}.",
                    tip="A toolkit must reach client.start() or the end of its script.",
                )
            )
        elif self.state is State.SERVING:
            log.emit(
                log.WARNING,
                "jail_ended",
                "a toolkit's sandbox ended",
                toolkit=self.name,
                reason=reason,
            )
            if self.lifetime.kind is not LifetimeKind.JAIL:
                now = self._loop.now()
                self.state = State.RESTARTING  # so that its calls do not count one by one
                unbegun = {n: self._take_back(jail, n) for n, _ in self._pool.running_workers()}
                self._obey(self._pool.supply_lost(reason, now, unbegun))
                self._following.clear()
                self._to_start.clear()
                self._note_quarantine(self.quarantine.jail_crashed(now))
                if now - self._up_since > _STABLE_S:
                    self._restart_s = _FIRST_RESTART_S
                self._restart_later()
            self._main = None

    def client_stopped(self, jail: Jail, client: int) -> None:
        known = self.discovery is not None and 0 <= client < len(self.discovery.clients)
        if jail is self._main and known and client not in self._stopped_clients:
            self._log_output(jail)
            self._stopped_clients.add(client)
            self._listener.client_stopped(self, client)

    def worker_ready(self, jail: Jail, number: int) -> None:
        self._obey(self._pool.worker_ready(number, self._loop.now()))

    def worker_answered(
        self, jail: Jail, number: int, call_id: bytes, kind: str, body: bytes
    ) -> None:
        if number in self._following:
            self._follow(number, partial(self.worker_answered, jail, number, call_id, kind, body))
            return
        call = self._pool.call_of(number)
        if call is None:
            # Already concluded (its worker is being ended), or nothing was asked.
            self._stop(number, verdict.broke_rules())
            return
        assert isinstance(call.payload, NodeCall)
        if not secrets.compare_digest(call.payload.call_id, call_id):
            self._stop(number, verdict.broke_rules())
            return
        if kind == "error":
            # Whether the tool failed for want of space is seen from outside, not in its words.
            self._following[number] = []
            jail.measure_scratch(
                number, lambda is_full: self._on_measured(jail, number, call, kind, body, is_full)
            )
        else:
            self._judge(jail, number, call, kind, body, scratch_is_full=False)

    def _on_measured(
        self,
        jail: Jail,
        number: int,
        call: pool.Call,
        kind: str,
        body: bytes,
        scratch_is_full: bool,
    ) -> None:
        following = self._following.pop(number, [])
        self._judge(jail, number, call, kind, body, scratch_is_full)
        for what_came in following:
            what_came()

    def _follow(self, number: int, what_came: Callable[[], None]) -> None:
        """Keep the order: what a worker said first is judged first."""
        following = self._following[number]
        following.append(what_came)
        if len(following) > pool.MAX_HANDED:  # more than it was ever given calls
            del self._following[number]
            self._stop(number, verdict.broke_rules())

    def _judge(
        self,
        jail: Jail,
        number: int,
        call: pool.Call,
        kind: str,
        body: bytes,
        scratch_is_full: bool,
    ) -> None:
        if self._pool.call_of(number) is not call:
            return  # concluded meanwhile, by its deadline
        try:
            outcome = verdict.judge_answer(kind, body, self.settings.limits)
        except verdict.RuleBroken:
            self._stop(number, verdict.broke_rules())
            return
        if isinstance(outcome, Failure) and kind == "error":
            seen = _seen(jail.counted(number), scratch_is_full)
            outcome = verdict.judge_failure(outcome, seen, self.settings.limits)
        now, came_at = self._loop.now(), self._loop.turn_at
        self._obey(self._pool.worker_answered(number, outcome, now, came_at))

    def worker_broke_rules(self, jail: Jail, number: int, error: FrameError) -> None:
        if number in self._following:
            self._follow(number, partial(self.worker_broke_rules, jail, number, error))
            return
        call = self._pool.call_of(number)
        if isinstance(error, FrameTooLong) and call is not None:
            assert isinstance(call.payload, NodeCall)
            # Only the head of a proper answer is evidence of a large result; the rest is garbage.
            if is_oversize(error.head, call.payload.call_id):
                self._stop(number, verdict.output_exceeded(self.settings.limits))
                return
        log.emit(
            log.WARNING,
            "worker_broke_rules",
            "a worker broke the answer protocol",
            toolkit=self.name,
            rule=str(error),
        )
        self._stop(number, verdict.broke_rules())

    def worker_hung_up(self, jail: Jail, number: int) -> None:
        self._obey(self._pool.worker_hung_up(number, self._loop.now()))

    def worker_exited(self, jail: Jail, number: int, exited: Exited) -> None:
        seen = _seen(exited.counted, exited.scratch_was_full)
        failure = verdict.judge_failure(verdict.crashed(exited.status), seen, self.settings.limits)
        self._following.pop(number, None)
        unbegun = self._take_back(jail, number)
        self._obey(self._pool.worker_exited(number, failure, self._loop.now(), unbegun))
        if jail in self._own_jails:
            self._drop_own_jail(jail)

    # -- carrying out what the pool decided --------------------------------------------------------

    def _obey(self, commands: list[pool.Command]) -> None:
        for command in commands:
            match command:
                case pool.Assign(number, call):
                    self._assign(number, call)
                case pool.Conclude(call, outcome, ran_on):
                    self._conclude(call, outcome, ran_on)
                    if self._to_start:
                        # After the link, which writes at the end of this turn.
                        self._loop.call_soon(lambda: self._loop.call_last(self._start_due))
                case pool.StartWorker(number):
                    self._start_worker(number)
                case pool.Withdraw(number):
                    self._withdraw(number)
                case pool.Kill(number):
                    self._withdraw(number)
                    self._kill(number)
                case _:
                    assert_never(command)
        if not self._is_timer_due:
            self._is_timer_due = True
            self._loop.call_last(self._set_timer)

    def _start_worker(self, number: int) -> None:
        if self.lifetime.kind is LifetimeKind.JAIL:
            try:
                self._own_jails[self._make_jail()] = number
            except (SandboxError, OSError) as error:
                reason = _start_error(error).message
                log.emit(log.ERROR, "jail_failed", reason, toolkit=self.name)
                failure = verdict.jail_lost(reason)
                self._obey(self._pool.worker_exited(number, failure, self._loop.now()))
        elif self._pool.waiting or not self._pool.running:
            self._start_now(number)
        else:
            # It would compete with the call that has just been assigned, for which it is no help.
            if not self._to_start:
                self._loop.call_later(_START_LATER_S, self._start_due)
            self._to_start.append(number)

    def _start_due(self) -> None:
        """Once a call has ended and its answer is on its way, or a little later."""
        due, self._to_start = self._to_start, []
        for number in due:
            self._start_now(number)

    def _start_now(self, number: int) -> None:
        if self._main is not None:
            self._main.start_worker(number)

    def _assign(self, number: int, call: pool.Call) -> None:
        if call not in self._pool.calls_of(number):
            return  # a command before this one ended the jail
        payload = call.payload
        assert isinstance(payload, NodeCall)
        payload.is_handed = False
        payload.call_id = call_id = self._new_call_id()

        def is_still_due() -> bool:
            return payload.call_id is call_id

        self._listener.call_starting(
            payload,
            lambda: self._hand_over(number, payload) if is_still_due() else None,
            lambda failure: self._refuse(number, call, failure) if is_still_due() else None,
        )

    def _refuse(self, number: int, call: pool.Call, failure: Failure) -> None:
        self._obey(self._pool.refused(number, call, failure, self._loop.now()))

    def _new_call_id(self) -> bytes:
        """Random, and drawn many at a time: each draw is a system call."""
        if not self._call_ids:
            drawn = secrets.token_bytes(_CALL_IDS * CALL_ID_BYTES)
            self._call_ids = [
                drawn[at : at + CALL_ID_BYTES] for at in range(0, len(drawn), CALL_ID_BYTES)
            ]
        return self._call_ids.pop()

    def _withdraw(self, number: int) -> None:
        if self.lifetime.kind is LifetimeKind.CALLS and self._main is not None:
            count = self._take_back(self._main, number)
            if count:
                self._obey(self._pool.withdrawn(number, count, self._loop.now()))

    def _take_back(self, jail: Jail, number: int) -> int:
        """How many of the last calls of a worker it has not begun, and never will."""
        count = 0
        for call in self._pool.calls_of(number):
            assert isinstance(call.payload, NodeCall)
            if not call.payload.is_handed:
                call.payload.call_id = b""  # and so it will not be
                count += 1
        return count + jail.take_back(number)

    def _hand_over(self, number: int, payload: NodeCall) -> None:
        payload.is_handed = True
        self._pool.handed(number, self._loop.now())
        jail = self._jail_of(number)
        for placeholder, secret in payload.stands_for.items():
            # A provider that the operator named no hosts for is nowhere: what a toolkit says of its
            # tools shall not get it a token.
            provider = payload.tool.auth_provider or ""
            self._networks[jail].fill(provider, placeholder, secret)
        jail.send_call(
            number,
            payload.call_id,
            payload.tool.index,
            payload.params,
            payload.token,
            payload.is_sample,
        )

    def _kill(self, number: int) -> None:
        if self.lifetime.kind is not LifetimeKind.JAIL:
            if self._main is not None:
                self._main.kill_worker(number)
            return
        for jail, its_number in list(self._own_jails.items()):
            if its_number == number:
                self._lose_own_jail(jail, "it was stopped")

    def _conclude(self, call: pool.Call, outcome: Outcome, ran_on: int | None) -> None:
        payload = call.payload
        assert isinstance(payload, NodeCall)
        payload.call_id = b""
        printed = ""
        if isinstance(outcome, Failure) and outcome.kind is Kind.OVERLOADED:
            self._overloads += 1
            self._overloaded_by = outcome.limit
        if ran_on is not None:
            jail = self._jail_of(ran_on)
            printed = jail.take_output(ran_on)
            if printed:
                # Whose it is can be told for sure only of a worker that has one call.
                for other in self._pool.calls_of(ran_on):
                    assert isinstance(other.payload, NodeCall)
                    printed = log.without(printed, other.payload.secrets())
                self._pool.hand_singly()
            outcome = self._end_egress(jail, ran_on, payload, outcome)
            if self.lifetime.kind is LifetimeKind.CALL:
                jail.dismiss(ran_on)
        self._listener.call_finished(payload, outcome, printed)
        self._note_end(outcome, has_run=ran_on is not None)

    def _note_end(self, outcome: Outcome, *, has_run: bool) -> None:
        now = self._loop.now()
        if not has_run or self.state is not State.SERVING:
            self.quarantine.call_vanished()
        elif isinstance(outcome, Failure) and outcome.kind is Kind.CRASHED:
            self._note_quarantine(self.quarantine.worker_crashed(now))
        elif self.quarantine.worker_survived(now):
            log.emit(log.INFO, "toolkit_restored", "back in service", toolkit=self.name)

    def _note_quarantine(self, has_begun: bool) -> None:
        if not has_begun:
            return
        log.emit(
            log.ERROR,
            "toolkit_quarantined",
            "out of service: it crashes again and again",
            toolkit=self.name,
            crashes=self.quarantine.crashes,
            within_s=WINDOW_S,
            retry_in_s=round(self.quarantine.until - self._loop.now(), 1),
        )
        self._dismiss_waiting()

    def _end_egress(self, jail: Jail, number: int, payload: NodeCall, outcome: Outcome) -> Outcome:
        """Its token is worthless from here on; if it failed, it may be for what was refused."""
        if isinstance(outcome, Success) and not payload.stands_for:
            return outcome
        network = self._networks.get(jail)
        if network is None:
            return outcome
        for placeholder in payload.stands_for:
            network.forget(placeholder)
        if not isinstance(outcome, Failure):
            return outcome
        return with_denials(outcome, network.denied(number, payload.received_at))

    def _stop(self, number: int, failure: Failure) -> None:
        self._obey(self._pool.stop_worker(number, failure, self._loop.now()))

    def _jail_of(self, number: int) -> Jail:
        if self.lifetime.kind is LifetimeKind.JAIL:
            return self._ready_jails[number]
        assert self._main is not None
        return self._main

    def _set_timer(self) -> None:
        self._is_timer_due = False
        when = self._pool.next_deadline()
        if self._timer is not None:
            if when is not None and self._timer.when <= when and self._timer.callback:
                return  # it fires early, finds nothing to do, and is set anew
            self._timer.cancel()
            self._timer = None
        if when is not None and self.state is not State.STOPPED:
            self._timer = self._loop.call_at(when, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._obey(self._pool.tick(self._loop.now()))

    def _make_pool(self) -> pool.Pool:
        return pool.Pool(
            self.settings.limits, self.lifetime, toolkit=self.name, total=self._total_waiting
        )

    # -- jails -------------------------------------------------------------------------------------

    def _make_jail(self) -> Jail:
        """A jail in a group of its own, as large as all calls together may get."""
        self._jails_made += 1
        with contextlib.ExitStack() as undo:
            jail = self._launch_jail(undo)
            undo.pop_all()
        return jail

    def _launch_jail(self, undo: contextlib.ExitStack) -> Jail:
        """`undo` gives back what was made for it, should it not be launched."""
        limits = self.settings.limits
        group = None
        if self._cgroups is not None:
            calls = 1 if self.lifetime.kind is LifetimeKind.JAIL else 2 * limits.concurrency
            group = self._cgroups.jail(
                f"{self.name}-{self.version}-{self._jails_made}",
                memory_bytes=RESTING_BYTES + (1 + calls) * limits.memory_bytes,
                pids_max=jail_processes(limits),
            )
            undo.callback(group.close)
            group.prepare_calls(1 if calls == 1 else limits.concurrency + pool.MAX_AHEAD)
        network = None
        if self._egress is not None:
            network = self._egress.jail(self.name, self.settings.egress)
            undo.callback(network.close)
        spec = self._spec(network)
        jail = Jail(self._loop, spec, group, self._mover, self._farewells, self, network)
        if network is not None:
            self._networks[jail] = network
        return jail

    def _spec(self, network: JailNetwork | None) -> JailSpec:
        snapshot, settings = self.snapshot, self.settings
        directory = self._build_dir
        if not settings.isolation.has_namespaces:
            directory = scratch_directory(directory.parent)
        return JailSpec(
            toolkit=ToolkitView(
                directory=str(snapshot.directory),
                entry=snapshot.entry,
                package=snapshot.package,
                env=settings.env,
            ),
            limits=settings.limits,
            isolation=settings.isolation,
            forks_workers=self.lifetime.kind is not LifetimeKind.JAIL,
            may_start_programs=settings.may_start_programs,
            calls_per_worker=self.lifetime.calls,
            directory=str(directory),
            network=None
            if network is None
            else NetworkView(network.policy, network.ticket(0), network.certificates()),
        )

    def _check(self, discovery: Discovery) -> None:
        if self.discovery is not None and discovery.signature != self.discovery.signature:
            raise ToolkitError(f"Toolkit {self.name} registered other tools than at first.")
        if not discovery.registrations:
            raise ToolkitError(
                f"Toolkit {self.name} registers no tools.",
                tip="Decorate a function with @client.register_tool(...) and call client.start().",
            )
        if discovery.processes:
            raise ToolkitError(
                f"Toolkit {self.name} started {discovery.processes} processes in its import.",
                tip="Start processes inside a tool, or do without them.",
            )

    def _settle_lifetime(self, threads: int) -> None:
        """A process with threads cannot be forked safely: each call then gets its own jail."""
        if threads > 1 and self.lifetime.kind is not LifetimeKind.JAIL:
            log.emit(
                log.WARNING,
                "lifetime_changed",
                "the toolkit runs threads after its import, so each call gets a jail of its own",
                toolkit=self.name,
                threads=threads,
                lifetime="jail",
            )
            self.lifetime = Lifetime(LifetimeKind.JAIL)
            self._pool = self._make_pool()
        elif threads == 1 and self.lifetime.kind is LifetimeKind.JAIL and self._main is not None:
            # Nothing of the toolkit runs in it any more.
            self._main.close()
            self._main = None

    def _fail_import(self, error: SandboxError) -> None:
        """The jail of discovery is of no use; a toolkit that served before is tried again."""
        self._cancel_import_timer()
        if self._main is not None:
            self._main.close()
            self._main = None
        if self.discovery is None:
            self.state = State.FAILED
            self._listener.toolkit_failed(self, error)
            return
        log.emit(log.ERROR, "restart_failed", error.message, toolkit=self.name, cause=error.cause)
        self._restart_error = error
        self._restart_later()
        self._dismiss_waiting()

    def _restart_later(self) -> None:
        self.state = State.RESTARTING
        # In quarantine, it is made anew when it is to be tried.
        when = max(self._loop.now() + self._restart_s, self.quarantine.until)
        self._import_timer = self._loop.call_at(when, self.discover)
        self._restart_s = min(_MAX_RESTART_S, self._restart_s * 2)

    def _on_import_timeout(self) -> None:
        allowed = format_duration(self.settings.limits.import_time_s)
        self._fail_import(
            ToolkitError(
                f"Toolkit {self.name} was not imported within {allowed}.",
                tip="Raise --import-time, or do slow work inside the tools.",
            )
        )

    def _cancel_import_timer(self) -> None:
        if self._import_timer is not None:
            self._import_timer.cancel()
            self._import_timer = None

    def _lose_own_jail(self, jail: Jail, reason: str) -> None:
        number = self._own_jails[jail]
        self._following.pop(number, None)
        self._obey(self._pool.worker_exited(number, verdict.jail_lost(reason), self._loop.now()))
        self._drop_own_jail(jail)

    def _drop_own_jail(self, jail: Jail) -> None:
        number = self._own_jails.pop(jail, None)
        if number is not None:
            self._ready_jails.pop(number, None)
            jail.close()

    def _log_overloads(self) -> None:
        """One line for all: in a burst a line each would cost more than the answers."""
        if self._overloads:
            assert self._overloaded_by is not None
            log.emit(
                log.WARNING,
                "overloaded",
                "calls were refused because too many wait",
                toolkit=self.name,
                calls=self._overloads,
                limit=self._overloaded_by.name,
                unit=self._overloaded_by.unit,
            )
            self._overloads = 0

    def _log_output(self, jail: Jail) -> None:
        printed = jail.output.take().strip()
        if printed:
            log.emit(log.INFO, "toolkit_output", printed, toolkit=self.name)


def _seen(counted: CallEvidence | None, scratch_was_full: bool) -> verdict.Seen:
    if counted is None:
        return verdict.Seen(scratch_was_full=scratch_was_full)
    # Without a refusal of its own it was the jail's or the machine's limit, not the call's.
    oom_kills = counted.oom_kills if counted.memory_refusals else 0
    return verdict.Seen(oom_kills, counted.pids_refused, scratch_was_full)


def _start_error(error: SandboxError | OSError) -> SandboxError:
    """A jail that could not even be launched, for want of descriptors or processes."""
    if isinstance(error, SandboxError):
        return error
    return SandboxError("A jail could not be launched.", cause=str(error.strerror))
