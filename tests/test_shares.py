"""A bound shared out: never more than it, and never less than its part for whoever comes."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from atp_sandbox.limits import MIB
from atp_sandbox.outcome import Limit
from atp_sandbox.scheduling.shares import Shares


def shares(calls: int = 1_000, size_bytes: int = 1_000, members: int = 1) -> Shares:
    made = Shares("queue", calls, size_bytes)
    made.divide(members)
    return made


def take_all(bound: Shares, member: str, size_bytes: int = 0) -> int:
    """How many calls of `member` there is room for."""
    taken = 0
    while bound.missing(member, size_bytes) is None:
        bound.take(member, size_bytes)
        taken += 1
    return taken


@pytest.mark.parametrize(
    ("bound", "members", "first", "second"),
    [
        (0, 1, 0, 0),  # nothing waits
        (0, 5, 0, 0),
        (1, 1, 1, 0),  # a single member may have all of it
        (256, 1, 256, 0),
        (255, 1, 255, 0),
        (256, 2, 128 + 64, 64),
        (256, 4, 128 + 32, 32),
        (256, 3, 130 + 42, 42),  # what cannot be shared out is common
        (256, 128, 128 + 1, 1),
        (256, 1_000, 128 + 1, 1),  # more members than parts: the first to come have one each
        (2, 6, 2, 0),
        (4, 6, 3, 1),
    ],
)
def test_a_burst_of_one_member_leaves_the_next_its_part(
    bound: int, members: int, first: int, second: int
) -> None:
    made = shares(calls=bound, members=members)
    assert take_all(made, "first") == first
    assert take_all(made, "second") == second
    same_in_bytes = shares(size_bytes=bound, members=members)
    assert take_all(same_in_bytes, "first", 1) == first
    assert take_all(same_in_bytes, "second", 1) == second


def test_a_part_is_one_call_each_for_as_long_as_its_half_lasts() -> None:
    made = shares(calls=8, members=100)
    assert [take_all(made, str(number)) for number in range(5)] == [5, 1, 1, 1, 0]


def test_a_call_larger_than_a_part_takes_the_rest_from_the_common_half() -> None:
    made = shares(size_bytes=64 * MIB, members=1_000)
    assert made.missing("a", 16 * MIB) is None
    made.take("a", 16 * MIB)
    made.take("b", 16 * MIB)
    assert made.missing("c", 16 * MIB) == Limit("queue", 64 * MIB, "bytes")
    assert made.missing("c", 64 * 512) is None
    made.give_back("a", 16 * MIB)
    assert made.missing("c", 16 * MIB) is None


def test_the_bound_that_was_hit_is_named() -> None:
    made = shares(calls=1, size_bytes=10)
    assert made.missing("a", 11) == Limit("queue", 10, "bytes")
    made.take("a", 1)
    assert made.missing("a", 1) == Limit("queue", 1, "calls")


@pytest.mark.parametrize("calls", [32, 33])
def test_never_more_than_the_bound_waits_while_members_come_and_go(calls: int) -> None:
    made = shares(calls=calls)
    taken = take_all(made, "first")
    for members in (3, 5, 7):
        made.divide(members)
        assert taken + take_all(made, "second") == calls


MEMBERS = ["a", "b", "c", "d"]


class SharesMachine(RuleBasedStateMachine):
    """Members that come and go, each with whatever it can get."""

    @initialize(calls=st.integers(0, 12), size_bytes=st.integers(0, 40), members=st.integers(4, 12))
    def build(self, calls: int, size_bytes: int, members: int) -> None:
        self.calls, self.size_bytes, self.members = calls, size_bytes, members
        self.shares = shares(calls, size_bytes, members)
        self.taken: list[tuple[str, int]] = []

    def of(self, member: str) -> list[int]:
        return [size for name, size in self.taken if name == member]

    @rule(member=st.sampled_from(MEMBERS), size=st.integers(0, 20))
    def take(self, member: str, size: int) -> None:
        if self.shares.missing(member, size) is None:
            self.shares.take(member, size)
            self.taken.append((member, size))
            assert len(self.taken) <= self.calls
            assert sum(size for _, size in self.taken) <= self.size_bytes

    @precondition(lambda self: self.taken)
    @rule(index=st.integers(0))
    def give_back(self, index: int) -> None:
        self.shares.give_back(*self.taken.pop(index % len(self.taken)))

    @invariant()
    def every_member_is_sure_of_its_part(self) -> None:
        calls, size_bytes = self.calls // 2 // self.members, self.size_bytes // 2 // self.members
        for member in MEMBERS:
            have = self.of(member)
            if len(have) < calls and sum(have) < size_bytes:
                assert self.shares.missing(member, size_bytes - sum(have)) is None

    @invariant()
    def what_is_left_of_part_and_common_half_can_be_had_at_once(self) -> None:
        if not self.taken and self.calls:
            rest = self.size_bytes - self.size_bytes // 2
            assert self.shares.missing("a", rest) is None

    def teardown(self) -> None:
        if hasattr(self, "shares"):
            for member, size in self.taken:
                self.shares.give_back(member, size)
            self.shares.divide(1)
            assert take_all(self.shares, "a") == self.calls


TestSharesMachine = SharesMachine.TestCase
TestSharesMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
