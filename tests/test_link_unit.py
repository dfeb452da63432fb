"""One link with a backend that reads when it likes: bounded, in order, and nothing twice."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import PATIENCE_S, Peer, ScriptedServer

from atp_sandbox import crash_points, link_unit
from atp_sandbox.admission import ServedTool
from atp_sandbox.atp.address import LinkAddress
from atp_sandbox.atp.connection import LinkTimings
from atp_sandbox.atp.link import Connected
from atp_sandbox.atp.outbox import MAX_OUTBOX_BYTES
from atp_sandbox.discovery import Tool
from atp_sandbox.errors import UsageError
from atp_sandbox.journal import Journal
from atp_sandbox.limits import Limits
from atp_sandbox.link_unit import MAX_UNSENT_BYTES, MAX_WAITING_BYTES, CallContext, LinkUnit
from atp_sandbox.loop import Loop
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Success
from atp_sandbox.scheduling.verdict import timed_out
from atp_sandbox.settings import JournalMode

MIB = 1024 * 1024
TOOL = Tool(
    index=0,
    client=0,
    name="echo",
    params=(),
    required=(),
    description="",
    auth_provider=None,
    auth_type=None,
    auth_with=None,
    source="",
    needs_token=False,
)


class Served:
    """A link whose calls the test answers itself."""

    def __init__(self, url: str, journal: Journal) -> None:
        self.loop = Loop()
        self.calls: list[NodeCall] = []
        self.started: list[NodeCall] = []
        self.refused: list[Failure] = []
        tools = {"echo": ServedTool("kit", "app", TOOL)}
        self.unit = LinkUnit(
            self.loop, LinkAddress(url, "key", "0.2"), self, tools, b"secret", journal
        )
        self.unit._link.start()

    def submit(self, call: NodeCall) -> None:
        self.calls.append(call)
        assert isinstance(call.context, CallContext)
        self.unit.starting(call.context, lambda: self.started.append(call), self.refused.append)

    def answer(self, call: NodeCall, size_bytes: int) -> None:
        assert isinstance(call.context, CallContext)
        self.unit.answer(call.context, Success(json.dumps("x" * size_bytes)))

    def link_announced(self, unit: LinkUnit) -> None: ...
    def link_connected(self, unit: LinkUnit) -> None: ...
    def link_refused(self, unit: LinkUnit, reason: str) -> None: ...
    def link_closed(self, unit: LinkUnit) -> None: ...

    def until(self, condition: Callable[[], object]) -> None:
        assert self.loop.run_until(lambda: bool(condition()), PATIENCE_S)

    def beside(self, work: Callable[[], Any]) -> Any:
        """What `work` gives, run in a thread while the loop runs."""
        results: list[Any] = []

        def run() -> None:
            results.append(work())
            self.loop.call_from_thread(lambda: None)

        threading.Thread(target=run, daemon=True).start()
        self.until(lambda: results)
        return results[0]

    def close(self) -> None:
        self.unit.close()
        self.loop.run_until(lambda: self.unit._link.closed, PATIENCE_S)
        self.unit.release()
        self.loop.close()


def request(number: int) -> str:
    payload = {"request_id": number, "tool_name": "echo", "params": {}}
    return json.dumps({"message_type": "atp_tool_request", "payload": payload})


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def served(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    monkeypatch.setattr(
        link_unit, "LINK_TIMINGS", LinkTimings(backoff_first_s=0.02, backoff_cap_s=0.1)
    )
    made = Served(server.url, Journal(tmp_path / "journal", JournalMode.ON))
    yield made
    made.close()


def connect(served: Served, server: ScriptedServer) -> Peer:
    peer: Peer = served.beside(server.next)
    peer.accept()
    served.until(lambda: served.unit.is_connected)
    return peer


def answers(peer: Peer, count: int) -> list[Any]:
    """The next `count` answers; pings are answered on the way."""
    found: list[Any] = []
    while len(found) < count:
        frame = peer.frame()
        assert frame is not None
        opcode, data = frame
        if opcode == 0x89:
            peer.sock.sendall(bytes((0x8A, len(data))) + data)
        else:
            found.append(json.loads(data))
    return found


def test_a_call_starts_and_an_answer_goes_out_only_once_the_journal_has_them(
    served: Served, server: ScriptedServer, tmp_path: Path
) -> None:
    peer = connect(served, server)
    peer.send(request(1))
    served.until(lambda: served.started)
    (call,) = served.started
    committed: list[bool] = []
    commit = served.unit._journal.commit

    def note(*arguments: Any, **options: Any) -> bool:
        committed.append(not served.unit._link.unsent_bytes)
        return commit(*arguments, **options)

    served.unit._journal.commit = note  # type: ignore[method-assign]
    served.answer(call, 10)
    assert not served.unit._link.unsent_bytes
    assert len(served.beside(lambda: answers(peer, 1))) == 1
    assert committed[0]


@pytest.mark.parametrize("way", ["timer", "connected"])
def test_what_goes_on_with_waiting_answers_does_not_overtake_the_journal(
    served: Served, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """In the turn in which a call ends, before its answer is written down."""
    peer = connect(served, server)
    peer.send(request(1))
    served.until(lambda: served.started)
    unit, done = served.unit, []
    commit, send = unit._journal.commit, unit._link.send
    monkeypatch.setattr(
        unit._journal, "commit", lambda *a, **k: done.append("commit") or commit(*a, **k)
    )
    monkeypatch.setattr(unit._link, "send", lambda text: done.append("send") or send(text))
    served.answer(served.started[0], 10)
    if way == "timer":
        unit._flush_again()
    else:
        unit._on_state(Connected())
    assert len(served.beside(lambda: answers(peer, 1))) == 1
    assert done[0] == "commit"


def test_calls_are_refused_and_not_started_while_a_required_journal_cannot_be_written(
    server: ScriptedServer, tmp_path: Path
) -> None:
    served = Served(server.url, Journal(tmp_path / "journal", JournalMode.REQUIRED))
    try:
        peer = connect(served, server)
        served.unit._journal.commit = lambda *_, **__: False  # type: ignore[method-assign]
        peer.send(request(1))
        served.until(lambda: served.refused)
        assert served.started == []
    finally:
        served.close()


def test_a_required_journal_that_was_removed_costs_no_call(
    server: ScriptedServer, tmp_path: Path
) -> None:
    path = tmp_path / "journal"
    served = Served(server.url, Journal(path, JournalMode.REQUIRED))
    try:
        path.unlink()
        served.unit._upkeep()
        assert path.exists()
        assert served.unit._journal.refusal is None
    finally:
        served.close()


def test_a_backend_that_reads_nothing_is_asked_nothing_more_and_then_gets_everything_once(
    served: Served, server: ScriptedServer
) -> None:
    peer = connect(served, server)
    for number in range(60):
        peer.send(request(number))
    served.until(lambda: len(served.calls) == 60)
    for call in served.calls:
        served.answer(call, MIB)
    outbox = served.unit._session.outbox
    served.until(lambda: served.unit._link._connection._is_paused)  # type: ignore[union-attr]
    held = outbox.size_bytes + served.unit._link.unsent_bytes
    assert MAX_WAITING_BYTES < held <= MAX_OUTBOX_BYTES + MAX_UNSENT_BYTES + 2 * MIB
    peer.send(request(60))  # nobody takes it now
    served.loop.run_until(lambda: len(served.calls) > 60, 0.2)
    assert len(served.calls) == 60

    found = served.beside(lambda: answers(peer, 60))
    assert [answer["request_id"] for answer in found] == list(range(60))
    kinds = [
        answer["result"].get("error_type") for answer in found if isinstance(answer["result"], dict)
    ]
    # What could not be kept says so, and says that the tool ran.
    assert 20 < len(kinds) < 40
    assert set(kinds) == {"output_limit"}
    assert "The tool ran" in found[-1]["result"]["error"]
    served.until(lambda: len(served.calls) == 61)
    served.answer(served.calls[60], 1)
    assert served.beside(lambda: answers(peer, 1))[0]["request_id"] == 60


def test_a_call_that_failed_is_not_said_to_have_run_for_want_of_room(served: Served) -> None:
    """Its answer is hardly longer than the one that would stand for it."""
    unit = served.unit
    unit._on_message(request(1).encode())
    unit._session.reject("x" * MAX_OUTBOX_BYTES, served.loop.now())
    (call,) = served.calls
    assert isinstance(call.context, CallContext)
    unit.answer(call.context, timed_out(Limits(), was_running=False))
    *_, answer = unit._session.outbox.take(2 * MAX_OUTBOX_BYTES, served.loop.now())
    assert json.loads(answer)["result"]["error_type"] == "timeout"


def test_no_call_begins_while_the_backend_takes_no_answers(
    served: Served, server: ScriptedServer
) -> None:
    peer = connect(served, server)
    for number in range(40):
        peer.send(request(number))
    served.until(lambda: len(served.started) == 40)
    for call in served.started[:30]:
        served.answer(call, MIB)
    served.until(lambda: served.unit._link._connection._is_paused)  # type: ignore[union-attr]
    late = served.calls[30]
    assert isinstance(late.context, CallContext)
    served.unit.starting(late.context, lambda: served.started.append(late), served.refused.append)
    served.loop.run_until(lambda: len(served.started) > 40, 0.2)
    assert len(served.started) == 40
    served.beside(lambda: answers(peer, 30))
    served.until(lambda: len(served.started) == 41)
    assert served.refused == []


def test_what_no_pong_confirmed_comes_again_on_each_connection_until_one_does(
    served: Served, server: ScriptedServer
) -> None:
    peer = connect(served, server)
    peer.send(request(1))
    served.until(lambda: served.calls)
    served.answer(served.calls[0], 10)
    frames = [served.beside(peer.frame) for _ in range(2)]
    assert [frame[0] for frame in frames] == [0x81, 0x89]
    for _ in range(3):
        assert not served.unit.is_settled
        peer.abort()
        served.until(lambda: not served.unit.is_connected)
        peer = connect(served, server)
        assert [served.beside(peer.frame) for _ in range(2)] == frames
    peer.sock.sendall(b"\x8a\x011")
    served.until(lambda: served.unit.is_settled)
    peer.abort()
    served.until(lambda: not served.unit.is_connected)
    peer = connect(served, server)
    peer.send(request(2))
    served.until(lambda: len(served.calls) == 2)
    served.answer(served.calls[1], 10)
    assert served.beside(lambda: answers(peer, 1))[0]["request_id"] == 2


def test_a_burst_of_answers_has_few_pings(served: Served, server: ScriptedServer) -> None:
    peer = connect(served, server)
    for number in range(500):
        peer.send(request(number))
    served.until(lambda: len(served.calls) == 500)
    for call in served.calls:
        served.answer(call, 10)
    opcodes = served.beside(lambda: [peer.frame()[0] for _ in range(501)])  # type: ignore[index]
    assert opcodes.count(0x89) == 1


@pytest.mark.parametrize("text", ["after-lunch", "after-send:x", "-1"])
def test_an_unknown_crash_point_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no point"):
        crash_points.arm({crash_points.VARIABLE: text})


@pytest.mark.alone
def test_a_ping_does_not_hold_up_the_next_request_of_a_peer_with_nagles_algorithm(
    served: Served, server: ScriptedServer
) -> None:
    """RFC 896: it sends no small piece until we have acknowledged the last, here its pong."""
    peer = connect(served, server)
    assert not peer.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    rounds: list[int] = []

    def ask(count: int) -> int:
        """How many of so many calls took long, each right after a pong."""
        slow = 0
        for number in range(count):
            began = time.monotonic()
            peer.send(request(number + 1_000 * len(rounds)))
            answers(peer, 1)
            slow += time.monotonic() - began > 0.03
            ping = peer.frame()
            assert ping is not None
            assert ping[0] == 0x89
            peer.sock.sendall(bytes((0x8A, len(ping[1]))) + ping[1])
        return slow

    served.submit = lambda call: served.answer(call, 10)  # type: ignore[method-assign]
    for _ in range(3):
        rounds.append(served.beside(lambda: ask(20)))
    assert min(rounds) == 0
