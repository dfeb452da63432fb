"""Cases in which no toolkit is hostile: the network, the backend, the machine, signals.

Each function stands for one H case and returns the problems it found. Times are shorter than the
index says where that changes nothing but how long one waits.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from atp_sandbox.jails.processes import read_status

from .backend import BINARY, TEXT
from .harness import (
    ARM,
    BYSTANDER_P99_S,
    GONE_S,
    Call,
    Serve,
    Session,
    configuration,
    corpus_toolkit,
    descendants,
    percentile,
    processes,
    shorten,
)

BY_CLOCK = ("O1, pings", "O3: bystanders' p99")
"""How problems begin that a machine which is busy otherwise explains."""
ECHO = {"arm": ARM, "value": 1}
INERT = {"arm": "not armed"}


def _kind(call: Call) -> str:
    """`ok`, the error's kind, or `none`."""
    if call.reply is None:
        return "none"
    result = call.result
    return (
        str(result["error_type"]) if isinstance(result, dict) and "error_type" in result else "ok"
    )


def _collect(session: Session, calls: list[Call], timeout_s: float) -> dict[str, int]:
    """How many calls ended how."""
    deadline = time.monotonic() + timeout_s
    kinds: dict[str, int] = {}
    for call in calls:
        kind = _kind(session.finish(call, max(0.0, deadline - time.monotonic())))
        kinds[kind] = kinds.get(kind, 0) + 1
    return kinds


def _one_answer_each(session: Session, calls: list[Call]) -> list[str]:
    wrong = [c for c in calls if len(session.backend.replies_to(c.request_id)) != 1]
    if wrong:
        counts = [len(session.backend.replies_to(c.request_id)) for c in wrong]
        return [f"O2: answers to {len(wrong)} of {len(calls)} calls: {counts[:10]}"]
    strange = [key for key in list(session.backend.replies) if key not in session.backend.sent_ids]
    return [f"O2: answers to ids that nobody sent: {strange[:3]}"] if strange else []


def _same_connection(session: Session, before: Any) -> list[str]:
    return [] if session.backend.link is before else ["O1: the connection was lost"]


def _all_gone(pids: list[int], since: float) -> list[str]:
    """O6: none of these lives a second later."""
    while True:
        table = processes()
        left = [pid for pid in pids if pid in table and table[pid].state not in "ZX"]
        if not left:
            return []
        if time.monotonic() - since > GONE_S:
            return [f"O6: {len(left)} processes live on"]
        time.sleep(0.01)


@contextlib.contextmanager
def _bystanders(
    session: Session, tools: dict[str, dict[str, Any]], problems: list[str]
) -> Iterator[None]:
    """O1's pings and O3 around a block."""
    backend = session.backend
    first_sample, first_trip = len(backend.samples), len(backend.round_trips)
    backend.bystanders, backend.is_watching = tools, True
    try:
        yield
    finally:
        lost = backend.pause_bystanders()
        backend.forget_waiting()
    samples = backend.samples[first_sample:]
    if lost:
        problems.append(f"O3: {len(lost)} bystanders were never answered")
    faults = [s.fault for s in samples if s.fault]
    if faults:
        problems.append(f"O3: {len(faults)} bystanders failed: {faults[0]}")
    seconds = sorted(s.seconds for s in samples)
    if seconds and percentile(seconds, 0.99) > BYSTANDER_P99_S:
        problems.append(f"O3: bystanders' p99 of {len(seconds)}: {percentile(seconds, 0.99):.3f} s")
    slow = [s for _, s, _ in backend.round_trips[first_trip:] if s > 1.0]
    if slow:
        problems.append(f"O1, pings: {len(slow)} took more than a second, {max(slow):.2f} s")


def _is_at_rest(session: Session) -> bool:
    """O7: whether no more descriptors are open than at first, once a burst's surplus is used."""
    for _ in range(12):
        session.call("ok_echo", ECHO)
    return session.backend.wait_for(
        lambda: session.supervisor.open_files() <= session.resting_files, 3
    )


# -- the connection --------------------------------------------------------------------------------


def h01(session: Session) -> list[str]:
    calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 0.5}, "A") for _ in range(20)]
    time.sleep(0.2)
    session.backend.lose_link(1001)
    kinds = _collect(session, calls, 30)
    problems = [] if kinds == {"ok": 20} else [f"answer: {kinds}"]
    time.sleep(0.3)
    return problems + _one_answer_each(session, calls)


def h02(session: Session) -> list[str]:
    """Takes as long as the supervisor needs to notice."""
    before = session.backend.link
    calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 0.2}, "A") for _ in range(5)]
    session.backend.mute(True)
    if not session.backend.wait_for(lambda: session.backend.link is not before, 105):
        return ["O12: no new connection within 105 s"]
    kinds = _collect(session, calls, 20)
    problems = [] if kinds == {"ok": 5} else [f"answer: {kinds}"]
    return problems + _one_answer_each(session, calls)


def h03(session: Session) -> list[str]:
    backend = session.backend
    backend.close_at_once = True
    first = len(backend.attempts)
    backend.lose_link(1000)
    time.sleep(9)
    moments = backend.attempts[first:]
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    backend.close_at_once = False
    problems = []
    if not 2 <= len(moments) <= 8:
        problems.append(f"O7: {len(moments)} attempts within 9 s")
    if len(gaps) >= 3 and gaps[-1] < 1.2 * gaps[0]:
        problems.append(f"O7: the back-off does not grow: {[round(g, 2) for g in gaps]}")
    if not backend.wait_for(lambda: backend.link is not None, 40):
        return [*problems, "answer: never connected again"]
    call = session.call("ok_echo", ECHO)
    return problems if _kind(call) == "ok" else [*problems, f"answer: {shorten(call.result)}"]


def h04(session: Session) -> list[str]:
    start = session.supervisor.log_size()
    backend = session.backend
    request_id = backend.new_id("dup")
    params = {"arm": ARM}
    backend.request("ok_prints", params, None, request_id)
    backend.request("ok_prints", params, None, request_id)
    if backend.wait_reply(request_id, 5) is None:
        return ["answer: none"]
    backend.request("ok_prints", params, None, request_id)
    backend.wait_for(lambda: len(backend.replies_to(request_id)) > 1, 1)
    texts = {reply.raw for reply in backend.replies_to(request_id)}
    problems = [] if len(texts) == 1 else [f"O2: {len(texts)} different answers"]
    printed = [
        e
        for e in session.supervisor.events(start)
        if e["event"] == "tool_output" and e["request_id"] == json.dumps(request_id)
    ]
    if len(printed) != 1:
        problems.append(f"O2: the tool ran {len(printed)} times")
    del backend.replies[json.dumps(request_id)][1:]
    return problems


def h15(session: Session) -> list[str]:
    serve = session.supervisor
    before = serve.rss()
    calls = [session.send("ok_result", {"arm": ARM, "bytes": 900_000}, "A") for _ in range(60)]
    session.backend.mute(True)
    time.sleep(3)
    grown = serve.rss() - before
    connection = session.backend.connections[-1]
    session.backend.in_loop(lambda: connection.mute(False))
    kinds = _collect(session, calls, 30)
    problems = [] if kinds == {"ok": 60} else [f"answer: {kinds}"]
    # 54 MB of answers may wait, once; 32 MiB of them are kept for repeated requests besides.
    if grown > 160 * 1024 * 1024:
        problems.append(f"O7: the supervisor grew by {grown >> 20} MiB meanwhile")
    return problems + _one_answer_each(session, calls)


def h24(session: Session) -> list[str]:
    backend = session.backend
    names = set(backend.registered)
    backend.registered.clear()
    backend.lose_link(1012)
    if not backend.wait_for(lambda: names <= set(backend.registered), 15):
        missing = len(names - set(backend.registered))
        return [f"answer: {missing} of {len(names)} tools were not registered again"]
    call = session.call("ok_echo", ECHO)
    return [] if _kind(call) == "ok" else [f"answer: {shorten(call.result)}"]


# -- what the backend sends ------------------------------------------------------------------------


def h10(session: Session) -> list[str]:
    backend, link = session.backend, session.backend.link
    deep = (
        '{"message_type": "atp_tool_request", "payload":'
        ' {"request_id": "%s", "tool_name": "ok_echo", "params": %s}}'
    )
    nest = "[" * 100_000 + "]" * 100_000
    texts = {
        "many keys": json.dumps({**ECHO, **{f"key{n}": 0 for n in range(1_000_000)}}),
        "depth": '{"arm": "x", "value": ' + nest + "}",
        "NaN": '{"arm": "x", "value": NaN}',
        "infinity": '{"arm": "x", "value": 1e999}',
        "surrogate": '{"arm": "hostile-v1", "value": "\\ud800"}',
    }
    problems = []
    for name, params in texts.items():
        request_id = backend.new_id("odd")
        backend.sent_ids.add(json.dumps(request_id))
        backend.send_text(deep % (request_id, params))
        reply = backend.wait_reply(request_id, 15)
        if reply is None:
            problems.append(f"answer: none to {name}")
    problems += _same_connection(session, link)
    link = backend.link
    request_id = backend.new_id("odd")
    backend.sent_ids.add(json.dumps(request_id))
    backend.send_text(deep % (request_id, json.dumps({"arm": ARM, "value": "x" * (64 << 20)})))
    if backend.wait_reply(request_id, 10) is None:
        problems.append("answer: none to 64 MiB of parameters")
    problems += _same_connection(session, link)
    backend.wait_for(lambda: backend.link is not None, 10)
    call = session.call("ok_echo", ECHO)
    return problems if _kind(call) == "ok" else [*problems, f"answer: {shorten(call.result)}"]


def h11(session: Session) -> list[str]:
    backend, link = session.backend, session.backend.link
    odd: list[tuple[int, bytes]] = [
        (TEXT, text)
        for text in (
            b"",
            b"not json",
            b"[]",
            b"null",
            b"7",
            b"{}",
            b'{"message_type": 7}',
            b'{"message_type": "atp_tool_request"}',
            b'{"message_type": "atp_tool_request", "payload": []}',
            b'{"message_type": "atp_tool_request", "payload": {}}',
            b'{"message_type": "atp_tool_request", "payload": {"request_id": null}}',
            b'{"message_type": "\xc3\x9c"}',
            b"[" * 100_000,
            b"9" * 10_000,
        )
    ]
    odd.append((BINARY, b"\xff\xfe not json either"))
    odd.append((BINARY, b"[]"))
    for opcode, payload in odd:
        backend.send_raw(opcode, payload)
    request_id = backend.new_id("split")
    backend.sent_ids.add(json.dumps(request_id))
    whole = json.dumps(
        {
            "message_type": "atp_tool_request",
            "payload": {"request_id": request_id, "tool_name": "ok_echo", "params": ECHO},
        }
    ).encode()
    for number in range(len(whole)):
        first = (0x80 if number == len(whole) - 1 else 0) | (TEXT if number == 0 else 0)
        backend.send_raw(TEXT, whole[number : number + 1], first=first)
    problems = []
    if backend.wait_reply(request_id, 5) is None:
        problems.append("answer: none to a request in one-byte fragments")
    call = session.call("ok_echo", ECHO)
    if _kind(call) != "ok":
        problems.append(f"answer: {shorten(call.result)}")
    problems += _same_connection(session, link)
    if backend.odd_frames:
        problems.append(f"O2: {len(backend.odd_frames)} frames that are no answers")

    def lie() -> None:
        now = backend.link
        assert now is not None
        now.writer.write(b"\x81\x7f" + (1 << 40).to_bytes(8, "big") + b"x" * 1000)

    grown = session.supervisor.rss()
    backend.in_loop(lie)
    backend.wait_for(lambda: backend.link not in (None, link), 15)
    if session.supervisor.rss() - grown > 8 << 20:
        problems.append("O7: a length that was only announced cost memory")
    call = session.call("ok_echo", ECHO)
    if _kind(call) != "ok":
        problems.append(f"answer: after 2^40 bytes were announced: {shorten(call.result)}")
    if not _is_at_rest(session):
        problems.append("O7: descriptors are left")
    return problems


def h12(session: Session) -> list[str]:
    wanted: list[tuple[str, Any, str]] = [
        ("no_such_tool", {}, "unknown_tool"),
        ("", {}, "unknown_tool"),
        ("ok_echo", {}, "invalid_params"),
        ("ok_echo", [1], "invalid_params"),
        ("ok_echo", "text", "invalid_params"),
        ("ok_echo", 7, "invalid_params"),
        ("ok_echo", {"arm": ARM, "surplus": 1}, "ok"),
    ]
    calls = [session.send(tool, params, "A") for tool, params, _ in wanted]
    for call in calls:
        session.finish(call)
    problems = [
        f"answer: {tool} {params}: {_kind(call)}, wanted {kind}"
        for (tool, params, kind), call in zip(wanted, calls, strict=True)
        if _kind(call) != kind
    ]
    return problems + _one_answer_each(session, calls)


def h13(session: Session) -> list[str]:
    backend, link = session.backend, session.backend.link
    problems = []
    odd: list[Any] = [
        [1, "two"],
        7,
        -1,
        1.5,
        True,
        {"a": [1]},
        "",
        "x" * (10 << 20),
        2**70,
        "\ud800",
    ]
    for request_id in odd:
        backend.request("ok_echo", ECHO, None, request_id)
    for request_id in odd:
        if backend.wait_reply(request_id, 15) is None:
            problems.append(f"answer: none to the id {shorten(request_id, 40)}")
    count = len(backend.odd_frames)
    backend.send_text(
        json.dumps(
            {
                "message_type": "atp_tool_request",
                "payload": {"request_id": None, "tool_name": "ok_echo", "params": ECHO},
            }
        )
    )
    call = session.call("ok_echo", ECHO)
    if _kind(call) != "ok":
        problems.append(f"answer: {shorten(call.result)}")
    if len(backend.odd_frames) > count or backend.replies_to(None):
        problems.append("O2: an answer to the id null")
    return problems + _same_connection(session, link)


def h14(session: Session) -> list[str]:
    link = session.backend.link
    problems: list[str] = []
    with _bystanders(session, {}, problems):
        calls = [session.send("ok_echo", ECHO, "A") for _ in range(10_000)]
        kinds = _collect(session, calls, 60)
    if set(kinds) - {"ok", "overloaded"} or "overloaded" not in kinds or "ok" not in kinds:
        problems.append(f"answer: {kinds}")
    if not _is_at_rest(session):
        problems.append("O7: descriptors are left")
    return problems + _one_answer_each(session, calls) + _same_connection(session, link)


# -- signals ---------------------------------------------------------------------------------------


def h05(session: Session) -> list[str]:
    serve = session.supervisor
    calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 1}, "A") for _ in range(50)]
    time.sleep(0.3)
    pids = [p.pid for p in serve.jail_processes()]
    serve.process.kill()
    problems = _all_gone(pids, time.monotonic())
    serve.process.wait(10)
    again = Serve(
        session.cell, session.folder / "again", serve.config_path.read_text(), state=serve.state
    )
    session.serve = again
    again.wait_event("ready")
    kinds = _collect(session, calls, 20)
    if set(kinds) - {"ok", "interrupted"} or "interrupted" not in kinds:
        problems.append(f"answer: {kinds}")
    call = session.call("ok_echo", ECHO)
    if _kind(call) != "ok":
        problems.append(f"answer: after the restart: {shorten(call.result)}")
    return problems + _one_answer_each(session, calls)


def h06(session: Session) -> list[str]:
    calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 1}, "A") for _ in range(20)]
    time.sleep(0.3)
    pids = [p.pid for p in session.supervisor.jail_processes()]
    began = time.monotonic()
    session.supervisor.process.terminate()
    kinds = _collect(session, calls, session.time_s + 2)
    problems = []
    if set(kinds) - {"ok", "unavailable", "timeout"} or "ok" not in kinds:
        problems.append(f"answer: {kinds}")
    status = session.supervisor.process.wait(session.time_s + 10)
    if status != 0:
        problems.append(f"answer: exit status {status}")
    if time.monotonic() - began > session.time_s + 7:
        problems.append(f"O12: it took {time.monotonic() - began:.1f} s to end")
    return problems + _all_gone(pids, time.monotonic()) + _one_answer_each(session, calls)


def h07(session: Session) -> list[str]:
    problems = []
    process = session.supervisor.process
    process.send_signal(signal.SIGSTOP)
    calls = [session.send("ok_echo", ECHO, "A") for _ in range(5)]
    time.sleep(1)
    process.send_signal(signal.SIGCONT)
    kinds = _collect(session, calls, 10)
    if kinds != {"ok": 5}:
        problems.append(f"answer: after SIGCONT {kinds}")
    problems += _one_answer_each(session, calls)
    began = session.supervisor.log_size()
    calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 1.0}, "A") for _ in range(3)]
    process.send_signal(signal.SIGHUP)
    session.supervisor.wait_event("reload_unchanged", start=began)
    kinds = _collect(session, calls, 10)
    if kinds != {"ok": 3}:
        problems.append(f"O2: calls that ran at a reload: {kinds}")
    for number, times in ((signal.SIGINT, 1), (signal.SIGTERM, 2)):
        calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 1.0}, "A") for _ in range(3)]
        session.call("no_such_tool", {})  # so the calls before it have arrived
        time.sleep(0.2)
        pids = [p.pid for p in session.supervisor.jail_processes()]
        for _ in range(times):
            session.supervisor.process.send_signal(number)
            time.sleep(0.05)
        try:
            status = session.supervisor.process.wait(15)
        except subprocess.TimeoutExpired:
            problems.append(f"O6: still there after {number.name}")
            session.supervisor.process.kill()
            status = session.supervisor.process.wait(10)
        problems += [f"{p} ({number.name})" for p in _all_gone(pids, time.monotonic())]
        if status != 0:
            problems.append(f"answer: exit status {status} after {number.name}")
        if times == 1:
            kinds = _collect(session, calls, 0.5)
            if kinds != {"ok": 3}:
                problems.append(f"O2: calls that ran at {number.name}: {kinds}")
        old = session.supervisor
        folder = session.folder / f"after-{number.name}"
        session.serve = Serve(session.cell, folder, old.config_path.read_text(), state=old.state)
        session.supervisor.wait_event("ready")
    return problems


# -- workers ---------------------------------------------------------------------------------------


def _workers_of(session: Session, file: str) -> tuple[int, list[int]]:
    """The zygote of the jail that has this corpus file, and its workers."""
    serve = session.supervisor
    for warden in descendants(serve.pid):
        if warden.parent != serve.pid:
            continue
        with contextlib.suppress(OSError):
            if file in os.listdir(f"/proc/{warden.pid}/root/toolkit"):
                # By the jail's own numbers: the machine's begin again after 32,768 of them.
                by_number: dict[int, int] = {}
                for process in descendants(warden.pid):
                    with contextlib.suppress(ProcessLookupError):
                        by_number[read_status(process.pid).inner_pid] = process.pid
                below = [by_number[number] for number in sorted(by_number)]
                return below[0], below[1:]
    return 0, []


def h08(session: Session) -> list[str]:
    link = session.backend.link
    problems: list[str] = []
    calls: list[Call] = []
    chance = random.Random(8)
    with _bystanders(session, {"cr_sleep": INERT}, problems):
        end = time.monotonic() + 8
        while time.monotonic() < end:
            calls.append(session.send("ok_sleep", {"arm": ARM, "seconds": 0.05}, "A"))
            if chance.random() < 0.3:
                _, workers = _workers_of(session, "toolkit_good.py")
                if workers:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(workers), signal.SIGKILL)
            time.sleep(0.03)
        kinds = _collect(session, calls, session.time_s + 5)
    if set(kinds) - {"ok", "crashed"} or kinds.get("ok", 0) < len(calls) / 2:
        problems.append(f"answer: {kinds}")
    if not _is_at_rest(session):
        problems.append(
            f"O7: {session.supervisor.open_files()} descriptors, {session.resting_files} at rest"
        )
    return problems + _one_answer_each(session, calls) + _same_connection(session, link)


def h09(session: Session) -> list[str]:
    problems: list[str] = []
    _, workers = _workers_of(session, "toolkit_good.py")
    if not workers:
        return ["harness: no idle worker was found"]
    with _bystanders(session, {"cr_sleep": INERT}, problems):
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        call = session.send("ok_echo", {"arm": ARM, "value": "x" * (8 << 20)}, "A")
        session.finish(call, session.time_s + 2)
    if _kind(call) != "timeout":
        problems.append(f"answer: {_kind(call)}, wanted timeout")
    after = session.call("ok_echo", ECHO)
    if _kind(after) not in ("ok", "timeout"):
        problems.append(f"answer: the next call: {shorten(after.result)}")
    after = session.call("ok_echo", ECHO)
    if _kind(after) != "ok":
        problems.append(f"answer: the call after that: {shorten(after.result)}")
    return problems


def h22(session: Session) -> list[str]:
    problems: list[str] = []
    with _bystanders(session, {"ok_echo": ECHO}, problems):
        calls = [session.send("cr_os_exit", {"arm": ARM, "status": 9}, "A") for _ in range(100)]
        kinds = _collect(session, calls, session.time_s + 5)
    if set(kinds) - {"crashed", "unavailable", "overloaded"}:
        problems.append(f"answer: {kinds}")
    for _ in range(5):  # one call at a time may try
        after = session.call("cr_sleep", INERT, "B")
        if _kind(after) != "unavailable":
            break
        time.sleep(after.result["retry_after_s"])
    if _kind(after) != "ok":
        problems.append(f"answer: the next call: {shorten(after.result)}")
    return problems + _one_answer_each(session, calls)


# -- the machine -----------------------------------------------------------------------------------


def h16(folder: Path) -> list[str]:
    """State directory and log on a file system that is full."""
    small = folder / "small"
    small.mkdir(parents=True)
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0755", "tmpfs", str(small)], check=False
        ).returncode
        == 0
    )
    if not mounted:
        return ["harness: a small file system could not be mounted"]
    try:
        session = Session(small / "s", ("crash",), time="3s")
        try:
            link = session.backend.link
            with (
                contextlib.suppress(OSError),
                (small / "filler").open("wb", buffering=0) as file,
            ):
                while True:
                    file.write(bytes(4096))
            tools = (
                ("ok_prints", "ok"),
                ("ok_error", "tool_error"),
                ("ok_scratch", "ok"),
                ("cr_segv", "crashed"),
                ("ok_echo", "ok"),
            )
            calls = [session.send(tool, ECHO, "A") for tool, _ in tools]
            for call in calls:
                session.finish(call)
            problems = [
                f"answer: {tool} on a full disk: {_kind(call)}, wanted {kind}"
                for (tool, kind), call in zip(tools, calls, strict=True)
                if _kind(call) != kind
            ]
            return problems + _one_answer_each(session, calls) + _same_connection(session, link)
        finally:
            session.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


_JUMPING = """
import itertools, runpy, sys, time
jumps, real = itertools.cycle((0.0, 3600.0, 0.0, -3600.0)), time.time
time.time = lambda: real() + next(jumps)
sys.argv[0] = "atp_sandbox"
runpy.run_module("atp_sandbox", run_name="__main__")
"""


def h17(folder: Path) -> list[str]:
    """The wall clock jumps by an hour at each look at it."""
    with _served(
        folder, ("crash",), time="1s", command=(sys.executable, "-c", _JUMPING)
    ) as session:
        problems = []
        ok = session.call("ok_sleep", {"arm": ARM, "seconds": 0.3})
        if _kind(ok) != "ok":
            problems.append(f"answer: {shorten(ok.result)}")
        slow = session.call("cr_sleep", {"arm": ARM})
        assert slow.reply is not None
        if _kind(slow) != "timeout" or not 0.9 < slow.reply.at - slow.sent < 3:
            problems.append(f"O12: {_kind(slow)} after {slow.reply.at - slow.sent:.2f} s")
        return problems


def h18(folder: Path) -> list[str]:
    """Descriptors run out while calls come."""
    with _served(folder, ("crash",), time="3s", concurrency=8) as session:
        link = session.backend.link
        serve = session.supervisor
        most = serve.open_files() + serve.group_files() + 3
        limit = (most, resource.prlimit(session.supervisor.pid, resource.RLIMIT_NOFILE)[1])
        resource.prlimit(session.supervisor.pid, resource.RLIMIT_NOFILE, limit)
        calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 0.2}, "A") for _ in range(40)]
        kinds = _collect(session, calls, 10)
        problems = []
        if "none" in kinds or "internal_error" in kinds:
            problems.append(f"answer: {kinds}")
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(session.supervisor.pid, resource.RLIMIT_NOFILE, (1024, limit[1]))
        time.sleep(0.5)
        with contextlib.suppress(subprocess.TimeoutExpired):
            session.supervisor.process.wait(1)
            return [*problems, "O1: the supervisor ended"]
        after = session.call("ok_echo", ECHO)
        if _kind(after) != "ok":
            problems.append(f"answer: with descriptors again: {shorten(after.result)}")
        problems += _same_connection(session, link)
        return problems + _one_answer_each(session, calls)


def h19(folder: Path) -> list[str]:
    """No process can be started any more, then it can again."""
    group = Path(f"/sys/fs/cgroup/pids/atp-hostile-{os.getpid()}")
    try:
        group.mkdir()
    except OSError as error:
        return [f"harness: no pids cgroup can be made here: {error.strerror}"]

    def enter() -> None:
        (group / "cgroup.procs").write_text("0")

    try:
        with _served(folder, ("crash",), time="3s", before_exec=enter) as session:
            link = session.backend.link
            now = (group / "pids.current").read_text()
            (group / "pids.max").write_text(now)
            burnt = _cpu_s(session.supervisor.pid)
            calls = [session.send("ok_sleep", {"arm": ARM, "seconds": 0.1}, "A") for _ in range(12)]
            kinds = _collect(session, calls, 8)
            burnt = _cpu_s(session.supervisor.pid) - burnt
            problems = []
            if "none" in kinds or "internal_error" in kinds:
                problems.append(f"answer: {kinds}")
            if burnt > 1.5:
                problems.append(f"O7: {burnt:.1f} s of processor time while nothing could start")
            (group / "pids.max").write_text("max")
            deadline = time.monotonic() + 10
            while _kind(after := session.call("ok_echo", ECHO)) != "ok":
                if time.monotonic() > deadline:
                    problems.append(f"answer: when it can again: {shorten(after.result)}")
                    break
            problems += _same_connection(session, link)
            return problems + _one_answer_each(session, calls)
    finally:
        for _ in range(100):
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def h20(folder: Path) -> list[str]:
    """A layer that cannot be had: nothing is served, and the layer is named."""
    no_users = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    serve = (sys.executable, "-m", "atp_sandbox")
    ways: dict[str, tuple[tuple[str, ...], Callable[[], None] | None, str]] = {
        "no user namespaces": (
            ("unshare", "-Ur", "sh", "-c", no_users, "sh", *serve),
            None,
            "This machine cannot enforce",
        ),
        "unshare refused": (serve, _refuse_unshare, "namespace"),
    }
    problems = []
    with _backend_only(folder) as (session, config):
        for name, (command, before_exec, wanted) in ways.items():
            without = Serve(
                session.cell,
                folder / name.replace(" ", "-"),
                config,
                command=command,
                before_exec=before_exec,
            )
            try:
                status = without.process.wait(30)
            except subprocess.TimeoutExpired:
                without.stop()
                problems.append(f"answer: it serves ({name})")
                continue
            text = b"\n".join(without.log()).decode()
            if status != 1:
                problems.append(f"answer: exit status {status} ({name})")
            if wanted not in text:
                problems.append(f"O11: the layer is not named ({name}): {text[-500:]}")
            if "Traceback" in text:
                problems.append(f"O11: a traceback ({name})")
    return problems


def _refuse_unshare() -> None:
    """seccomp(2): unshare is refused with EPERM, for this process and what it starts."""
    nr_unshare = {"x86_64": 272, "aarch64": 97}[os.uname().machine]
    load_nr, jump_equal, give = 0x20, 0x15, 0x06
    refuse, allow = 0x00050001, 0x7FFF0000
    rows = ((load_nr, 0, 0, 0), (jump_equal, 0, 1, nr_unshare), (give, 0, 0, refuse),
            (give, 0, 0, allow))  # fmt: skip
    program = b"".join(struct.pack("=HBBI", *row) for row in rows)
    buffer = ctypes.create_string_buffer(program)
    head = ctypes.create_string_buffer(struct.pack("=H6xQ", len(rows), ctypes.addressof(buffer)))
    libc = ctypes.CDLL(None, use_errno=True)
    pr_set_no_new_privs, pr_set_seccomp, mode_filter = 38, 22, 2
    assert libc.prctl(pr_set_no_new_privs, 1, 0, 0, 0) == 0
    assert libc.prctl(pr_set_seccomp, mode_filter, ctypes.byref(head), 0, 0) == 0


def h21(folder: Path) -> list[str]:
    source = (Path(corpus_toolkit("good")["path"])).read_text()
    copy = folder / "edited.py"
    folder.mkdir(parents=True)
    copy.write_text(source)
    with _served(folder / "s", (), time="5s", overrides={"good": {"path": str(copy)}}) as session:
        running = session.send("ok_sleep", {"arm": ARM, "seconds": 1}, "A")
        time.sleep(0.2)
        copy.write_text("raise SystemExit('edited')\n")
        calls = [session.send("ok_echo", ECHO, "B") for _ in range(8)]
        kinds = _collect(session, [running, *calls], 10)
        problems = [] if kinds == {"ok": 9} else [f"answer: {kinds}"]
        return problems + _one_answer_each(session, [running, *calls])


def h23(folder: Path) -> list[str]:
    """A jail a call, and three seconds until each can serve."""
    slow = folder / "slow.py"
    folder.mkdir(parents=True)
    text = (Path(corpus_toolkit("crash")["path"])).read_text()
    slow.write_text(
        text.replace("import ctypes\n", "import ctypes\nimport time\ntime.sleep(3)\n", 1)
    )
    overrides = {"crash": {"path": str(slow), "lifetime": "jail"}}
    with _served(folder / "s", (), time="12s", overrides=overrides) as session:
        problems: list[str] = []
        with _bystanders(session, {"ok_echo": ECHO}, problems):
            calls = [session.send("cr_sleep", INERT, "A") for _ in range(3)]
            kinds = _collect(session, calls, 14)
        if kinds != {"ok": 3}:
            problems.append(f"answer: {kinds}")
        return problems + _one_answer_each(session, calls)


def h25(folder: Path) -> list[str]:
    with _served(folder, (), time="3s") as session:
        first = session.supervisor
        second = Serve(
            session.cell, folder / "second", first.config_path.read_text(), state=first.state
        )
        status = second.process.wait(30)
        text = b"\n".join(second.log()).decode()
        problems = [] if status == 1 else [f"answer: exit status {status}"]
        if "another atp-sandbox serves this link" not in text or "Traceback" in text:
            problems.append(f"O11: {text[-500:]}")
        call = session.call("ok_echo", ECHO)
        if _kind(call) != "ok":
            problems.append(f"answer: {shorten(call.result)}")
        return problems


# -- sessions for them -----------------------------------------------------------------------------


@contextlib.contextmanager
def _served(folder: Path, files: tuple[str, ...], **settings: Any) -> Iterator[Session]:
    session = Session(folder, files, **settings)
    try:
        yield session
    finally:
        session.close()


@contextlib.contextmanager
def _backend_only(folder: Path) -> Iterator[tuple[Session, str]]:
    """A session, and a configuration for one more supervisor with a key of its own."""
    with _served(folder / "s", (), time="3s") as session:
        key = folder / "other-key"
        key.write_text("key-of-another")
        key.chmod(0o600)
        yield session, configuration(session.backend, key, {"good": corpus_toolkit("good")})


SHARED: dict[str, Callable[[Session], list[str]]] = {
    "H12": h12,
    "H13": h13,
    "H04": h04,
    "H14": h14,
    "H09": h09,
    "H08": h08,
    "H22": h22,
    "H15": h15,
    "H01": h01,
    "H24": h24,
    "H11": h11,
    "H10": h10,
    "H03": h03,
}
"""One supervisor serves all of these, in this order: what costs the connection comes last."""

OWN_SESSION: dict[str, Callable[[Session], list[str]]] = {"H05": h05, "H06": h06, "H07": h07}

OWN_SETUP: dict[str, Callable[[Path], list[str]]] = {
    "H16": h16,
    "H17": h17,
    "H18": h18,
    "H19": h19,
    "H20": h20,
    "H21": h21,
    "H23": h23,
    "H25": h25,
}


class InBackground:
    """H02 waits for most of a minute; it does so while the others run."""

    def __init__(self, folder: Path) -> None:
        self._problems: list[str] = []
        self._thread = threading.Thread(target=self._run, args=(folder,))
        self._thread.start()

    def _run(self, folder: Path) -> None:
        try:
            with _served(folder, (), time="5s") as session:
                self._problems = h02(session)
        except Exception as error:  # told by `result`, in the test's own thread
            self._problems = [f"harness: {type(error).__name__}: {error}"]

    def result(self) -> list[str]:
        self._thread.join(110)
        return ["O12: it never ended"] if self._thread.is_alive() else self._problems
