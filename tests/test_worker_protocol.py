"""A worker's word is believed for its own call, once, and for nothing else."""

from __future__ import annotations

import pytest
from conftest import NodeMaker, ServedNode, toolkit_text

from atp_sandbox.outcome import Failure, Kind

TIME_S = 5.0
BODY = """
    @tool
    def echo(value=None, **_):
        return value
"""


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(toolkit_text(BODY), time_s=TIME_S)


def forge(what: str) -> str:
    import array
    import os
    import socket
    import sys

    frame = sys._getframe()
    while not {"channel", "call_id"} <= frame.f_locals.keys():
        assert frame.f_back is not None
        frame = frame.f_back
    channel = socket.socket(fileno=os.dup(frame.f_locals["channel"]))
    call_id = frame.f_locals["call_id"]
    frames = frame.f_globals["frames"]
    answer = frames.encode("answer", call_id, "result", b'"forged"')
    match what:
        case "three answers":
            channel.sendall(answer * 3)
        case "no answer, then silence":
            channel.shutdown(socket.SHUT_RDWR)
            while True:
                pass
        case "another call's answer":
            channel.sendall(frames.encode("answer", bytes(16), "result", b"1"))
        case "no JSON":
            channel.sendall(frames.encode("answer", call_id, "result", b"[1,"))
        case "unknown kind":
            channel.sendall(frames.encode("answer", call_id, "limit", b"1"))
        case "unknown message":
            channel.sendall(frames.encode("shutdown"))
        case "ready again":
            channel.sendall(frames.encode("ready", 1))
        case "garbage":
            channel.sendall(b"\0\0\0\x04\xc1\xc1\xc1\xc1")
        case "endless frame":
            channel.sendall(b"\xff\xff\xff\xff" + b"x" * 100)
        case "head of an endless answer":
            whole = frames.encode("answer", call_id, "result", b"x" * 5_000_000)
            channel.sendall(whole[:1000])
        case "a descriptor":
            rights = array.array("i", [os.open("/dev/null", os.O_RDONLY)])
            channel.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        case "another process":
            if os.fork() == 0:
                channel.sendall(answer)
                os._exit(0)
    while True:
        pass


@pytest.mark.parametrize(
    ("what", "kinds"),
    [
        ("three answers", {None}),  # the first is this worker's word; the rest ends it
        ("no answer, then silence", {Kind.CRASHED}),
        ("another call's answer", {Kind.CRASHED}),
        ("no JSON", {Kind.INVALID_RESULT}),
        ("unknown kind", {Kind.CRASHED}),
        ("unknown message", {Kind.CRASHED}),
        ("ready again", {Kind.CRASHED}),
        ("garbage", {Kind.CRASHED}),
        ("endless frame", {Kind.CRASHED}),
        ("head of an endless answer", {Kind.OUTPUT_LIMIT}),
        ("a descriptor", {Kind.CRASHED}),
        # Where a tool may not fork, it is its own exception.
        ("another process", {Kind.CRASHED, Kind.TOOL_ERROR}),
    ],
)
def test_forged_answer_ends_its_worker_and_reaches_no_other_call(
    node: ServedNode, what: str, kinds: set[Kind | None]
) -> None:
    ticket = node.begin_inside(forge, what)
    others = [node.submit("echo", {"value": n}) for n in range(5)]
    node.finish(ticket, *others)
    assert getattr(ticket.outcome, "kind", None) in kinds
    assert ticket.seconds < TIME_S, "the violation ended it, not the clock"
    assert [t.value for t in others] == list(range(5))

    node.assert_healthy()


def test_second_answer_of_a_reused_worker_is_no_answer_to_the_next_call(
    make_node: NodeMaker,
) -> None:
    """A late answer, kept by a thread that outlives the first call, must not be the second's."""

    def answer_later() -> str:
        import os
        import socket
        import sys
        import threading
        import time

        frame = sys._getframe()
        while not {"channel", "call_id"} <= frame.f_locals.keys():
            assert frame.f_back is not None
            frame = frame.f_back
        channel = socket.socket(fileno=os.dup(frame.f_locals["channel"]))
        call_id = frame.f_locals["call_id"]
        late = frame.f_globals["frames"].encode("answer", call_id, "result", b'"late"')

        def send() -> None:
            time.sleep(0.2)
            channel.sendall(late)

        threading.Thread(target=send, daemon=True).start()
        return "first"

    def wait() -> str:
        import time

        time.sleep(0.5)
        return "second"

    node = make_node(toolkit_text(BODY), lifetime="calls:10", concurrency=1)
    assert node.inside(answer_later) == "first"
    later = [node.begin_inside(wait) for _ in range(3)]  # one of them has the same process
    node.finish(*later)
    crashed = [t for t in later if isinstance(t.outcome, Failure)]
    assert [t.failure.kind for t in crashed] in ([], [Kind.CRASHED])
    assert {t.value for t in later if t not in crashed} == {"second"}
    node.assert_healthy()
