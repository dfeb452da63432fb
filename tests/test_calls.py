"""Each way a call can end gives one named answer, in time, and no other call notices."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import PATIENCE_S, NodeMaker, ServedNode, toolkit_text

from atp_sandbox.limits import MAX_JSON_DEPTH, MAX_OUTPUT_CAPTURE_BYTES, MAX_REQUEST_BYTES, MIB
from atp_sandbox.outcome import Kind, Limit, outcome_json

TIME_S = 3.0
GRACE_S = 2.0
"""From a limit to its answer."""

BODY = """
    @tool
    def echo(value=None, **_):
        return value

    def strict(name, required, provider=None):
        return client.register_tool(
            function_name=name, params=["a", "b"], required_params=required, description="d",
            auth_provider=provider, auth_type=None, auth_with=None,
        )

    @strict("demanding", ["a", "b"])
    def demanding(**kw):
        return kw

    @strict("declares_auth", [], "hubspot")
    def declares_auth(**kw):
        return kw.get("auth_token")

    @strict("takes_auth", [])
    def takes_auth(auth_token):
        return auth_token
"""


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(toolkit_text(BODY), time_s=TIME_S)


@pytest.fixture(autouse=True)
def healthy_afterwards(request: pytest.FixtureRequest) -> Any:
    """Whatever a tool did, the toolkit still answers, and every call had exactly one answer."""
    yield
    if "node" in request.fixturenames:
        request.getfixturevalue("node").assert_healthy()


# -- refused before a worker is touched ------------------------------------------------------------


def test_unknown_tool_is_answered_with_the_nearest_name(node: ServedNode) -> None:
    failure = node.call("ecko").failure
    assert failure.kind is Kind.UNKNOWN_TOOL
    assert failure.error == "Unknown tool: ecko. Did you mean echo?"


def test_missing_parameters_are_all_named_and_null_counts_as_present(node: ServedNode) -> None:
    failure = node.call("demanding", {}).failure
    assert failure.kind is Kind.INVALID_PARAMS
    assert failure.details == {"missing": ["a", "b"]}
    assert node.call("demanding", {"a": 1}).failure.details == {"missing": ["b"]}
    assert node.call("demanding", {"a": None, "b": None}).value == {"a": None, "b": None}


@pytest.mark.parametrize("tool", ["declares_auth", "takes_auth"])
def test_missing_token_is_auth_required(node: ServedNode, tool: str) -> None:
    assert node.call(tool).failure.kind is Kind.AUTH_REQUIRED
    assert node.call(tool, {}, "t").value == "t"


# -- errors of the tool ----------------------------------------------------------------------------


def raise_it(kind: str) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise {
        "plain": ValueError("no such city:\n\u2028Atlantis \U0001f30a"),
        "key": KeyError("name"),
        "empty": ConnectionError(),
        "mute": Mute("never shown"),
        "generator": GeneratorExit("odd"),
        "surrogate": ValueError("\ud800"),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("plain", "no such city:\n\u2028Atlantis \U0001f30a"),
        ("key", "'name'"),
        ("empty", "ConnectionError"),
        ("mute", "Mute"),
        ("generator", "odd"),
        ("surrogate", "\\ud800"),
    ],
)
def test_exception_is_answered_with_exactly_its_text(
    node: ServedNode, kind: str, said: str
) -> None:
    ticket = node.begin_inside(raise_it, kind)
    node.finish(ticket)
    assert (ticket.failure.kind, ticket.failure.error) == (Kind.TOOL_ERROR, said)
    assert json.loads(outcome_json(ticket.outcome)) == {
        "error": said,
        "error_type": "tool_error",
        "retryable": False,
    }


def return_it(kind: str, depth: int = 0) -> Any:
    nested: Any = 1
    for _ in range(depth):
        nested = [nested]
    loop: list[Any] = []
    loop.append(loop)
    return {
        "object": object(),
        "set": {1},
        "bytes": b"x",
        "nan": [float("nan")],
        "infinity": {"a": -float("inf")},
        "surrogate": "\ud800",
        "surrogate key": {"\udc00": 1},
        "nested": nested,
        "circular": loop,
        "coroutine function": return_it,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "depth"),
    [
        ("object", 0),
        ("set", 0),
        ("bytes", 0),
        ("nan", 0),
        ("infinity", 0),
        ("surrogate", 0),
        ("surrogate key", 0),
        ("circular", 0),
        ("coroutine function", 0),
        ("nested", MAX_JSON_DEPTH + 1),
        ("nested", 100_000),
    ],
)
def test_result_that_is_no_json_value_is_invalid_result(
    node: ServedNode, kind: str, depth: int
) -> None:
    ticket = node.begin_inside(return_it, kind, depth)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.INVALID_RESULT
    assert ticket.failure.error


def test_result_may_be_nested_up_to_the_limit(node: ServedNode) -> None:
    assert json.dumps(node.inside(return_it, "nested", MAX_JSON_DEPTH)).count("[") == 200


def test_result_larger_than_the_output_limit_names_it(node: ServedNode) -> None:
    def answer_of(size: int) -> str:
        return "x" * size

    exact = MIB - 2  # the quotation marks count
    assert len(node.inside(answer_of, exact)) == exact
    for size in (exact + 1, MIB, MIB + 100, MIB + 5_000, 60_000_000):
        ticket = node.begin_inside(answer_of, size)
        node.finish(ticket)
        assert ticket.failure.kind is Kind.OUTPUT_LIMIT
        assert ticket.failure.limit == Limit("output", MIB, "bytes")


# -- limits ----------------------------------------------------------------------------------------


def sleep() -> None:
    import time

    time.sleep(1000)


def spin() -> None:
    while True:
        pass


def ignore_signals() -> None:
    import signal
    import time

    for number in range(1, 32):
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


def hold_the_interpreter_lock() -> None:
    import re

    re.match(r"(a+)+$", "a" * 60 + "b")


def stop_itself() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGSTOP)


def never_finish_a_coroutine() -> Any:
    import asyncio

    return asyncio.sleep(1000)


@pytest.mark.parametrize(
    "hang",
    [
        sleep,
        spin,
        ignore_signals,
        hold_the_interpreter_lock,
        stop_itself,
        never_finish_a_coroutine,
    ],
)
def test_hanging_tool_is_a_timeout_within_two_seconds_of_its_deadline(
    node: ServedNode, hang: Callable[[], Any]
) -> None:
    ticket = node.begin_inside(hang)
    quick = [node.submit("echo", {"value": n}) for n in range(10)]
    node.finish(*quick)
    assert [t.value for t in quick] == list(range(10))
    assert not ticket.outcomes, "the others were answered while it hung"
    node.finish(ticket)
    assert ticket.failure.kind is Kind.TIMEOUT
    assert ticket.failure.limit == Limit("time", TIME_S, "s")
    assert TIME_S <= ticket.seconds < TIME_S + GRACE_S


def test_tool_that_takes_too_much_memory_is_named_memory_limit(make_node: NodeMaker) -> None:
    def hoard() -> None:
        held = []
        while True:
            held.append(b"x" * 1_000_000)

    node = make_node(toolkit_text(BODY), memory_bytes=64 * MIB)
    ticket = node.begin_inside(hoard)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.MEMORY_LIMIT
    assert ticket.failure.limit == Limit("memory", 64 * MIB, "bytes")
    node.assert_healthy()


def test_memory_error_of_the_tool_itself_is_no_memory_limit(node: ServedNode) -> None:
    def claim() -> None:
        raise MemoryError("out of memory, honestly")

    ticket = node.begin_inside(claim)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.TOOL_ERROR


# -- crashes ---------------------------------------------------------------------------------------


def end_badly(how: str) -> None:
    import ctypes
    import os
    import signal
    import sys

    print("last words", flush=True)
    match how:
        case "segfault":
            ctypes.string_at(0)
        case "abort":
            os.abort()
        case "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        case "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        case "os._exit":
            os._exit(7)
        case "sys.exit":
            sys.exit(3)
        case "sys.exit text":
            sys.exit("bye")
        case "sys.exit 0":
            sys.exit(0)
        case "KeyboardInterrupt":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("how", "details", "named"),
    [
        ("segfault", {"signal": 11}, "SIGSEGV"),
        ("abort", {"signal": 6}, "SIGABRT"),
        ("SIGKILL", {"signal": 9}, "SIGKILL"),
        ("SIGTERM", {"signal": 15}, "SIGTERM"),
        ("os._exit", {"exit_status": 7}, "exit status 7"),
        ("sys.exit", {"exit_status": 3}, "exit status 3"),
        ("sys.exit text", {"exit_status": 1}, "exit status 1"),
        ("sys.exit 0", {"exit_status": 0}, "exit status 0"),
        ("KeyboardInterrupt", {"signal": 2}, "SIGINT"),
    ],
)
def test_tool_that_ends_its_process_is_crashed_and_says_how(
    node: ServedNode, how: str, details: dict[str, int], named: str
) -> None:
    ticket = node.begin_inside(end_badly, how)
    others = [node.submit("echo", {"value": n}) for n in range(5)]
    node.finish(ticket, *others)
    assert (ticket.failure.kind, ticket.failure.details) == (Kind.CRASHED, details)
    assert named in ticket.failure.error
    assert ticket.printed.startswith("last words")
    assert [t.value for t in others] == list(range(5))


def test_tool_that_closes_every_descriptor_gets_one_answer(node: ServedNode) -> None:
    def close_all() -> str:
        import os

        os.closerange(0, 1024)
        return "done"

    ticket = node.begin_inside(close_all)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.CRASHED


def test_tool_that_closes_the_low_descriptors_still_answers(node: ServedNode) -> None:
    def close_low() -> str:
        import os

        os.closerange(0, 64)
        return "done"

    assert node.inside(close_low) == "done"


def test_tool_that_empties_sys_modules_still_answers(node: ServedNode) -> None:
    def clear(fail: bool) -> Any:
        import builtins
        import sys

        sys.modules.clear()
        if fail:
            raise ValueError("cleared")
        vars(builtins).pop("print")
        return {"a": [1, "x"]}

    assert node.inside(clear, False) == {"a": [1, "x"]}
    ticket = node.begin_inside(clear, True)
    node.finish(ticket)
    assert ticket.failure.error == "cleared"


# -- what tools print ------------------------------------------------------------------------------


def test_printed_megabytes_are_cut_at_64_kib_and_never_fail_the_call(node: ServedNode) -> None:
    def shout(lines: int) -> str:
        import sys

        for _ in range(lines):
            print("spam" * 256)
            print("eggs" * 256, file=sys.stderr)
        return "said"

    ticket = node.begin_inside(shout, 2_000)
    node.finish(ticket)
    assert ticket.value == "said"
    kept, _, mark = ticket.printed.rpartition("\n")
    assert len(kept) == MAX_OUTPUT_CAPTURE_BYTES
    total = 2_000 * 2 * (1024 + 1)
    assert mark == f"[{total - MAX_OUTPUT_CAPTURE_BYTES} more bytes were printed and not kept]"


def test_printed_escape_sequences_are_made_harmless(node: ServedNode) -> None:
    def paint() -> None:
        import os

        print("\x1b[2J\x07\u202eabc\nsecond line")
        os.write(2, b"\xff\x9b")

    ticket = node.begin_inside(paint)
    node.finish(ticket)
    assert ticket.printed == "\\x1b[2J\\x07\\u202eabc\nsecond line\n\\xff\\x9b"


# -- the queue -------------------------------------------------------------------------------------


def test_full_queue_is_overloaded_with_a_time_to_come_back(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text(BODY), time_s=3.0, concurrency=2, queue=2)
    running = [node.begin_inside(sleep) for _ in range(2)]
    node.until(lambda: node.toolkit is not None and node.toolkit.running == 2, "two at work")
    waiting = [node.submit("echo", {"value": n}) for n in range(2)]
    refused = node.submit("echo")
    assert refused.failure.kind is Kind.OVERLOADED
    assert refused.failure.retryable
    assert refused.failure.retry_after_s is not None
    assert refused.failure.retry_after_s > 0
    node.finish(*running, *waiting)
    node.assert_healthy()


def test_burst_on_one_tool_neither_delays_nor_refuses_another_tools_call(
    make_node: NodeMaker,
) -> None:
    def answer() -> str:
        return "answered"

    # One worker at a time: the order is what counts, not what the machine does meanwhile.
    node = make_node(toolkit_text(BODY), concurrency=1, queue=60, time_s=PATIENCE_S)
    burst = [node.submit("echo", {"value": n}) for n in range(100)]
    other = node.begin_inside(answer)
    refused = [ticket for ticket in burst if ticket.outcomes]
    assert refused
    assert all(ticket.failure.kind is Kind.OVERLOADED for ticket in refused)
    assert all(ticket.failure.limit == Limit("queue", 60, "calls") for ticket in refused)
    node.finish(other)
    assert other.value == "answered"
    assert sum(1 for ticket in burst if ticket.outcomes) <= len(refused) + 3
    node.finish(*burst)
    node.assert_healthy()


def test_deadline_runs_from_receipt_while_a_call_waits_in_the_queue(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text(BODY), time_s=5.0, concurrency=1)
    running = node.begin_inside(sleep)
    waiting = node.submit("echo", age_s=4.0)
    node.finish(waiting)
    assert not running.outcomes
    assert waiting.failure.kind is Kind.TIMEOUT
    assert "waited in the queue" in waiting.failure.error
    node.finish(running)


def test_parameters_of_16_mib_arrive_whole(make_node: NodeMaker) -> None:
    def measure(text: str, wide: str) -> list[object]:
        return [len(text), set(text) == {"x"}, len(wide), set(wide) == {"\u20ac"}]

    node = make_node(toolkit_text(BODY), memory_bytes=512 * MIB)
    text, wide = "x" * (MAX_REQUEST_BYTES - 1_000_000), "\u20ac" * 300_000
    assert node.inside(measure, text, wide) == [len(text), True, len(wide), True]
