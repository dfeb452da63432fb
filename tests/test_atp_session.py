"""Which requests run, which are duplicates, and what a successor makes of what is left."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.atp import outbox as outbox_module
from atp_sandbox.atp import session as session_module
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.atp.outbox import MAX_OUTBOX_AGE_S
from atp_sandbox.atp.record import Record, Stage
from atp_sandbox.atp.session import (
    MAX_REMEMBERED_AGE_S,
    Forgotten,
    Resend,
    Running,
    Session,
    Start,
)

ASKED = ToolRequest('"r"', "echo", {"a": 1}, '{"a": 1}', '"T"')
SECRET = b"0123456789abcdef"


@pytest.fixture
def session() -> Session:
    return Session(SECRET)


def request(number: int) -> ToolRequest:
    return dataclasses.replace(ASKED, request_id_json=str(number))


def start(session: Session, request: ToolRequest, now: float = 0.0) -> int:
    result = session.receive(request, now)
    assert isinstance(result, Start)
    return result.key


def sent(session: Session, now: float = 0.0) -> list[str]:
    """All that waits, as it would be written."""
    return session.outbox.take(1 << 30, now)


def settle(session: Session) -> None:
    """Everything is written and confirmed."""
    written = session.outbox.unconfirmed + len(sent(session))
    session.outbox.connection_ended()
    sent(session)
    session.confirm(written)
    assert not session.outbox.unconfirmed


# -- duplicates ------------------------------------------------------------------------------------


def test_the_same_request_in_flight_is_not_run_again(session: Session) -> None:
    key = start(session, ASKED)
    assert session.receive(ASKED, 1.0) == Running()
    session.started(key)
    assert session.receive(ASKED, 1.0) == Running()
    assert session.in_flight == 1
    session.answered(key, "answer", 2.0)
    assert sent(session) == ["answer"]
    assert session.in_flight == 0


def test_an_answered_request_asked_again_is_answered_from_the_record(session: Session) -> None:
    session.answered(start(session, ASKED), "answer", 1.0)
    assert sent(session) == ["answer"]
    assert session.receive(ASKED, 2.0) == Resend()
    assert sent(session) == ["answer"]
    session.confirm(2)
    assert session.receive(ASKED, 3.0) == Resend()
    assert sent(session) == ["answer"]


def test_an_answer_still_waiting_is_not_queued_twice(session: Session) -> None:
    session.answered(start(session, ASKED), "answer", 1.0)
    assert session.receive(ASKED, 2.0) == Running()
    sent(session)
    session.outbox.connection_ended()
    assert session.receive(ASKED, 3.0) == Running()
    assert sent(session) == ["answer"]


@pytest.mark.parametrize(
    "change",
    [
        {"request_id_json": '"other"'},
        {"tool": "other"},
        {"params_json": '{"a": 2}'},
        {"params_json": '{"a": 1.0}'},
        {"auth_token_json": '"U"'},
        {"auth_token_json": None},
    ],
)
def test_any_other_content_is_a_new_call(session: Session, change: dict[str, Any]) -> None:
    first = start(session, ASKED)
    assert start(session, dataclasses.replace(ASKED, **change)) != first


@pytest.mark.parametrize(("one", "other"), [("1", '"1"'), ("1", "1.0"), ("1", "true"), ('""', "0")])
def test_ids_of_different_type_are_different_calls(session: Session, one: str, other: str) -> None:
    start(session, dataclasses.replace(ASKED, request_id_json=one))
    start(session, dataclasses.replace(ASKED, request_id_json=other))


def test_text_cannot_move_from_one_field_to_another_unnoticed(session: Session) -> None:
    start(session, ToolRequest('"a"', "bc", {}, "{}", None))
    start(session, ToolRequest('"ab"', "c", {}, "{}", None))
    start(session, ToolRequest('"a"', "b", {}, "c{}", None))


def test_a_tool_name_with_a_lone_surrogate_is_taken(session: Session) -> None:
    start(session, dataclasses.replace(ASKED, tool="\ud800"))


def test_keys_are_never_used_again(session: Session) -> None:
    keys = set()
    for number in range(10):
        key = start(session, request(number))
        session.answered(key, "x", 0.0)
        keys.add(key)
    assert len(keys) == 10


def test_answering_twice_is_refused(session: Session) -> None:
    key = start(session, ASKED)
    session.answered(key, "x", 0.0)
    with pytest.raises(KeyError):
        session.answered(key, "x", 0.0)


# -- what is forgotten -----------------------------------------------------------------------------


def test_an_old_request_is_forgotten(session: Session) -> None:
    session.answered(start(session, ASKED), "x", 0.0)
    settle(session)
    assert session.receive(ASKED, MAX_REMEMBERED_AGE_S) == Resend()
    settle(session)
    assert isinstance(session.receive(ASKED, MAX_REMEMBERED_AGE_S + 1), Start)


def test_a_request_is_not_forgotten_before_its_answer_is_confirmed(session: Session) -> None:
    session.answered(start(session, ASKED), "x", 0.0)
    sent(session)
    assert session.receive(ASKED, MAX_REMEMBERED_AGE_S + 1) == Resend()


def test_requests_that_are_remembered_are_bounded(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_REMEMBERED", 2)
    for number in range(3):
        session.answered(start(session, request(number)), "x", 0.0)
    settle(session)
    assert session.receive(request(2), 0.0) == Resend()
    assert session.receive(request(1), 0.0) == Resend()
    assert isinstance(session.receive(request(0), 0.0), Start)


def test_an_answer_that_is_never_confirmed_cannot_make_more_be_remembered(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend asks for it again and hangs up, each time, and confirms all that is behind it."""
    monkeypatch.setattr(session_module, "MAX_REMEMBERED", 2)
    session.answered(start(session, ASKED), "x", 0.0)
    sent(session)
    for number in range(10):
        session.answered(start(session, request(number)), "y", 0.0)
        sent(session)
        session.receive(ASKED, 0.0)
        session.outbox.connection_ended()
        session.outbox.take(1, 0.0)
        session.confirm(1)
    assert len(session.records()) <= 4


def test_of_an_answered_request_neither_a_long_id_nor_a_long_name_is_kept(session: Session) -> None:
    """Of the remembered there may be tens of thousands, and a request may have 16 MiB."""
    long = dataclasses.replace(ASKED, request_id_json=f'"{"i" * 100_000}"', tool="t" * 100_000)
    session.answered(start(session, long), "x", 0.0)
    other = dataclasses.replace(long, request_id_json="1")
    start(session, other)
    kept = [len(pickle.dumps(record)) for record in session.records()]
    assert kept[0] < 1_000 < kept[1]
    assert session.receive(long, 0.0) == Running()

    successor = Session(SECRET)
    for record in left_by(session):
        successor.restore(record, "x", 1.0)
    assert all(len(pickle.dumps(record)) < 1_000 for record in successor.records())
    assert [successor.receive(one, 1.0) for one in (long, other)] == [Running(), Running()]


@pytest.mark.parametrize(("bound", "value"), [("MAX_KEPT_ANSWERS", 1), ("MAX_KEPT_BYTES", 10)])
def test_a_request_whose_answer_is_kept_no_longer_does_not_run_again(
    session: Session, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(session_module, bound, value)
    for number in range(2):
        session.answered(start(session, request(number)), "x" * 6, 0.0)
    settle(session)
    assert session.receive(request(1), 0.0) == Resend()
    assert session.receive(request(0), 0.0) == Forgotten()


# -- what a successor is left ----------------------------------------------------------------------


def left_by(session: Session) -> list[Record]:
    """As it stands in a journal that has just been written."""
    session.take_changes()
    left = []
    for record in sorted(session.records(), key=lambda record: record.key):
        text = record.text if record.stage is Stage.ANSWERED else None
        left.append(dataclasses.replace(record, text=text, is_waiting=False))
    return left


def test_a_successor_knows_each_request_and_has_the_answers_that_are_due(session: Session) -> None:
    session.answered(start(session, request(1)), "confirmed", 0.0)
    settle(session)
    session.answered(start(session, request(2)), "due", 0.0)
    sent(session)
    start(session, request(3))
    key = start(session, request(4))
    session.started(key)

    successor = Session(SECRET)
    left = left_by(session)
    assert [record.stage for record in left] == [
        *(Stage.CONFIRMED, Stage.ANSWERED, Stage.ACCEPTED, Stage.STARTED)
    ]
    for record, text in zip(left, [None, "due", "not run", "may have run"], strict=True):
        successor.restore(record, text, 5.0)
    assert successor.receive(request(1), 5.0) == Forgotten()
    for number in (2, 3, 4):
        assert successor.receive(request(number), 5.0) == Running()
    assert sent(successor, 5.0) == ["due", "not run", "may have run"]
    assert successor.receive(request(4), 5.0) == Resend()
    assert start(successor, request(5)) > key
    changed, forgotten = successor.take_changes()
    assert [(record.stage, record.text) for record in changed[:2]] == [
        *((Stage.ANSWERED, "not run"), (Stage.ANSWERED, "may have run"))
    ]
    assert forgotten == []


def test_a_successor_forgets_what_is_too_old(session: Session) -> None:
    session.answered(start(session, request(1)), "confirmed", 0.0)
    settle(session)
    session.answered(start(session, request(2)), "due", 0.0)
    confirmed, due = left_by(session)
    successor = Session(SECRET)
    successor.restore(confirmed, None, MAX_REMEMBERED_AGE_S + 1)
    successor.restore(due, "due", MAX_OUTBOX_AGE_S + 1)
    assert successor.records() == []
    assert successor.take_changes() == ([], [confirmed.key, due.key])
    assert sent(successor) == []


def test_a_clock_that_began_anew_makes_nothing_old(session: Session) -> None:
    session.answered(start(session, ASKED, 1e6), "due", 1e6)
    successor = Session(SECRET)
    for record in left_by(session):
        successor.restore(record, "due", 1.0)
    assert sent(successor, 1.0) == ["due"]
    assert successor.receive(ASKED, 2.0) == Resend()


def test_another_link_does_not_know_the_request(session: Session) -> None:
    session.answered(start(session, ASKED), "x", 0.0)
    other = Session(b"another link")
    for record in left_by(session):
        other.restore(record, None, 0.0)
    assert isinstance(other.receive(ASKED, 0.0), Start)


def test_changes_are_told_once_and_in_their_latest_form(session: Session) -> None:
    key = start(session, ASKED)
    session.started(key)
    ((record,), forgotten) = session.take_changes()
    assert (record.key, record.stage, forgotten) == (key, Stage.STARTED, [])
    assert session.take_changes() == ([], [])
    session.answered(key, "x", 0.0)
    assert [r.stage for r in session.take_changes()[0]] == [Stage.ANSWERED]
    settle(session)
    assert [r.stage for r in session.take_changes()[0]] == [Stage.CONFIRMED]
    session.receive(request(2), MAX_REMEMBERED_AGE_S + 1)
    changed, forgotten = session.take_changes()
    assert ([r.request_id_json for r in changed], forgotten) == (["2"], [key])


# -- the outbox ------------------------------------------------------------------------------------


def test_texts_go_out_in_order_and_within_the_size_asked(session: Session) -> None:
    outbox = session.outbox
    for text in ("aaaa", "bbbb", "cccc"):
        session.reject(text, 0.0)
    assert (outbox.waiting, outbox.waiting_bytes, outbox.unconfirmed) == (3, 12, 0)
    assert outbox.take(9, 0.0) == ["aaaa", "bbbb"]
    assert (outbox.waiting, outbox.waiting_bytes, outbox.unconfirmed) == (1, 4, 2)
    assert outbox.take(1, 0.0) == ["cccc"]
    assert outbox.take(1, 0.0) == []
    assert outbox.size_bytes == 12
    session.confirm(3)
    assert (outbox.size_bytes, outbox.unconfirmed) == (0, 0)


def test_what_is_unconfirmed_when_a_connection_ends_comes_first_on_the_next(
    session: Session,
) -> None:
    for text in ("a", "b", "c", "d"):
        session.reject(text, 0.0)
    assert session.outbox.take(3, 0.0) == ["a", "b", "c"]
    session.confirm(1)
    session.outbox.connection_ended()
    assert sent(session) == ["b", "c", "d"]
    session.confirm(1)  # counted anew on the new connection
    session.outbox.connection_ended()
    assert sent(session) == ["c", "d"]


def test_one_copy_of_an_answer_goes_over_the_next_connection(session: Session) -> None:
    session.answered(start(session, request(1)), "one", 0.0)
    session.answered(start(session, request(2)), "two", 0.0)
    for number in (1, 2):
        sent(session)
        assert session.receive(request(number), 0.0) == Resend()  # a second copy of each
    session.confirm(1)  # the first copy of the first
    session.outbox.connection_ended()
    assert sent(session) == ["two"]


def test_an_answer_that_was_asked_for_again_keeps_its_place(session: Session) -> None:
    for number in (1, 2):
        session.answered(start(session, request(number)), str(number), 0.0)
    sent(session)
    assert session.receive(request(1), 0.0) == Resend()  # a copy that is not written any more
    session.outbox.connection_ended()
    assert session.outbox.waiting_bytes == session.outbox.size_bytes == 2
    assert sent(session) == ["1", "2"]


def test_a_pong_of_more_than_was_sent_confirms_no_more_than_that(session: Session) -> None:
    session.reject("a", 0.0)
    sent(session)
    session.confirm(100)
    session.reject("b", 0.0)
    sent(session)
    session.outbox.connection_ended()
    assert sent(session) == ["b"]


@pytest.mark.parametrize(("bound", "value"), [("MAX_OUTBOX_TEXTS", 2), ("MAX_OUTBOX_BYTES", 2)])
def test_for_want_of_room_the_oldest_that_was_written_is_given_up(
    session: Session, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(outbox_module, bound, value)
    outbox = session.outbox
    for number in range(3):
        session.answered(start(session, request(number)), str(number), 0.0)
        sent(session)
    assert (outbox.unconfirmed, outbox.given_up) == (2, 1)
    session.confirm(2)  # the first of them is the one that was given up
    outbox.connection_ended()
    assert sent(session) == ["2"]


def test_what_was_never_written_is_not_given_up_but_refused(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox_module, "MAX_OUTBOX_BYTES", 10)
    session.reject("x" * 8, 0.0)
    assert not session.outbox.has_room_for(3)
    sent(session)
    assert session.outbox.has_room_for(10)


def test_an_answer_that_found_no_way_for_long_is_given_up(session: Session) -> None:
    session.answered(start(session, ASKED), "old", 0.0)
    session.reject("new", MAX_OUTBOX_AGE_S)
    assert sent(session, MAX_OUTBOX_AGE_S + 1) == ["new"]
    assert session.outbox.given_up == 1
    assert session.outbox.size_bytes == len("new")


@given(
    st.lists(st.sampled_from(["new", "answer", "take", "confirm", "lose", "again"]), max_size=60)
)
def test_no_answer_is_lost_or_changed_whatever_the_order_of_events(steps: list[str]) -> None:
    """Over any history, in the end each call has been answered, with its own text alone."""
    session = Session(SECRET)
    running: list[tuple[int, int]] = []
    asked = 0
    read: set[str] = set()
    written: list[str] = []
    for step in steps:
        match step:
            case "new":
                running.append((asked, start(session, request(asked))))
                asked += 1
            case "answer" if running:
                number, key = running.pop()
                session.answered(key, f"answer {number}", 0.0)
            case "take":
                written += session.outbox.take(20, 0.0)
            case "confirm":
                half = len(written) // 2
                read |= set(written[:half])
                session.confirm(half)
            case "lose":
                written.clear()
                session.outbox.connection_ended()
            case "again" if asked:
                assert not isinstance(session.receive(request(asked - 1), 0.0), Start)
    for number, key in running:
        session.answered(key, f"answer {number}", 0.0)
    session.outbox.connection_ended()
    last = sent(session)
    assert len(set(last)) == len(last)
    assert read | set(last) == {f"answer {number}" for number in range(asked)}
    session.confirm(len(last))
    assert session.outbox.size_bytes == session.outbox.waiting_bytes == 0
