"""Which requests run, which are duplicates, and what still has to go out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from atp_sandbox.atp import session as session_module
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.atp.session import MAX_RECENT_AGE_S, Resend, Running, Session, Start

ASKED = ToolRequest('"r"', "echo", {"a": 1}, '{"a": 1}', '"T"')


@pytest.fixture
def session() -> Session:
    return Session(b"0123456789abcdef")


def start(session: Session, request: ToolRequest, now: float = 0.0) -> int:
    result = session.receive(request, now)
    assert isinstance(result, Start)
    return result.key


def test_the_same_request_in_flight_is_not_run_again(session: Session) -> None:
    key = start(session, ASKED)
    assert session.receive(ASKED, 1.0) == Running()
    assert session.in_flight == 1
    session.answered(key, "answer", 2.0)
    assert session.take(100) == ["answer"]
    assert session.in_flight == 0


def test_an_answered_request_asked_again_is_answered_from_the_record(session: Session) -> None:
    session.answered(start(session, ASKED), "answer", 1.0)
    session.take(100)
    assert session.receive(ASKED, 2.0) == Resend("answer")
    assert session.take(100) == ["answer"]
    assert session.receive(ASKED, 3.0) == Resend("answer")


def test_an_answer_still_waiting_is_not_queued_twice(session: Session) -> None:
    session.answered(start(session, ASKED), "answer", 1.0)
    assert session.receive(ASKED, 2.0) == Running()
    taken = session.take(100)
    session.restore(taken)
    assert session.receive(ASKED, 3.0) == Running()
    assert session.take(100) == ["answer"]


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
    for index in range(10):
        key = start(session, dataclasses.replace(ASKED, request_id_json=str(index)))
        session.answered(key, "x", 0.0)
        keys.add(key)
    assert len(keys) == 10


def test_answering_twice_is_refused(session: Session) -> None:
    key = start(session, ASKED)
    session.answered(key, "x", 0.0)
    with pytest.raises(KeyError):
        session.answered(key, "x", 0.0)


def test_an_old_answer_is_forgotten(session: Session) -> None:
    session.answered(start(session, ASKED), "x", 0.0)
    session.take(100)
    assert session.receive(ASKED, MAX_RECENT_AGE_S) == Resend("x")
    assert isinstance(session.receive(ASKED, MAX_RECENT_AGE_S + 1), Start)


def test_answers_kept_are_bounded_in_number(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_RECENT_ANSWERS", 2)
    asked = [dataclasses.replace(ASKED, request_id_json=str(index)) for index in range(3)]
    for request in asked:
        session.answered(start(session, request), "x" + request.request_id_json, 0.0)
    session.take(1000)
    assert isinstance(session.receive(asked[2], 0.0), Resend)
    assert isinstance(session.receive(asked[1], 0.0), Resend)
    assert isinstance(session.receive(asked[0], 0.0), Start)


def test_answers_kept_are_bounded_in_bytes(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_RECENT_BYTES", 10)
    other = dataclasses.replace(ASKED, request_id_json="2")
    session.answered(start(session, ASKED), "x" * 6, 0.0)
    session.answered(start(session, other), "y" * 6, 0.0)
    session.take(1000)
    assert isinstance(session.receive(other, 0.0), Resend)
    assert isinstance(session.receive(ASKED, 0.0), Start)


def test_an_answer_too_large_to_keep_goes_out_all_the_same(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_RECENT_BYTES", 10)
    session.answered(start(session, ASKED), "x" * 11, 0.0)
    assert session.take(1) == ["x" * 11]
    assert isinstance(session.receive(ASKED, 0.0), Start)


def test_the_outbox_gives_out_in_order_and_within_the_size_asked(session: Session) -> None:
    for text in ("aaaa", "bbbb", "cccc"):
        session.enqueue(text)
    assert (session.pending, session.pending_bytes) == (3, 12)
    assert session.take(9) == ["aaaa", "bbbb"]
    assert (session.pending, session.pending_bytes) == (1, 4)
    assert session.take(1) == ["cccc"]
    assert session.take(1) == []
    assert (session.pending, session.pending_bytes) == (0, 0)


def test_what_was_not_written_comes_first_again(session: Session) -> None:
    for text in ("a", "b", "c"):
        session.enqueue(text)
    taken = session.take(2)
    session.restore(taken)
    assert session.pending_bytes == 3
    assert session.take(100) == ["a", "b", "c"]
