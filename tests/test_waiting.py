"""Whose turn it is among calls that wait: none lost, none twice, none passed over for long."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atp_sandbox.scheduling.shares import Shares
from atp_sandbox.scheduling.waiting import Call, WaitingCalls

TIME_S = 5.0
TOOLS = ["a", "b", "c", "d"]


def waiting_calls(calls: int = 1_000) -> WaitingCalls:
    return WaitingCalls(Shares("own", calls, 1_000), Shares("total", calls, 1_000), "kit")


def call_at(now: float, tool: str, payload: object = None) -> Call:
    return Call(payload, tool=tool, received_at=now, deadline=now + TIME_S, size_bytes=1)


@pytest.mark.parametrize(
    ("came", "served"),
    [
        ("aaa", "aaa"),
        ("aaaab", "abaaa"),
        ("aabbcc", "abcabc"),
        ("caaab", "cabaa"),
    ],
)
def test_tools_take_turns(came: str, served: str) -> None:
    waiting = waiting_calls()
    for tool in came:
        waiting.add(call_at(0, tool))
    assert "".join(waiting.take_next().tool for _ in came) == served


def test_the_first_deadline_of_any_tool_is_the_next() -> None:
    waiting = waiting_calls()
    assert waiting.next_deadline is None
    for now, tool in ((1, "a"), (2, "b"), (3, "a")):
        waiting.add(call_at(now, tool))
    assert waiting.next_deadline == 1 + TIME_S
    assert [c.received_at for c in waiting.take_expired(1 + TIME_S)] == [1]
    assert waiting.next_deadline == 2 + TIME_S
    assert [c.received_at for c in waiting.take_expired(9 + TIME_S)] == [2, 3]
    assert waiting.next_deadline is None
    assert len(waiting) == 0


class WaitingMachine(RuleBasedStateMachine):
    """Calls come, are served and run out of time, in any order."""

    @initialize(bound=st.integers(0, 12))
    def build(self, bound: int) -> None:
        self.bound = bound
        self.waiting = waiting_calls(bound)
        self.numbers = itertools.count()
        self.now = 0.0
        self.open: dict[str, list[Call]] = {tool: [] for tool in TOOLS}
        self.passed_over: dict[str, Counter[str]] = {tool: Counter() for tool in TOOLS}
        """For each tool: whose calls were served since one of it waits and had its last turn."""

    @rule(tool=st.sampled_from(TOOLS))
    def add(self, tool: str) -> None:
        call = call_at(self.now, tool, next(self.numbers))
        if self.waiting.missing(call) is None:
            self.waiting.add(call)
            self.open[tool].append(call)
        else:
            assert len(self.waiting) == self.bound

    @precondition(lambda self: any(self.open.values()))
    @rule()
    def take_next(self) -> None:
        call = self.waiting.take_next()
        assert self.open[call.tool].pop(0) is call
        self.passed_over[call.tool].clear()
        for tool, passed in self.passed_over.items():
            if self.open[tool] and tool != call.tool:
                passed[call.tool] += 1
                assert passed[call.tool] <= 1, f"{call.tool} had two turns while {tool} waited"
            if not self.open[tool]:
                passed.clear()

    @rule(seconds=st.sampled_from([0.0, 1.0, 2.0, TIME_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for call in self.waiting.take_expired(self.now):
            assert self.open[call.tool].pop(0) is call
            assert call.deadline <= self.now
            if not self.open[call.tool]:
                self.passed_over[call.tool].clear()
        left = [call.deadline for calls in self.open.values() for call in calls]
        assert all(deadline > self.now for deadline in left)

    @invariant()
    def no_deadline_comes_unnoticed(self) -> None:
        left = [call.deadline for calls in self.open.values() for call in calls]
        assert len(self.waiting) == len(left) <= self.bound
        when = self.waiting.next_deadline
        assert (when is None) == (not left)
        assert when is None or when <= min(left)


TestWaitingMachine = WaitingMachine.TestCase
TestWaitingMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
