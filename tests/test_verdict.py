"""One outcome from the evidence: what a worker says is a result or a tool's error, and no more."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.limits import MIB, Limits
from atp_sandbox.outcome import Failure, Kind, Limit, Success
from atp_sandbox.scheduling import verdict
from atp_sandbox.scheduling.shares import OWN_QUEUE, TOTAL_QUEUE
from atp_sandbox.scheduling.verdict import RuleBroken, judge_answer

LIMITS = Limits(output_bytes=100, time_s=2.5, memory_bytes=256 * MIB)
MOST_SENTENCE_CHARS = 64 * 1024


def judged(kind: str, body: bytes) -> Failure:
    outcome = judge_answer(kind, body, LIMITS)
    assert isinstance(outcome, Failure)
    return outcome


def test_a_result_is_passed_on_as_it_is_spelled() -> None:
    assert judge_answer("result", b'{"a":  1.50}', LIMITS) == Success('{"a":  1.50}')


def test_a_result_of_just_the_output_limit_passes_and_one_byte_more_does_not() -> None:
    assert judge_answer("result", b'"' + b"x" * 98 + b'"', LIMITS) == Success(f'"{"x" * 98}"')
    failure = judged("result", b'"' + b"x" * 99 + b'"')
    assert failure.kind is Kind.OUTPUT_LIMIT
    assert failure.limit == Limit("output", 100, "bytes")


@pytest.mark.parametrize("body", [b"", b"{", b"NaN", b"1e999", '"é"'.encode(), b'"\\ud800"'])
def test_a_result_that_is_no_strict_json_is_invalid(body: bytes) -> None:
    assert judged("result", body).kind is Kind.INVALID_RESULT


def test_an_error_is_the_tools_own_sentence() -> None:
    assert judged("error", "é: no".encode()) == Failure(Kind.TOOL_ERROR, "é: no")
    assert judged("invalid", b"a set") == Failure(Kind.INVALID_RESULT, "a set")


def test_a_sentence_is_cut() -> None:
    for kind in ("error", "invalid"):
        assert len(judged(kind, b"x" * (MOST_SENTENCE_CHARS + 1)).error) == MOST_SENTENCE_CHARS


@pytest.mark.parametrize(
    ("kind", "body"), [("", b""), ("timeout", b"x"), ("error", b"\xff"), ("error", b"\xed\xa0\x80")]
)
def test_anything_else_is_no_answer(kind: str, body: bytes) -> None:
    with pytest.raises(RuleBroken):
        judge_answer(kind, body, LIMITS)


@given(st.sampled_from(["result", "error", "invalid"]) | st.text(), st.binary())
def test_no_answer_claims_evidence_that_only_we_can_have(kind: str, body: bytes) -> None:
    try:
        outcome = judge_answer(kind, body, LIMITS)
    except RuleBroken:
        return
    if isinstance(outcome, Failure):
        assert outcome.kind in (Kind.TOOL_ERROR, Kind.INVALID_RESULT, Kind.OUTPUT_LIMIT)
        assert (outcome.kind is Kind.OUTPUT_LIMIT) == (kind == "result" and len(body) > 100)


@pytest.mark.parametrize(
    ("failure", "kind", "limit", "words"),
    [
        (
            verdict.timed_out(LIMITS, was_running=True),
            Kind.TIMEOUT,
            Limit("time", 2.5, "s"),
            "The tool was stopped: time limit of 2.5 s reached.",
        ),
        (
            verdict.timed_out(LIMITS, was_running=False),
            Kind.TIMEOUT,
            Limit("time", 2.5, "s"),
            "The call waited in the queue until the end: time limit of 2.5 s reached.",
        ),
        (
            verdict.memory_exceeded(LIMITS),
            Kind.MEMORY_LIMIT,
            Limit("memory", 256 * MIB, "bytes"),
            "The tool was stopped: memory limit of 256 MiB exceeded.",
        ),
        (
            verdict.disk_exceeded(LIMITS),
            Kind.DISK_LIMIT,
            Limit("disk", 64 * MIB, "bytes"),
            "The tool failed with its scratch directory full: disk limit of 64 MiB and 4096 files.",
        ),
    ],
)
def test_a_limit_is_named_with_its_value(
    failure: Failure, kind: Kind, limit: Limit, words: str
) -> None:
    assert (failure.kind, failure.limit, failure.error) == (kind, limit, words)
    assert not failure.retryable


@pytest.mark.parametrize(
    ("status", "details", "words"),
    [
        (None, {}, "The tool's process ended before it answered."),
        (0, {"exit_status": 0}, "The tool's process ended with exit status 0 before it answered."),
        (7 << 8, {"exit_status": 7}, "with exit status 7 before"),
        (signal.SIGSEGV, {"signal": 11}, "ended by signal 11 (SIGSEGV)"),
        (signal.SIGABRT | 0x80, {"signal": 6}, "ended by signal 6 (SIGABRT)"),
        (40, {"signal": 40}, "ended by signal 40 (no standard signal)"),
    ],
)
def test_a_wait_status_tells_how_a_process_ended(
    status: int | None, details: dict[str, object], words: str
) -> None:
    failure = verdict.crashed(status)
    assert failure.kind is Kind.CRASHED
    assert failure.details == details
    assert words in failure.error
    assert failure.limit is None


def test_a_kill_is_never_read_as_a_limit() -> None:
    assert verdict.crashed(signal.SIGKILL).kind is Kind.CRASHED


def test_overloaded_says_when_to_try_again() -> None:
    failure = verdict.overloaded(Limit("queue", 7, "calls"), 1.26)
    assert failure.retryable
    assert failure.retry_after_s == 1.3
    assert "the queue of this toolkit (7 calls)" in failure.error


@pytest.mark.parametrize(
    ("limit", "named"),
    [
        (Limit(OWN_QUEUE, 256, "calls"), "queue of this toolkit (256 calls)"),
        (Limit(OWN_QUEUE, 64 * MIB, "bytes"), "queue of this toolkit (64 MiB of parameters)"),
        (Limit(TOTAL_QUEUE, 4096, "calls"), "queue of all toolkits (4096 calls)"),
        (Limit(TOTAL_QUEUE, 64 * MIB, "bytes"), "queue of all toolkits (64 MiB of parameters)"),
    ],
)
def test_overloaded_names_the_queue_that_is_full(limit: Limit, named: str) -> None:
    failure = verdict.overloaded(limit, 1.0)
    assert failure.limit is limit
    assert named in failure.error
