"""Calls that are handed to a worker ahead: each begins once at most, and none waits for a slow one.

A worker of `calls:N` counts the calls that it began. So what began without being answered leaves a
gap between two answers of the same process.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest
from conftest import NodeMaker, ServedNode, Ticket, toolkit_text

from atp_sandbox.jails.permits import Permits
from atp_sandbox.outcome import Failure, Kind
from atp_sandbox.scheduling.pool import MAX_HANDED
from workers.frames import CALL_ID_BYTES

BODY = """
    import os, time

    begun = [0]

    @tool
    def quick(**_):
        begun[0] += 1
        return [os.getpid(), begun[0]]

    @tool
    def slow(seconds, **_):
        begun[0] += 1
        time.sleep(seconds)
        return [os.getpid(), begun[0]]

    @tool
    def fail(**_):
        begun[0] += 1
        raise ValueError("on purpose")

    @tool
    def large(**_):
        begun[0] += 1
        return "x" * 3_000_000

    @tool
    def crash(**_):
        os._exit(3)

    @tool
    def say(**_):
        begun[0] += 1
        print("said by", begun[0])
        return [os.getpid(), begun[0]]

    @tool
    def steal(and_crash, **_):
        stolen = []
        for fd in range(200, 210):
            try:
                os.set_blocking(fd, False)
                stolen.append(os.read(fd, 65536))
            except OSError:
                pass
        if and_crash:
            os._exit(3)
        return [len(data) for data in stolen]
"""


def ready_to_hand_ahead(make_node: NodeMaker, **settings: object) -> ServedNode:
    """A node whose calls have all been short so far."""
    node = make_node(toolkit_text(BODY), lifetime="calls:1000", **{"concurrency": 2, **settings})
    assert node.call("quick").value
    now_short(node)
    return node


def now_short(node: ServedNode) -> None:
    assert node.toolkit is not None
    pool = node.toolkit._pool
    pool._most_handed, pool._mean_run_s = float(MAX_HANDED), 0.0001


def most_handed(node: ServedNode) -> int:
    assert node.toolkit is not None
    pool = node.toolkit._pool
    return max((len(pool.calls_of(number)) for number, _ in pool.running_workers()), default=0)


def assert_each_began_once(tickets: list[Ticket]) -> None:
    """Of these quick calls, and what their processes began besides must be among them too."""
    by_process: dict[int, list[int]] = {}
    for ticket in tickets:
        pid, number = ticket.value
        by_process.setdefault(pid, []).append(number)
    for numbers in by_process.values():
        numbers.sort()
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_short_calls_are_handed_ahead_and_answered_in_order(make_node: NodeMaker) -> None:
    node = ready_to_hand_ahead(make_node)
    tickets = [node.submit("quick") for _ in range(40)]
    assert most_handed(node) > 1
    node.finish(*tickets)
    assert_each_began_once(tickets)


def test_calls_behind_a_slow_one_are_taken_back_and_run_elsewhere(make_node: NodeMaker) -> None:
    node = ready_to_hand_ahead(make_node, time_s=60)
    slow = node.submit("slow", {"seconds": 20})
    behind = [node.submit("quick") for _ in range(10)]
    assert most_handed(node) > 1
    node.finish(*behind, timeout_s=10)
    assert not slow.outcomes
    node.finish(slow)
    (slow_pid, began) = slow.value
    assert slow_pid not in [ticket.value[0] for ticket in behind]
    assert_each_began_once(behind)
    # The slow one's process finds the frames that were taken back, and begins none of them.
    while (row := node.call("quick").value)[0] != slow_pid:
        assert_each_began_once(behind)
    assert row[1] == began + 1


def test_calls_behind_one_that_times_out_are_answered(make_node: NodeMaker) -> None:
    node = ready_to_hand_ahead(make_node, time_s=3, concurrency=1)
    slow = node.submit("slow", {"seconds": 60})
    behind = [node.submit("quick") for _ in range(5)]
    node.finish(slow, *behind)
    assert slow.failure.kind is Kind.TIMEOUT
    # One worker at a time: those behind it waited in the queue, and none of them ran to its end.
    assert {ticket.failure.kind for ticket in behind} == {Kind.TIMEOUT}
    assert all("waited in the queue" in ticket.failure.error for ticket in behind)


@pytest.mark.parametrize("how", ["crash", "fail", "large"])
def test_a_call_that_fails_costs_those_behind_it_nothing(make_node: NodeMaker, how: str) -> None:
    node = ready_to_hand_ahead(make_node, concurrency=1)
    tickets: list[Ticket] = []
    failing: list[Ticket] = []
    for _ in range(5):
        tickets += [node.submit("quick") for _ in range(3)]
        failing.append(node.submit(how))
        now_short(node)
    tickets += [node.submit("quick") for _ in range(3)]
    assert most_handed(node) > 4
    node.finish(*tickets, *failing)
    kind = {"crash": Kind.CRASHED, "fail": Kind.TOOL_ERROR, "large": Kind.OUTPUT_LIMIT}[how]
    assert [ticket.failure.kind for ticket in failing] == [kind] * 5
    if how == "crash":  # known by its exit, though it left calls unread
        assert [ticket.failure.details for ticket in failing] == [{"exit_status": 3}] * 5
    assert all(len(ticket.outcomes) == 1 for ticket in tickets)
    if how != "fail":  # a failing call begins too
        assert_each_began_once(tickets)


@pytest.mark.parametrize("and_crash", [True, False])
def test_a_tool_that_takes_the_calls_behind_it_harms_only_those_of_its_process(
    make_node: NodeMaker, and_crash: bool
) -> None:
    node = ready_to_hand_ahead(make_node, time_s=5, concurrency=1)
    thief = node.submit("steal", {"and_crash": and_crash})
    behind = [node.submit("quick") for _ in range(5)]
    node.finish(thief, *behind)
    kinds = {ticket.failure.kind for ticket in behind if isinstance(ticket.outcome, Failure)}
    assert kinds <= {Kind.CRASHED, Kind.TIMEOUT}
    assert all(len(ticket.outcomes) == 1 for ticket in (thief, *behind))
    assert node.call("quick").value


def test_what_a_tool_prints_is_told_of_its_own_call_once_it_is_known_to_print(
    make_node: NodeMaker,
) -> None:
    node = ready_to_hand_ahead(make_node, concurrency=1)
    assert node.call("say").printed
    tickets = [node.submit("say") for _ in range(10)]
    assert most_handed(node) == 1
    node.finish(*tickets)
    for ticket in tickets:
        assert ticket.printed == f"said by {ticket.value[1]}\n"


def test_calls_behind_one_whose_jail_ends_wait_for_the_next_jail(make_node: NodeMaker) -> None:
    node = ready_to_hand_ahead(make_node, time_s=60)
    slow = node.submit("slow", {"seconds": 1})
    behind = [node.submit("quick") for _ in range(5)]
    assert node.toolkit is not None
    assert node.toolkit._main is not None
    node.loop.run_once(0)  # handed over, and nothing was taken back yet
    node.toolkit._main.end("on purpose")
    node.finish(slow, *behind)
    if isinstance(slow.outcome, Failure):  # it had begun
        assert slow.failure.kind is Kind.CRASHED
    assert all(ticket.value[1] for ticket in behind)


# -- permits alone ---------------------------------------------------------------------------------

IDS = [bytes([n]) * CALL_ID_BYTES for n in range(4)]


@pytest.fixture
def permits() -> Iterator[Permits]:
    permits = Permits()
    yield permits
    os.close(permits.for_worker)
    permits.close()


def test_a_permit_is_given_to_one_side_alone(permits: Permits) -> None:
    permits.grant(IDS)
    assert os.read(permits.for_worker, CALL_ID_BYTES) == IDS[0]
    assert permits.take_back(IDS) == 3
    assert permits.take_back(IDS[:1]) == 0
    with pytest.raises(BlockingIOError):
        os.read(permits.for_worker, CALL_ID_BYTES)


@pytest.mark.parametrize(
    "forged", [b"x", bytes(CALL_ID_BYTES), IDS[0] + IDS[2], IDS[3] + IDS[2], IDS[3] + b"x"]
)
def test_permits_that_were_tampered_with_say_nothing(permits: Permits, forged: bytes) -> None:
    os.write(permits._writer, forged)
    assert permits.take_back(IDS) == 0


def test_permits_are_not_waited_for_when_their_pipe_is_full(permits: Permits) -> None:
    room = fcntl.fcntl(permits._writer, fcntl.F_GETPIPE_SZ)
    assert os.write(permits._writer, bytes(room)) == room
    permits.grant(IDS)
    assert permits.take_back(IDS) == 0
