"""The checker of `benchmarks.history`: each broken promise is found, and no kept one is blamed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.history import GONE, INTERRUPTED, NOT_STARTED, OK, FaultKind, History

LIMIT_S, SLACK_S = 2.0, 1.0


class Told(History):
    """A history whose moments pass by themselves, a hundredth of a second each."""

    def __init__(self) -> None:
        super().__init__(time_limit_s=LIMIT_S, slack_s=SLACK_S)
        self.now = 0.0
        self._number = 0

    def ask(self, content: str, connection: int = 1, *, id: str = "r", sure: bool = True) -> None:
        self._number += 1
        self.sent(self._tick(), connection, self._number, id, content)
        if sure:
            self.confirmed(connection, self._number)

    def run(self, content: str) -> None:
        self.executed(self._tick(), content)

    def answer(
        self,
        connection: int = 1,
        *,
        id: str = "r",
        text: str = "a",
        kind: str = OK,
        to: str | None = None,
    ) -> None:
        self.received(self._tick(), connection, id, text, kind, to)

    def die(self) -> None:
        self.died(self._tick())

    def found(self) -> list[FaultKind]:
        return [fault.kind for fault in self.faults()]

    def _tick(self) -> float:
        self.now += 0.01
        return self.now


@pytest.fixture
def told() -> Told:
    return Told()


# -- what is as it should be -----------------------------------------------------------------------


def test_call_that_ran_once_and_was_answered_is_no_fault(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.answer()
    assert told.found() == []


def test_same_bytes_again_after_a_reconnect_are_no_fault(told: Told) -> None:
    told.ask("c")
    told.run("c")
    for connection in (1, 2, 3):
        told.answer(connection)
    assert told.found() == []
    assert (told.answers, told.copies) == (3, 2)


def test_each_time_that_is_asked_again_may_bring_one_more_copy(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.answer()
    told.ask("c")
    told.answer()
    told.ask("c", 2)
    told.answer(2)
    told.answer(2)  # one that was unconfirmed, one that was asked for
    assert told.found() == []


def test_same_id_with_other_content_is_a_call_of_its_own(told: Told) -> None:
    for content in ("a", "b"):
        told.ask(content)
        told.run(content)
        told.answer(text=content, to=content)
    assert told.found() == []


def test_answers_that_name_no_call_are_one_to_each_of_an_id(told: Told) -> None:
    told.ask("a")
    told.ask("b")
    told.answer(text="gone wrong", kind="crashed")
    assert [content.key for content in told.unanswered()] == ["b"]
    told.answer(text="gone wrong", kind="crashed")
    assert told.unanswered() == []
    assert told.found() == []


def test_interruption_by_a_death_is_no_fault(told: Told) -> None:
    for kind, name in ((INTERRUPTED, "ran"), (NOT_STARTED, "waited")):
        told.ask(name, id=name)
        if kind == INTERRUPTED:
            told.run(name)
        told.die()
        told.answer(2, id=name, kind=kind)
    assert told.found() == []


def test_what_was_answered_before_may_be_gone_after_a_new_start(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.answer()
    told.restarted(told._tick())
    told.ask("c", 2)
    told.answer(2, text="before", kind=GONE)
    told.answer(3, text="before", kind=GONE)
    assert told.found() == []


def test_time_that_was_disturbed_does_not_count(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.disturbed(0.5, 99.5)
    told.now = 100.0
    told.answer()
    assert told.found() == []


# -- what is not -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sure", [True, False])
def test_request_that_is_never_answered_is_lost(told: Told, sure: bool) -> None:
    told.ask("c", sure=sure)
    assert told.found() == [FaultKind.LOST]
    assert ("surely" in told.faults()[0].detail) == sure


def test_execution_proves_that_a_request_arrived(told: Told) -> None:
    told.ask("c", sure=False)
    told.run("c")
    assert told.unanswered()[0].is_sure


def test_one_of_two_calls_of_an_id_is_lost(told: Told) -> None:
    for content in ("a", "b"):
        told.ask(content)
        told.run(content)
    told.answer(text="a", to="a")
    assert told.found() == [FaultKind.LOST]


def test_two_answers_to_one_request_are_a_fault(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.answer(text="one")
    told.die()
    told.answer(2, text="two", kind=INTERRUPTED)
    assert told.found() == [FaultKind.DIFFERENT]


def test_three_answers_to_two_calls_of_an_id_are_a_fault(told: Told) -> None:
    for content in ("a", "b"):
        told.ask(content)
        told.run(content)
        told.answer(text=content, to=content)
    told.answer(2, text="more", kind="crashed")
    assert told.found() == [FaultKind.DIFFERENT]


def test_answer_that_nobody_asked_for_is_a_fault(told: Told) -> None:
    told.answer(id="never sent")
    told.ask("c")
    told.run("c")
    told.answer(to="c")
    told.answer(text="other", to="of another id")
    assert told.found() == [FaultKind.UNASKED, FaultKind.UNASKED]


def test_two_copies_on_one_connection_for_one_question_are_a_fault(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.answer()
    told.answer()
    assert told.found() == [FaultKind.COPIES]


def test_second_execution_is_a_fault_whatever_is_answered(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.ask("c", 2)
    told.run("c")
    told.answer(2)
    assert told.found() == [FaultKind.TWICE]


@pytest.mark.parametrize("kind", ["overloaded", "unknown_tool", NOT_STARTED])
def test_execution_of_what_was_refused_is_a_fault(told: Told, kind: str) -> None:
    told.ask("c")
    told.run("c")
    told.die()
    told.answer(2, kind=kind)
    assert told.found() == [FaultKind.REFUSED_BUT_RUN]


def test_success_without_an_execution_is_a_fault(told: Told) -> None:
    told.ask("c")
    told.answer()
    assert told.found() == [FaultKind.NOT_RUN]


def test_execution_that_nobody_asked_for_is_a_fault(told: Told) -> None:
    told.run("c")
    assert told.found() == [FaultKind.STRANGER]


def test_answer_after_the_time_limit_is_late(told: Told) -> None:
    told.ask("c")
    told.run("c")
    told.disturbed(0.5, 1.5)
    told.now = LIMIT_S + SLACK_S + 1.1
    told.answer()
    assert told.found() == [FaultKind.LATE]


def test_interruption_without_a_death_is_a_fault(told: Told) -> None:
    told.die()
    told.ask("c")
    told.restarted(told._tick())
    told.answer(kind=INTERRUPTED)
    told.die()
    assert told.found() == [FaultKind.INTERRUPTED]


def test_internal_error_is_a_fault(told: Told) -> None:
    told.ask("c")
    told.answer(kind="internal_error")
    assert told.found() == [FaultKind.INTERNAL]


@pytest.mark.parametrize("missing", ["answer", "restart", "question"])
def test_answer_is_gone_only_if_it_was_there(told: Told, missing: str) -> None:
    told.ask("c")
    told.run("c")
    if missing != "answer":
        told.answer()
    if missing != "restart":
        told.restarted(told._tick())
    if missing != "question":
        told.ask("c", 2)
    told.answer(2, text="before", kind=GONE)
    if missing == "answer":
        told.answer(3)  # not before
    assert told.found() == [FaultKind.GONE]


# -- any history -----------------------------------------------------------------------------------


def lived(seed: int, *, broken: FaultKind | None = None) -> Told:
    """What a system that keeps its promises lets a backend see; or breaks one of them once."""
    draw, told = random.Random(seed), Told()
    connection, waiting = 1, [f"c{number}" for number in range(draw.randint(2, 12))]
    told.ask("spoilt", id="spoilt")
    while waiting:
        name = waiting.pop(draw.randrange(len(waiting)))
        told.ask(name, connection, id=name, sure=draw.random() < 0.5)
        if draw.random() < 0.3:  # it never arrived
            connection += 1
            told.ask(name, connection, id=name)
        told.run(name)
        if draw.random() < 0.3:
            told.die()
            connection += 1
            told.answer(connection, id=name, text=name, kind=INTERRUPTED)
            continue
        for _ in range(draw.randint(1, 3)):  # not confirmed in time
            told.answer(connection, id=name, text=name)
            connection += 1
    if broken is not FaultKind.NOT_RUN:
        told.run("spoilt")
    match broken:
        case FaultKind.LOST:
            return told
        case FaultKind.TWICE:
            told.run("spoilt")
        case FaultKind.DIFFERENT:
            told.answer(connection, id="spoilt", text="another")
            connection += 1
        case FaultKind.LATE:
            told.now += LIMIT_S + SLACK_S
        case FaultKind.STRANGER:
            told.run("nobody's")
        case FaultKind.UNASKED:
            told.answer(connection, id="nobody's")
        case FaultKind.COPIES:
            for _ in range(2):
                told.answer(connection, id="spoilt")
    told.answer(connection, id="spoilt")
    return told


@given(st.integers(0, 2**32))
def test_kept_promises_are_never_blamed(seed: int) -> None:
    assert lived(seed).found() == []


@given(
    st.integers(0, 2**32),
    st.sampled_from(
        [
            FaultKind.LOST,
            FaultKind.TWICE,
            FaultKind.DIFFERENT,
            FaultKind.LATE,
            FaultKind.STRANGER,
            FaultKind.UNASKED,
            FaultKind.COPIES,
            FaultKind.NOT_RUN,
        ]
    ),
)
def test_one_broken_promise_is_found_among_any_that_are_kept(seed: int, broken: FaultKind) -> None:
    assert lived(seed, broken=broken).found() == [broken]
