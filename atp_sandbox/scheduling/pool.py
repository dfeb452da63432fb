"""Which worker serves which call, when to start one and when to end one. PURE: no I/O, no clock.

One pool a toolkit. Each method is an event with `now` and returns the commands that follow; the
shell carries them out in order. A worker's life is the table `NEXT_STATE`: a pair that is missing
there is a bug of ours.

Every call that was submitted gets exactly one `Conclude`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from atp_sandbox.limits import Limits
from atp_sandbox.outcome import Failure, Kind, Limit, Outcome
from atp_sandbox.scheduling import verdict
from atp_sandbox.scheduling.shares import OWN_QUEUE, TOTAL_QUEUE, Shares
from atp_sandbox.scheduling.waiting import Call as Call
from atp_sandbox.scheduling.waiting import WaitingCalls
from atp_sandbox.settings import Lifetime, LifetimeKind

MAX_AHEAD = 2
"""Workers that wait ready beyond those at work; each costs a few hundred pages."""
START_S = 10.0
"""From the command to start a worker to its first word; usually one to five milliseconds."""
END_S = 1.0
"""From a worker's last answer, or our SIGKILL, to its end."""
HUNG_UP_S = 2.0
"""From the end of a busy worker's channel to its exit; longer means that it closed it itself.

Word of the exit usually comes within 2 ms; with seven times more to do than cores, within 0.5 s."""
MAX_HANDED = 16
"""Calls that a worker has at most: the one that runs and those that it goes on with by itself."""
STUCK_S = 0.005
"""A call that runs for longer gives up those behind it, and fewer are handed at a time; after each
shorter one, more are."""
PACK_S = 0.0005
"""Calls that take less go to a worker that is awake before they wake another one."""
_FIRST_RETRY_S = 0.1
MAX_RETRY_S = 2.0
"""A failed fork costs a millisecond; a machine that can again is to be used soon."""


class State(Enum):
    """Where a worker is in its life."""

    STARTING = auto()
    READY = auto()
    BUSY = auto()
    ENDING = auto()


class Event(Enum):
    """What can happen to a worker."""

    SPOKE = auto()
    ASSIGNED = auto()
    ANSWERED = auto()
    ANSWERED_LAST = auto()
    WITHDRAWN = auto()
    KILLED = auto()


NEXT_STATE: dict[State, dict[Event, State]] = {
    State.STARTING: {Event.SPOKE: State.READY, Event.KILLED: State.ENDING},
    State.READY: {Event.ASSIGNED: State.BUSY, Event.KILLED: State.ENDING},
    State.BUSY: {
        Event.ANSWERED: State.READY,
        Event.ANSWERED_LAST: State.ENDING,
        Event.WITHDRAWN: State.READY,
        Event.KILLED: State.ENDING,
    },
    State.ENDING: {Event.KILLED: State.ENDING},
}


@dataclass(slots=True)
class StartWorker:
    number: int


@dataclass(slots=True)
class Assign:
    number: int
    call: Call


@dataclass(slots=True)
class Withdraw:
    """Take back from worker `number` what it has not begun; `withdrawn` says what that was."""

    number: int


@dataclass(slots=True)
class Kill:
    """End worker `number`; why is in the outcome that was concluded before.

    What it has not begun is taken back first, as by `Withdraw`.
    """

    number: int


@dataclass(slots=True)
class Conclude:
    """`call` is over; `number` is the worker it ran on, None if it never ran."""

    call: Call
    outcome: Outcome
    number: int | None


Command = StartWorker | Assign | Withdraw | Kill | Conclude


class _Worker:
    __slots__ = ("began_at", "calls", "is_stuck", "number", "served", "state", "until")

    def __init__(self, number: int, until: float) -> None:
        self.number = number
        self.state = State.STARTING
        self.calls: deque[Call] = deque()
        """The first runs; the others follow in this order."""
        self.began_at: float | None = None
        """When the call that runs, or ran last, began; None if there never was one."""
        self.is_stuck = False
        """Whether those behind the call that runs were asked back."""
        self.served = 0
        self.until: float | None = until
        """When the present state has lasted too long; None if it may last."""

    def move(self, event: Event, until: float | None = None) -> None:
        self.state = NEXT_STATE[self.state][event]
        self.until = until


class Pool:
    """Calls of one toolkit, waiting and at work, and its workers."""

    def __init__(
        self,
        limits: Limits,
        lifetime: Lifetime,
        *,
        toolkit: str = "",
        total: Shares | None = None,
    ) -> None:
        """`total`: what may wait of all toolkits, of which this is `toolkit`; None: of this one."""
        self._limits = limits
        self._start_s = START_S
        if lifetime.kind is LifetimeKind.JAIL:
            self._start_s += limits.import_time_s
        self._calls_per_worker = lifetime.calls if lifetime.kind is LifetimeKind.CALLS else 1
        ahead = 1 if lifetime.kind is LifetimeKind.JAIL else MAX_AHEAD
        self._ahead = min(ahead, limits.concurrency)
        self._workers: dict[int, _Worker] = {}
        self._ready: deque[_Worker] = deque()
        self._shares = Shares(OWN_QUEUE, limits.queue, limits.queue_bytes)
        if total is None:
            total = Shares(TOTAL_QUEUE, limits.queue, limits.queue_bytes)
        self._waiting = WaitingCalls(self._shares, total, toolkit)
        self._running: dict[int, _Worker] = {}
        """Those that have calls."""
        self._ending = 0
        """How many of the workers are."""
        self._next_number = 1
        self._is_supplied = False
        self._refusal: Failure | None = None
        self._retry_s = _FIRST_RETRY_S
        self._resume_at: float | None = None
        self._mean_run_s = 0.1
        self._is_handed_singly = self._calls_per_worker == 1
        self._most_handed = 1.0
        self._filling: _Worker | None = None
        """The one that is being given calls."""

    # -- what the shell may ask --------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def running_workers(self) -> Iterator[tuple[int, Call]]:
        """Worker number and call of all that run."""
        for number, worker in self._running.items():
            yield number, worker.calls[0]

    def call_of(self, number: int) -> Call | None:
        """The call that runs on worker `number`."""
        worker = self._workers.get(number)
        return worker.calls[0] if worker and worker.calls else None

    def calls_of(self, number: int) -> list[Call]:
        """The calls that worker `number` has; the first runs."""
        worker = self._workers.get(number)
        return list(worker.calls) if worker else []

    def next_deadline(self) -> float | None:
        """When `tick` has something to do."""
        moments = [w.until for w in self._workers.values() if w.until is not None]
        for worker in self._running.values():
            moments += [call.deadline for call in worker.calls]
            if len(worker.calls) > 1 and not worker.is_stuck:
                moments.append(_since(worker) + STUCK_S)
        if self._waiting.next_deadline is not None:
            moments.append(self._waiting.next_deadline)
        if self._resume_at is not None:
            moments.append(self._resume_at)
        return min(moments, default=None)

    def divide(self, tools: int) -> None:
        """Share the queue out among so many tools, at least one."""
        self._shares.divide(tools)

    # -- events ------------------------------------------------------------------------------------

    def submit(self, call: Call, now: float) -> list[Command]:
        """A call has come."""
        if self._refusal is not None:
            return [Conclude(call, self._refusal, None)]
        commands = self._expire(now)
        if call.deadline <= now:
            failure = verdict.timed_out(self._limits, was_running=False)
            return [*commands, Conclude(call, failure, None)]
        worker = None if self._waiting else self._free_worker()
        if worker is not None:
            commands.append(self._assign(worker, call, now))
            return commands + self._start_missing(now)
        limit = self._waiting.missing(call)
        if limit is not None:
            return [*commands, Conclude(call, self._overloaded(limit), None)]
        self._waiting.add(call)
        return commands + self._start_missing(now)

    def supply_up(self, now: float) -> list[Command]:
        """Workers can be started from now on."""
        self._is_supplied = True
        return self._dispatch(now)

    def supply_lost(
        self, reason: str, now: float, unbegun: Mapping[int, int] = MappingProxyType({})
    ) -> list[Command]:
        """All workers are gone with what they came from; calls that wait go on waiting.

        `unbegun`: how many of the last calls of each worker had not begun.
        """
        self._is_supplied = False
        commands: list[Command] = []
        for number, count in unbegun.items():
            commands += self._put_back(number, count)
        for worker in list(self._workers.values()):
            commands += self._conclude_all(worker, verdict.jail_lost(reason), now)
        self._workers.clear()
        self._ready.clear()
        self._ending = 0
        return commands

    def refuse(self, failure: Failure | None) -> list[Command]:
        """Answer new calls and those that wait with `failure`; None takes calls again."""
        self._refusal = failure
        return [] if failure is None else self.dismiss(failure)

    def dismiss(self, failure: Failure) -> list[Command]:
        """Answer those that wait with `failure`."""
        commands: list[Command] = []
        while self._waiting:
            commands.append(Conclude(self._waiting.take_next(), failure, None))
        return commands

    def interrupt(self, now: float) -> list[Command]:
        """End what runs: the server cannot wait for it."""
        commands: list[Command] = []
        for worker in list(self._running.values()):
            commands += self._conclude_all(worker, verdict.interrupted(), now)
            commands += self._kill(worker, now)
        return commands

    def withdrawn(self, number: int, count: int, now: float) -> list[Command]:
        """Worker `number` has not begun the last `count` of its calls, and never will."""
        return self._put_back(number, count) + self._dispatch(now)

    def refused(self, number: int, call: Call, failure: Failure, now: float) -> list[Command]:
        """`call` was assigned to worker `number` and may not be handed to it."""
        worker = self._workers.get(number)
        if worker is None or call not in worker.calls:
            return []
        worker.calls.remove(call)
        self._note_if_free(worker)
        return [Conclude(call, failure, None), *self._dispatch(now)]

    def hand_singly(self) -> None:
        """From now on a worker gets a call only when it has none."""
        self._is_handed_singly = True
        self._most_handed = 1.0

    def worker_ready(self, number: int, now: float) -> list[Command]:
        """The worker's first word."""
        worker = self._workers.get(number)
        if worker is None or worker.state is not State.STARTING:
            return []
        worker.move(Event.SPOKE)
        self._ready.append(worker)
        return self._dispatch(now)

    def handed(self, number: int, now: float) -> None:
        """A call that was assigned to the worker goes out to it."""
        worker = self._workers.get(number)
        if worker is not None and len(worker.calls) == 1:
            worker.began_at = now

    def worker_answered(
        self, number: int, outcome: Outcome, now: float, came_at: float | None = None
    ) -> list[Command]:
        """One well-formed answer to the call that the worker has; it came at `came_at`, if not now.

        What a call takes is known better so while we are busier than the workers.
        """
        worker = self._workers.get(number)
        if worker is None or worker.state is not State.BUSY:
            return []
        worker.served += 1
        commands = self._conclude(worker, outcome, now if came_at is None else came_at)
        if len(worker.calls) > self._most_handed / 2 and worker.served < self._calls_per_worker:
            return commands  # no room has come up
        if worker.served >= self._calls_per_worker:
            self._ending += 1
            worker.move(Event.ANSWERED_LAST, now + END_S)
        elif not worker.calls:
            worker.move(Event.ANSWERED)
            self._ready.append(worker)
        return commands + self._dispatch(now)

    def stop_worker(self, number: int, failure: Failure, now: float) -> list[Command]:
        """The worker hit a limit or broke a rule: its call ends with `failure`, and it ends."""
        worker = self._workers.get(number)
        if worker is None or worker.state is State.ENDING:
            return []
        commands = self._conclude(worker, failure, now)
        return commands + self._kill(worker, now) + self._dispatch(now)

    def worker_hung_up(self, number: int, now: float) -> list[Command]:
        """The worker's channel ended; its exit tells more, if it comes soon."""
        worker = self._workers.get(number)
        if worker is None or worker.state is State.ENDING:
            return []
        if worker.state is State.READY:  # no call can reach it, and there is none to explain
            return self._kill(worker, now) + self._dispatch(now)
        worker.until = now + HUNG_UP_S
        return []

    def worker_exited(
        self, number: int, failure: Failure, now: float, unbegun: int = 0
    ) -> list[Command]:
        """The worker's process is gone for good; `failure` is for a call that it still had.

        The last `unbegun` of its calls wait again.
        """
        commands = self._put_back(number, unbegun)
        worker = self._workers.pop(number, None)
        if worker is None:
            return []
        commands += self._conclude_all(worker, failure, now)
        if worker.state is State.READY:
            self._ready.remove(worker)
        if worker.state is State.ENDING:
            self._ending -= 1
        else:
            self._note_end(worker, now)
        return commands + self._dispatch(now)

    def tick(self, now: float) -> list[Command]:
        """Time has passed."""
        commands: list[Command] = []
        for worker in list(self._workers.values()):
            if worker.calls and worker.calls[0].deadline <= now:
                failure = verdict.timed_out(self._limits, was_running=True)
                commands += self._conclude(worker, failure, now)
                commands += self._kill(worker, now)
            elif worker.until is not None and worker.until <= now:
                commands += self._conclude(worker, verdict.broke_rules(), now)
                commands += self._kill(worker, now)
            elif len(worker.calls) > 1:
                commands += self._look_behind(worker, now)
        if self._resume_at is not None and self._resume_at <= now:
            self._resume_at = None
        return commands + self._dispatch(now)

    # -- within ------------------------------------------------------------------------------------

    def _free_worker(self) -> _Worker | None:
        """One that can be given a call now."""
        is_ready = bool(self._ready) and len(self._running) < self._limits.concurrency
        if self._most_handed >= 2 and not (is_ready and self._mean_run_s > PACK_S):
            for worker in self._running.values():
                if self._has_room(worker):
                    self._filling = worker
                    return worker
        if not is_ready:
            return None
        # The one that served last has everything at hand; of those that never served, the oldest.
        return self._ready[-1] if self._calls_per_worker > 1 else self._ready[0]

    def _has_room(self, worker: _Worker) -> bool:
        """Whether a busy worker can be handed another call, in batches while it has some left."""
        has = len(worker.calls)
        return (
            has < self._most_handed
            and (has <= self._most_handed / 2 or worker is self._filling)
            and worker.served + has < self._calls_per_worker
            and worker.state is State.BUSY
            and not worker.is_stuck
        )

    def _expire(self, now: float) -> list[Command]:
        expired = self._waiting.take_expired(now)
        if not expired:
            return []
        failure = verdict.timed_out(self._limits, was_running=False)
        return [Conclude(call, failure, None) for call in expired]

    def _dispatch(self, now: float) -> list[Command]:
        commands = self._expire(now)
        self._filling = None
        while self._waiting and (worker := self._free_worker()) is not None:
            commands.append(self._assign(worker, self._waiting.take_next(), now))
        return commands + self._start_missing(now)

    def _assign(self, worker: _Worker, call: Call, now: float) -> Command:
        worker.calls.append(call)
        if worker.state is State.READY:
            self._ready.remove(worker)
            worker.began_at = now
            worker.move(Event.ASSIGNED)
            self._retry_s = _FIRST_RETRY_S
            self._running[worker.number] = worker
        return Assign(worker.number, call)

    def _start_missing(self, now: float) -> list[Command]:
        commands: list[Command] = []
        if self._is_supplied and self._resume_at is None:
            for _ in range(self._missing_workers()):
                worker = _Worker(self._next_number, now + self._start_s)
                self._next_number += 1
                self._workers[worker.number] = worker
                commands.append(StartWorker(worker.number))
        return commands

    def _overloaded(self, limit: Limit) -> Failure:
        rounds = (len(self._waiting) + 1) / self._limits.concurrency
        retry_after_s = min(60.0, max(0.1, rounds * self._mean_run_s))
        return verdict.overloaded(limit, retry_after_s)

    def _missing_workers(self) -> int:
        """How many to start: enough for all that wait and some ahead, within the limit."""
        live = len(self._workers) - self._ending
        room = self._limits.concurrency + self._ahead - live
        if room <= 0 or self._refusal is not None:
            return 0
        spare = live - len(self._running)
        wanted = self._ahead + math.ceil(len(self._waiting) / self._most_handed) - spare
        # Those that are ending still hold a scratch slot.
        slots = 2 * self._limits.concurrency + self._ahead - len(self._workers)
        return max(0, min(wanted, room, slots))

    def _conclude(self, worker: _Worker, outcome: Outcome, now: float) -> list[Command]:
        """The call that runs is over, and the next one has begun."""
        if not worker.calls:
            return []
        call = worker.calls.popleft()
        if not worker.calls:
            del self._running[worker.number]
        self._note_run(now - _since(worker))
        worker.began_at, worker.is_stuck = now, False
        return [Conclude(call, outcome, worker.number)]

    def _look_behind(self, worker: _Worker, now: float) -> list[Command]:
        """Ask back those behind the call that runs, once: when it takes long, or they expire."""
        is_due = any(call.deadline <= now for call in worker.calls)
        if not worker.is_stuck:
            is_slow = _since(worker) + STUCK_S <= now
            if is_slow:
                self._note_run(now - _since(worker))
            if is_slow or is_due:
                worker.is_stuck = True
                return [Withdraw(worker.number)]
        elif is_due:
            # It took one that it does not come to: no worker of ours does.
            return [*self._conclude(worker, verdict.broke_rules(), now), *self._kill(worker, now)]
        return []

    def _note_run(self, seconds: float) -> None:
        self._mean_run_s += (max(0.0, seconds) - self._mean_run_s) / 16
        if self._is_handed_singly:
            return
        if seconds > STUCK_S:
            self._most_handed = max(1.0, self._most_handed / 2)
        elif self._most_handed < MAX_HANDED:
            self._most_handed += 1 / 8

    def _put_back(self, number: int, count: int) -> list[Command]:
        """The last `count` calls of a worker have not begun, and it will not begin them."""
        worker = self._workers.get(number)
        if worker is None or not worker.calls:
            return []
        for _ in range(min(count, len(worker.calls))):
            self._waiting.put_back(worker.calls.pop())
        self._note_if_free(worker)
        return [] if self._refusal is None else self.dismiss(self._refusal)

    def _note_if_free(self, worker: _Worker) -> None:
        if not worker.calls:
            del self._running[worker.number]
            if worker.state is State.BUSY:
                worker.move(Event.WITHDRAWN)
                self._ready.append(worker)

    def _conclude_all(self, worker: _Worker, outcome: Outcome, now: float) -> list[Command]:
        commands: list[Command] = []
        while worker.calls:
            commands += self._conclude(worker, outcome, now)
        return commands

    def _kill(self, worker: _Worker, now: float) -> list[Command]:
        if worker.state is State.READY:
            self._ready.remove(worker)
        if worker.state is not State.ENDING:
            self._ending += 1
            self._note_end(worker, now)
        worker.move(Event.KILLED, now + END_S)
        return [Kill(worker.number)]

    def _note_end(self, worker: _Worker, now: float) -> None:
        """Failing to start is not crashing: wait, so as not to spin, and try again."""
        if worker.began_at is None:
            self._resume_at = now + self._retry_s
            self._retry_s = min(MAX_RETRY_S, self._retry_s * 2)


def _since(worker: _Worker) -> float:
    assert worker.began_at is not None
    return worker.began_at


UNAVAILABLE_STOPPED = Failure(Kind.UNAVAILABLE, "The toolkit stopped serving.")
UNAVAILABLE_DRAINING = Failure(Kind.UNAVAILABLE, "This server is shutting down.")
