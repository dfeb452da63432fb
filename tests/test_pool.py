"""The pool against a model of its workers: every call ends once, whatever happens and when."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atp_sandbox.confinement.plan import slot_count
from atp_sandbox.limits import Limits
from atp_sandbox.outcome import Failure, Kind, Limit, Success
from atp_sandbox.scheduling.pool import (
    END_S,
    HUNG_UP_S,
    MAX_AHEAD,
    MAX_HANDED,
    MAX_RETRY_S,
    NEXT_STATE,
    START_S,
    Assign,
    Call,
    Command,
    Conclude,
    Event,
    Kill,
    Pool,
    StartWorker,
    State,
    Withdraw,
)
from atp_sandbox.scheduling.shares import TOTAL_QUEUE, Shares
from atp_sandbox.settings import parse_lifetime

TIME_S = 5.0
TOOLS = ["a", "b", "c"]
DONE = Success("1")
STOPPED = Failure(Kind.UNAVAILABLE, "stopped")
TOO_BIG = Failure(Kind.MEMORY_LIMIT, "too big")
GONE = Failure(Kind.CRASHED, "gone")


def limits_of(**given: Any) -> Limits:
    return Limits(**{"time_s": TIME_S, "concurrency": 2, "queue": 3, **given})


def kinds(commands: list[Command]) -> list[str | None]:
    """The failure kinds of what was concluded, in order; None is a success."""
    outcomes = [c.outcome for c in commands if isinstance(c, Conclude)]
    return [o.kind.value if isinstance(o, Failure) else None for o in outcomes]


def numbers(commands: list[Command], kind: type[StartWorker | Assign | Kill]) -> list[int]:
    return [c.number for c in commands if isinstance(c, kind)]


class PoolMachine(RuleBasedStateMachine):
    """Drives a pool as its shell does, and remembers what it was told to do."""

    @initialize(
        concurrency=st.integers(1, 4),
        queue=st.integers(0, 4),
        queue_bytes=st.integers(0, 30),
        lifetime=st.sampled_from(["call", "calls:2", "calls:3", "calls:40", "jail"]),
        total_queue=st.integers(0, 4),
        most_handed=st.sampled_from([1.0, 2.0, float(MAX_HANDED)]),
        begun=st.integers(0, 2),
    )
    def build(
        self,
        concurrency: int,
        queue: int,
        queue_bytes: int,
        lifetime: str,
        total_queue: int,
        most_handed: float,
        begun: int,
    ) -> None:
        """`begun`: how many calls a worker has begun by the time that it is to give others back."""
        self.limits = limits_of(concurrency=concurrency, queue=queue, queue_bytes=queue_bytes)
        self.total_queue = total_queue
        total = Shares(TOTAL_QUEUE, total_queue, queue_bytes)
        self.pool = Pool(self.limits, parse_lifetime(lifetime), toolkit="kit", total=total)
        self.pool.divide(len(TOOLS))
        self.calls_per_worker = self.pool._calls_per_worker
        self.now = 100.0
        self.open: list[Call] = []
        self.running: dict[int, list[Call]] = {}
        """The calls of each busy worker; the first runs."""
        self.workers: dict[int, str] = {}
        self.used: dict[int, int] = {}
        """How many calls each worker was given and did not give back."""
        self.is_supplied = False
        self.is_refused = False
        self.begun = begun
        self.put_back = 0
        """Calls that waited again: the queue may be fuller by so many."""
        self.pool._most_handed = most_handed if self.calls_per_worker > 1 else 1.0
        self.supply_up()

    def obey(self, commands: list[Command], caused_by: int | None = None) -> None:
        for command in commands:
            match command:
                case StartWorker(number):
                    assert self.is_supplied
                    assert number not in self.used, "a number was used again"
                    self.workers[number] = "starting"
                    self.used[number] = 0
                case Assign(number, call):
                    has = self.running.setdefault(number, [])
                    assert self.workers[number] == ("busy" if has else "ready")
                    assert len(has) < MAX_HANDED
                    assert self.used[number] < self.calls_per_worker
                    assert call in self.open
                    assert call not in self.assigned
                    assert self.now < call.deadline
                    self.workers[number] = "busy"
                    self.used[number] += 1
                    has.append(call)
                case Withdraw(number):
                    assert len(self.running[number]) > 1
                    self.withdraw(number, self.begun)
                case Kill(number):
                    assert self.workers[number] != "gone"
                    self.workers[number] = "ending"
                    if number in self.running:  # the one that ran was concluded first
                        self.withdraw(number, 0)
                case Conclude(call, _outcome, number):
                    self.open.remove(call)  # raises if it was concluded before
                    assert (number is None) == (call not in self.assigned)
                    if number is not None:
                        assert self.running[number].pop(0) is call
                        if not self.running[number]:
                            del self.running[number]
                        if number != caused_by:
                            self.workers[number] = "ending"
        assert len(self.running) <= self.limits.concurrency
        assert sum(1 for state in self.workers.values() if state != "gone") < slot_count(
            self.limits
        )

    @property
    def assigned(self) -> list[Call]:
        return [call for calls in self.running.values() for call in calls]

    def withdraw(self, number: int, begun: int) -> None:
        """Worker `number` gives back all calls but the first `begun`."""
        count = len(self.running[number]) - begun
        del self.running[number][begun:]
        self.used[number] -= count
        if not self.running[number]:
            del self.running[number]
            if self.workers[number] == "busy":
                self.workers[number] = "ready"
        self.put_back += count
        self.obey(self.pool.withdrawn(number, count, self.now))

    def some(self, index: int, *states: str) -> int | None:
        found = [n for n, state in self.workers.items() if state in states]
        return found[index % len(found)] if found else None

    @rule(tool=st.sampled_from(TOOLS), size=st.integers(0, 20))
    def submit(self, tool: str, size: int) -> None:
        deadline = self.now + TIME_S
        call = Call(None, tool=tool, received_at=self.now, deadline=deadline, size_bytes=size)
        self.open.append(call)
        self.obey(self.pool.submit(call, self.now))

    @rule()
    def supply_up(self) -> None:
        self.is_supplied = True
        self.obey(self.pool.supply_up(self.now))

    @rule()
    def supply_lost(self) -> None:
        self.is_supplied = False
        waiting = self.pool.waiting
        unbegun = {number: max(0, len(calls) - 1) for number, calls in self.running.items()}
        for number, count in unbegun.items():
            del self.running[number][len(self.running[number]) - count :]
        self.put_back += sum(unbegun.values())
        commands = self.pool.supply_lost("it fell", self.now, unbegun)
        self.obey(commands)
        assert self.running == {}
        assert self.pool.waiting == (0 if self.is_refused else waiting + sum(unbegun.values()))
        self.workers = dict.fromkeys(self.workers, "gone")

    @rule()
    def refuse(self) -> None:
        self.obey(self.pool.refuse(STOPPED))
        self.is_refused = True
        assert self.pool.waiting == 0

    @rule()
    def take_again(self) -> None:
        self.obey(self.pool.refuse(None))
        self.is_refused = False

    @rule(index=st.integers(0))
    def ready(self, index: int) -> None:
        number = self.some(index, "starting")
        if number is not None:
            self.workers[number] = "ready"
            self.obey(self.pool.worker_ready(number, self.now))

    @rule(index=st.integers(0))
    def answered(self, index: int) -> None:
        number = self.some(index, "busy")
        if number is not None:
            call, *others = self.running[number]
            if not others:
                is_last = self.used[number] == self.calls_per_worker
                self.workers[number] = "ending" if is_last else "ready"
            commands = self.pool.worker_answered(number, DONE, self.now)
            assert commands[0] == Conclude(call, DONE, number)
            self.obey(commands, caused_by=number)

    @rule(index=st.integers(0))
    def hung_up(self, index: int) -> None:
        number = self.some(index, "starting", "ready", "busy", "ending")
        if number is not None:
            if self.workers[number] == "ready":
                self.workers[number] = "hung up"
            self.obey(self.pool.worker_hung_up(number, self.now))

    @rule(index=st.integers(0))
    def stopped(self, index: int) -> None:
        number = self.some(index, "starting", "ready", "busy", "ending")
        if number is not None:
            self.obey(self.pool.stop_worker(number, TOO_BIG, self.now))
            assert self.workers[number] == "ending"

    @rule(index=st.integers(0))
    def handed(self, index: int) -> None:
        number = self.some(index, "busy")
        if number is not None:
            self.pool.handed(number, self.now)

    @rule(index=st.integers(0), place=st.integers(0))
    def refused(self, index: int, place: int) -> None:
        number = self.some(index, "busy")
        if number is not None:
            calls = self.running[number]
            call = calls.pop(place % len(calls))
            self.used[number] -= 1
            if not calls:
                del self.running[number]
                self.workers[number] = "ready"
            commands = self.pool.refused(number, call, STOPPED, self.now)
            assert commands[0] == Conclude(call, STOPPED, None)
            self.obey(commands)

    @rule(index=st.integers(0))
    def exited(self, index: int) -> None:
        number = self.some(index, "starting", "ready", "busy", "ending", "hung up")
        if number is not None:
            self.workers[number] = "gone"
            unbegun = max(0, len(self.running.get(number, [])) - 1)
            if unbegun:
                del self.running[number][1:]
                self.put_back += unbegun
            commands = self.pool.worker_exited(number, GONE, self.now, unbegun)
            self.obey(commands, caused_by=number)

    @precondition(lambda self: self.used)
    @rule(index=st.integers(0))
    def word_of_a_worker_that_is_gone(self, index: int) -> None:
        gone = [n for n, state in self.workers.items() if state == "gone"] + [99_999]
        number = gone[index % len(gone)]
        for commands in (
            self.pool.worker_ready(number, self.now),
            self.pool.worker_answered(number, DONE, self.now),
            self.pool.worker_hung_up(number, self.now),
            self.pool.stop_worker(number, TOO_BIG, self.now),
            self.pool.worker_exited(number, GONE, self.now),
        ):
            assert commands == []

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.3, 1.0, TIME_S, START_S, 31.0]))
    def time_passes_unnoticed(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def tick(self) -> None:
        self.obey(self.pool.tick(self.now))
        when = self.pool.next_deadline()
        assert when is None or when > self.now
        assert all(call.deadline > self.now for call in self.open)

    @rule()
    def tick_at_next_deadline(self) -> None:
        when = self.pool.next_deadline()
        if when is not None:
            self.now = max(self.now, when)
            self.tick()

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.running == len(self.running)
        assert self.pool.waiting == len(self.open) - len(self.assigned)
        assert self.pool.waiting <= min(self.limits.queue, self.total_queue) + self.put_back
        waiting = [call for call in self.open if call not in self.assigned]
        if not self.put_back:
            assert sum(call.size_bytes for call in waiting) <= self.limits.queue_bytes
        assert self.pool.is_idle == (not self.open)
        assert dict(self.pool.running_workers()) == {n: c[0] for n, c in self.running.items()}
        assert all(self.pool.calls_of(number) == calls for number, calls in self.running.items())

    @invariant()
    def nothing_waits_while_calls_are_refused(self) -> None:
        assert not (self.is_refused and self.pool.waiting)

    @invariant()
    def a_free_worker_and_a_waiting_call_do_not_both_wait(self) -> None:
        has_room = len(self.running) < self.limits.concurrency
        if has_room and "ready" in self.workers.values():
            assert self.pool.waiting == 0

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.now += 2 * TIME_S
            self.obey(self.pool.tick(self.now))
            assert self.open == []
            assert self.pool.is_idle


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


class Shell:
    """A pool with its workers started and ready, for the examples below."""

    def __init__(self, lifetime: str = "call", **given: Any) -> None:
        self.pool = Pool(limits_of(**given), parse_lifetime(lifetime))
        self.sequence = itertools.count()

    def call(self, now: float, tool: str = "a", *, size_bytes: int = 0) -> Call:
        return Call(
            next(self.sequence),
            tool=tool,
            received_at=now,
            deadline=now + TIME_S,
            size_bytes=size_bytes,
        )

    def submit(self, now: float, tool: str = "a", *, size_bytes: int = 0) -> list[Command]:
        return self.pool.submit(self.call(now, tool, size_bytes=size_bytes), now)

    def up(self, now: float) -> list[int]:
        """Supply comes and all workers that it starts say so; their numbers."""
        started = numbers(self.pool.supply_up(now), StartWorker)
        for number in started:
            self.pool.worker_ready(number, now)
        return started


def test_workers_are_started_ahead_of_need_and_one_more_a_call() -> None:
    shell = Shell(concurrency=4)
    assert len(shell.up(0)) == MAX_AHEAD
    commands = shell.submit(0)
    assert len(numbers(commands, Assign)) == len(numbers(commands, StartWorker)) == 1


def test_a_jail_a_call_starts_one_ahead() -> None:
    assert len(Shell("jail", concurrency=4).up(0)) == 1


def test_calls_wait_in_order_until_supply_comes() -> None:
    shell = Shell()
    first, second = shell.call(0), shell.call(0)
    assert shell.pool.submit(first, 0) == shell.pool.submit(second, 0) == []
    workers = numbers(shell.pool.supply_up(1), StartWorker)
    assigned = [c for n in workers for c in shell.pool.worker_ready(n, 1) if isinstance(c, Assign)]
    assert [command.call for command in assigned] == [first, second]


def test_a_full_queue_is_overloaded_and_says_when_to_come_again() -> None:
    shell = Shell(queue=3)
    assert [kinds(shell.submit(0)) for _ in range(4)] == [[], [], [], ["overloaded"]]
    (refused,) = shell.submit(0)
    assert isinstance(refused, Conclude)
    assert isinstance(refused.outcome, Failure)
    assert refused.outcome.retry_after_s is not None
    assert 0.1 <= refused.outcome.retry_after_s <= 60


def test_a_burst_on_one_tool_is_refused_and_another_tools_call_is_not() -> None:
    shell = Shell(queue=8)
    shell.pool.divide(2)
    ends = [kinds(shell.submit(0, "burst")) for _ in range(8)]
    assert ends == [[]] * 6 + [["overloaded"]] * 2
    assert kinds(shell.submit(0, "other")) == kinds(shell.submit(0, "other")) == []
    assert kinds(shell.submit(0, "other")) == ["overloaded"]


def test_a_burst_on_one_toolkit_is_refused_and_another_toolkits_call_is_not() -> None:
    total = Shares(TOTAL_QUEUE, 8, 100)
    total.divide(2)
    limits, lifetime = limits_of(queue=100), parse_lifetime("call")
    pools = [Pool(limits, lifetime, toolkit=name, total=total) for name in ("burst", "other")]
    calls = Shell()
    ends = [kinds(pools[0].submit(calls.call(0), 0)) for _ in range(7)]
    assert ends == [[]] * 6 + [["overloaded"]]
    (refused,) = pools[0].submit(calls.call(0), 0)
    assert isinstance(refused, Conclude)
    assert isinstance(refused.outcome, Failure)
    assert refused.outcome.limit == Limit(TOTAL_QUEUE, 8, "calls")
    assert kinds(pools[1].submit(calls.call(0), 0)) == []
    assert kinds(pools[0].refuse(STOPPED)) == ["unavailable"] * 6  # which makes room again
    assert [kinds(pools[1].submit(calls.call(0), 0)) for _ in range(5)] == [[]] * 5


def test_another_tools_call_comes_next_whatever_waits_of_the_first() -> None:
    shell = Shell("calls:1000", queue=100, concurrency=1)
    (number,) = shell.up(0)
    for _ in range(10):
        shell.submit(0, "burst")
    shell.submit(0, "other")
    served = []
    while not shell.pool.is_idle:
        running = shell.pool.call_of(number)
        assert running is not None
        served.append(running.tool)
        shell.pool.worker_answered(number, DONE, 0)
    assert served == ["burst", "burst", "other"] + ["burst"] * 8


def test_retry_after_grows_with_what_calls_take_and_not_with_what_they_waited() -> None:
    def retry_after_s(run_s: float, wait_s: float) -> float:
        shell = Shell(queue=3, concurrency=1, time_s=1000.0, lifetime="calls:1000")
        shell.up(0)
        now = 0.0
        for _ in range(50):
            call = Call(None, tool="a", received_at=now - wait_s, deadline=now + 1000, size_bytes=0)
            (assign, *_) = shell.pool.submit(call, now)
            assert isinstance(assign, Assign)
            now += run_s
            shell.pool.worker_answered(assign.number, DONE, now)
        outcome = [shell.submit(now)[-1:] for _ in range(5)][-1][0]
        assert isinstance(outcome, Conclude)
        assert isinstance(outcome.outcome, Failure)
        assert outcome.outcome.retry_after_s is not None
        return outcome.outcome.retry_after_s

    assert retry_after_s(2, 0) > 4 * retry_after_s(0.2, 0)
    assert retry_after_s(0.2, 100) == retry_after_s(0.2, 0)


def test_parameters_that_wait_are_bounded_in_bytes() -> None:
    shell = Shell(queue=3, queue_bytes=10)
    assert kinds(shell.submit(0, size_bytes=8)) == []
    assert kinds(shell.submit(0, size_bytes=3)) == ["overloaded"]
    assert kinds(shell.submit(0, size_bytes=2)) == []


def test_without_a_queue_a_call_still_runs_if_a_worker_is_free() -> None:
    shell = Shell(queue=0, queue_bytes=0, concurrency=1)
    shell.up(0)
    assert len(numbers(shell.submit(0, size_bytes=5), Assign)) == 1
    assert kinds(shell.submit(0)) == ["overloaded"]


def test_a_call_that_waited_too_long_times_out_without_a_worker() -> None:
    shell = Shell()
    shell.submit(0)
    assert shell.pool.next_deadline() == TIME_S
    (end,) = shell.pool.tick(TIME_S)
    assert isinstance(end, Conclude)
    assert end.number is None
    assert isinstance(end.outcome, Failure)
    assert end.outcome.kind is Kind.TIMEOUT
    assert "queue" in end.outcome.error


def test_a_call_that_ran_too_long_times_out_and_its_worker_is_killed_afterwards() -> None:
    shell = Shell()
    shell.up(0)
    (number,) = numbers(shell.submit(0), Assign)
    end, kill, *_ = shell.pool.tick(TIME_S)
    assert isinstance(end, Conclude)
    assert end.number == number
    assert isinstance(end.outcome, Failure)
    assert end.outcome.kind is Kind.TIMEOUT
    assert "stopped" in end.outcome.error
    assert kill == Kill(number)


def test_a_call_whose_time_is_over_is_never_handed_to_a_worker() -> None:
    shell = Shell()
    shell.submit(0)
    workers = numbers(shell.pool.supply_up(0), StartWorker)
    commands = shell.pool.worker_ready(workers[0], TIME_S)
    assert kinds(commands) == ["timeout"]
    assert numbers(commands, Assign) == []


def test_a_worker_that_answered_its_last_call_is_replaced() -> None:
    for lifetime, calls in (("call", 1), ("calls:3", 3)):
        shell = Shell(lifetime, concurrency=1)
        (number,) = shell.up(0)
        for served in range(1, calls + 1):
            assert numbers(shell.submit(0), Assign) == [number]
            commands = shell.pool.worker_answered(number, DONE, 0)
            assert kinds(commands) == [None]
            if served < calls:
                assert numbers(commands, StartWorker) == []
        assert numbers(shell.submit(0), Assign) != [number]


def test_a_worker_that_does_not_end_after_its_last_answer_is_killed_until_it_does() -> None:
    shell = Shell(concurrency=1)
    (number,) = shell.up(0)
    shell.submit(0)
    shell.pool.worker_answered(number, DONE, 0)
    assert numbers(shell.pool.tick(END_S), Kill) == [number]
    assert numbers(shell.pool.tick(2 * END_S), Kill) == [number]
    shell.pool.worker_exited(number, GONE, 2 * END_S)
    assert numbers(shell.pool.tick(3 * END_S), Kill) == []


def test_a_worker_that_exits_without_an_answer_ends_its_call_with_what_its_exit_tells() -> None:
    shell = Shell()
    shell.up(0)
    (assign, *_) = shell.submit(0)
    assert isinstance(assign, Assign)
    assert shell.pool.worker_hung_up(assign.number, 0) == []
    (end, *_) = shell.pool.worker_exited(assign.number, GONE, 0)
    assert end == Conclude(assign.call, GONE, assign.number)


def test_a_busy_worker_that_closed_its_channel_and_lives_on_is_killed() -> None:
    shell = Shell()
    shell.up(0)
    (number,) = numbers(shell.submit(0), Assign)
    shell.pool.worker_hung_up(number, 0)
    commands = shell.pool.tick(HUNG_UP_S)
    assert kinds(commands) == ["crashed"]
    assert numbers(commands, Kill) == [number]


def test_no_call_goes_to_a_ready_worker_that_closed_its_channel() -> None:
    shell = Shell(concurrency=1)
    (number,) = shell.up(0)
    assert numbers(shell.pool.worker_hung_up(number, 0), Kill) == [number]
    assert numbers(shell.submit(0), Assign) == []


@pytest.mark.parametrize(
    "failing", ["exits", "closes", "talks", "says nothing", "exits when ready"]
)
def test_after_a_failed_start_the_next_one_waits_longer_each_time(failing: str) -> None:
    shell = Shell(concurrency=1)
    pool, now = shell.pool, 0.0
    (number,) = numbers(pool.supply_up(now), StartWorker)
    waits: list[float] = []
    for _ in range(12):
        commands: list[Command] = []
        match failing:
            case "exits":
                pass
            case "exits when ready":
                commands += pool.worker_ready(number, now)
            case "closes":
                commands += pool.worker_ready(number, now) + pool.worker_hung_up(number, now)
            case "talks":
                commands += pool.stop_worker(number, TOO_BIG, now)
            case "says nothing":
                now += START_S
                commands += pool.tick(now)
                assert numbers(commands, Kill) == [number]
        commands += pool.worker_exited(number, GONE, now)
        assert numbers(commands, StartWorker) == []
        when = pool.next_deadline()
        assert when is not None
        waits.append(when - now)
        now = when
        (number,) = numbers(pool.tick(now), StartWorker)
    assert waits == sorted(waits)
    assert waits[0] == pytest.approx(0.1)
    assert waits[1] == pytest.approx(0.2)
    assert waits[-1] == pytest.approx(MAX_RETRY_S)


def test_a_worker_that_crashed_under_a_call_is_replaced_without_waiting() -> None:
    shell = Shell(concurrency=1)
    shell.up(0)
    (number,) = numbers(shell.submit(0), Assign)
    shell.pool.worker_exited(number, GONE, 0)
    (spare,) = shell.pool._workers
    shell.pool.worker_ready(spare, 0)
    commands = shell.submit(0)
    assert numbers(commands, Assign) == [spare]
    assert len(numbers(commands, StartWorker)) == 1


def test_workers_that_do_not_end_take_the_slots_of_new_ones() -> None:
    limits = limits_of(concurrency=2, queue=100)
    pool = Pool(limits, parse_lifetime("call"))
    started = numbers(pool.supply_up(0), StartWorker)
    for _ in range(50):
        call = Call(None, tool="a", received_at=0, deadline=TIME_S, size_bytes=0)
        started += numbers(pool.submit(call, 0), StartWorker)
    for number in started:  # grows as it is walked
        started += numbers(pool.worker_ready(number, 0), StartWorker)
        started += numbers(pool.worker_answered(number, DONE, 0), StartWorker)
    assert len(started) == 2 * limits.concurrency + MAX_AHEAD < slot_count(limits)
    assert numbers(pool.worker_exited(started[0], GONE, 0), StartWorker) != []


def test_no_call_goes_to_a_worker_that_was_lost_with_its_supply() -> None:
    shell = Shell()
    lost = shell.up(0)
    shell.pool.supply_lost("it fell", 0)
    assert numbers(shell.submit(0), Assign) == []
    assert not set(lost) & set(shell.up(0))


def test_losing_the_supply_ends_what_runs_and_keeps_what_waits() -> None:
    shell = Shell(concurrency=1)
    shell.up(0)
    shell.submit(0)
    shell.submit(0)
    assert kinds(shell.pool.supply_lost("it fell", 0)) == ["crashed"]
    assert (shell.pool.running, shell.pool.waiting) == (0, 1)
    assert shell.up(1)
    assert (shell.pool.running, shell.pool.waiting) == (1, 0)


def test_refusing_empties_the_queue_and_lets_what_runs_go_on() -> None:
    shell = Shell(concurrency=1)
    (number,) = shell.up(0)
    shell.submit(0)
    shell.submit(0)
    assert kinds(shell.pool.refuse(STOPPED)) == ["unavailable"]
    assert kinds(shell.submit(0)) == ["unavailable"]
    assert kinds(shell.pool.worker_answered(number, DONE, 0)) == [None]
    assert shell.pool.is_idle


def test_the_table_of_a_workers_life_has_no_way_back_from_its_end() -> None:
    assert set(NEXT_STATE) == set(State)
    assert set(NEXT_STATE[State.ENDING].values()) == {State.ENDING}
    assert all(Event.KILLED in row for row in NEXT_STATE.values())


def test_a_call_that_expires_behind_another_one_costs_that_one_nothing() -> None:
    shell = Shell("calls:9", concurrency=1)
    shell.up(0)
    shell.pool._most_handed = 4.0
    first, second = shell.call(1.0), shell.call(0.0)
    (assigned,) = [c for c in shell.pool.submit(first, 1.0) if isinstance(c, Assign)]
    shell.pool.submit(second, 1.0)
    shell.pool.handed(assigned.number, TIME_S - 0.001)
    assert shell.pool.calls_of(assigned.number) == [first, second]
    (asked_back,) = shell.pool.tick(TIME_S)
    assert asked_back == Withdraw(assigned.number)
    commands = shell.pool.withdrawn(assigned.number, 1, TIME_S)
    assert [c.call for c in commands if isinstance(c, Conclude)] == [second]
    assert kinds(commands) == ["timeout"]
    assert shell.pool.call_of(assigned.number) is first


def test_a_worker_that_keeps_calls_that_it_does_not_come_to_is_ended() -> None:
    shell = Shell("calls:9", concurrency=1)
    shell.up(0)
    shell.pool._most_handed = 4.0
    first, second = shell.call(1.0), shell.call(0.0)
    (assigned,) = [c for c in shell.pool.submit(first, 1.0) if isinstance(c, Assign)]
    shell.pool.submit(second, 1.0)
    assert shell.pool.tick(TIME_S - 0.1) == [Withdraw(assigned.number)]
    commands = shell.pool.tick(TIME_S)
    assert kinds(commands) == ["crashed"]
    assert numbers(commands, Kill) == [assigned.number]
