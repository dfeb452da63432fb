"""One outcome from the evidence of a call. PURE.

Evidence is what we saw ourselves: our timer, bytes that we counted, the wait status of whoever
reaped the process. What a worker says of its own call is a result or a tool's exception, no more.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from atp_sandbox.limits import Limits, format_duration, format_size
from atp_sandbox.outcome import Failure, Kind, Limit, Outcome, Success
from atp_sandbox.scheduling.shares import TOTAL_QUEUE
from atp_sandbox.strict_json import check_json

_MAX_SENTENCE_CHARS = 64 * 1024


class RuleBroken(Exception):
    """A worker's answer is none; the worker is to be ended."""


def judge_answer(kind: str, body: bytes, limits: Limits) -> Outcome:
    """The outcome that a worker's answer amounts to; RuleBroken if it is no answer at all."""
    if kind == "result":
        if len(body) > limits.output_bytes:
            return output_exceeded(limits)
        try:
            return Success(check_json(body))
        except ValueError as error:
            return Failure(Kind.INVALID_RESULT, f"the tool's result cannot be sent: {error}")
    try:
        sentence = body.decode("utf-8")
    except UnicodeDecodeError:
        raise RuleBroken("a sentence that is not UTF-8") from None
    if kind == "error":
        return Failure(Kind.TOOL_ERROR, sentence[:_MAX_SENTENCE_CHARS])
    if kind == "invalid":
        return Failure(Kind.INVALID_RESULT, sentence[:_MAX_SENTENCE_CHARS])
    raise RuleBroken("an answer of an unknown kind")


def timed_out(limits: Limits, *, was_running: bool) -> Failure:
    """Our own timer: the deadline counts from receipt, queueing included."""
    allowed = format_duration(limits.time_s)
    what = "The tool was stopped" if was_running else "The call waited in the queue until the end"
    sentence = f"{what}: time limit of {allowed} reached."
    return Failure(Kind.TIMEOUT, sentence, Limit("time", limits.time_s, "s"))


def memory_exceeded(limits: Limits) -> Failure:
    """Memory that we measured from outside."""
    sentence = f"The tool was stopped: memory limit of {format_size(limits.memory_bytes)} exceeded."
    return Failure(Kind.MEMORY_LIMIT, sentence, Limit("memory", limits.memory_bytes, "bytes"))


def output_exceeded(limits: Limits) -> Failure:
    """Bytes that we counted, or that a frame announced."""
    allowed = format_size(limits.output_bytes)
    sentence = f"The tool's result is larger than the output limit of {allowed}."
    return Failure(Kind.OUTPUT_LIMIT, sentence, Limit("output", limits.output_bytes, "bytes"))


def cpu_exceeded(limits: Limits) -> Failure:
    """Processor time that we measured from outside."""
    assert limits.cpu_s is not None
    allowed = format_duration(limits.cpu_s)
    sentence = f"The tool was stopped: processor time limit of {allowed} exceeded."
    return Failure(Kind.CPU_LIMIT, sentence, Limit("cpu", limits.cpu_s, "s"))


def processes_exceeded(limits: Limits) -> Failure:
    """The call failed, and the kernel counted that it was refused a thread or process."""
    sentence = f"The tool failed at its limit of {limits.processes} processes and threads."
    return Failure(Kind.PROCESS_LIMIT, sentence, Limit("processes", limits.processes, "processes"))


def disk_exceeded(limits: Limits) -> Failure:
    """The call failed, and its scratch directory was found full by the warden."""
    allowed = f"{format_size(limits.scratch_bytes)} and {limits.scratch_files} files"
    sentence = f"The tool failed with its scratch directory full: disk limit of {allowed}."
    return Failure(Kind.DISK_LIMIT, sentence, Limit("disk", limits.scratch_bytes, "bytes"))


def overloaded(limit: Limit, retry_after_s: float) -> Failure:
    """`limit`, a bound on what waits, has no room left for the member whose call it is."""
    whose, member = "of this toolkit", "this tool"
    if limit.name == TOTAL_QUEUE:
        whose, member = "of all toolkits", "this toolkit"
    most = f"{limit.value:.0f} calls"
    if limit.unit == "bytes":
        most = f"{format_size(limit.value)} of parameters"
    sentence = (
        f"Too many calls: the queue {whose} ({most}) has no room for another one of {member}. "
        "Try again later."
    )
    return Failure(Kind.OVERLOADED, sentence, limit, retry_after_s=round(retry_after_s, 1))


@dataclass(frozen=True, slots=True)
class Seen:
    """What was seen from outside of a call that failed."""

    oom_kills: int = 0
    """Processes of the call that the kernel ended for want of memory."""
    pids_refused: int = 0
    """Processes and threads that the kernel refused it."""
    scratch_was_full: bool = False


def judge_failure(own: Failure, seen: Seen, limits: Limits) -> Failure:
    """`own`, what the tool raised or how it ended, unless a limit was seen to be hit."""
    if seen.oom_kills:
        return memory_exceeded(limits)
    if seen.scratch_was_full:
        return disk_exceeded(limits)
    if seen.pids_refused:
        return processes_exceeded(limits)
    return own


def crashed(status: int | None) -> Failure:
    """The process ended without an answer; `status` as of waitpid(2), None if unknown."""
    if status is None:
        return Failure(Kind.CRASHED, "The tool's process ended before it answered.")
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = "no standard signal"
        sentence = f"The tool's process was ended by signal {number} ({name})."
        return Failure(Kind.CRASHED, sentence, details={"signal": number})
    code = os.WEXITSTATUS(status)
    sentence = f"The tool's process ended with exit status {code} before it answered."
    return Failure(Kind.CRASHED, sentence, details={"exit_status": code})


def broke_rules() -> Failure:
    """The worker sent something else than one answer to its call."""
    return Failure(Kind.CRASHED, "The tool's process was stopped: it broke the answer protocol.")


def interrupted() -> Failure:
    """Our own end, which did not wait any longer. What the tool has done by then is not known."""
    return Failure(Kind.INTERRUPTED, "The server ended while the tool ran.")


def jail_lost(reason: str) -> Failure:
    """The jail ended under its calls."""
    return Failure(Kind.CRASHED, f"The toolkit's sandbox ended while the tool ran: {reason}.")
