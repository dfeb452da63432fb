"""How long a process lives, what calls share, and that nothing outlives its process."""

from __future__ import annotations

import itertools
import os
from typing import Any

import psutil
import pytest
from conftest import NodeMaker, ServedNode, jail_processes, processes_named, toolkit_text

from atp_sandbox.outcome import Kind

BODY = """
    import os, random

    counter = [0]

    @tool
    def count(**_):
        counter[0] += 1
        return [counter[0], os.getpid(), random.random()]
"""


def counts(node: ServedNode, calls: int) -> list[Any]:
    return [node.call("count").value for _ in range(calls)]


def test_each_call_has_a_fresh_process_by_default(make_node: NodeMaker) -> None:
    seen = counts(make_node(toolkit_text(BODY)), 8)
    assert [row[0] for row in seen] == [1] * 8
    assert len({row[1] for row in seen}) == 8


def test_process_serves_so_many_calls_as_its_lifetime_says_and_no_more(
    make_node: NodeMaker,
) -> None:
    node = make_node(toolkit_text(BODY), lifetime="calls:3", concurrency=1)
    by_process: dict[int, list[int]] = {}
    for count, pid, _ in counts(node, 18):
        by_process.setdefault(pid, []).append(count)
    assert sum(map(len, by_process.values())) == 18
    assert all(rows == list(range(1, len(rows) + 1)) for rows in by_process.values())
    assert max(map(len, by_process.values())) == 3
    assert len(by_process) <= 9


def test_each_call_has_a_jail_of_its_own_with_lifetime_jail(make_node: NodeMaker) -> None:
    def look() -> list[object]:
        import os
        import time

        began = time.monotonic()
        names = ("pid", "mnt", "net", "ipc", "uts", "user")
        seen = [os.stat(f"/proc/self/ns/{name}").st_ino for name in names]
        left = os.path.expanduser("~/left")
        found = os.path.exists(left)
        open(left, "w").close()
        time.sleep(1.5)  # longer than one jail can be ready before the other
        return [began, time.monotonic(), seen, found]

    node = make_node(toolkit_text(BODY), lifetime="jail", concurrency=3)
    tickets = [node.begin_inside(look) for _ in range(6)]
    node.finish(*tickets)
    rows = sorted(ticket.value for ticket in tickets)
    assert not any(found for _, _, _, found in rows)
    # Numbers of namespaces are used again, so only jails that were there at once are compared.
    at_once = [(a, b) for a, b in itertools.combinations(rows, 2) if b[0] < a[1]]
    assert at_once
    assert all(set(a[2]).isdisjoint(b[2]) for a, b in at_once)
    assert {row[0] for row in counts(node, 2)} == {1}


@pytest.mark.parametrize("lifetime", ["call", "calls:2", "jail"])
def test_random_numbers_differ_between_workers(make_node: NodeMaker, lifetime: str) -> None:
    def draw() -> list[object]:
        import random
        import secrets
        import uuid

        return [random.random(), secrets.token_hex(8), uuid.uuid4().hex, random.getrandbits(64)]

    node = make_node("import random\nrandom.seed(1)\n" + toolkit_text(BODY), lifetime=lifetime)
    drawn = [node.inside(draw) for _ in range(6)]
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 6


def test_what_a_call_changes_is_gone_in_the_next(make_node: NodeMaker) -> None:
    def poison() -> None:
        import builtins
        import json
        import os
        import sys

        json.dumps = None  # type: ignore[assignment]
        builtins.len = None  # type: ignore[assignment]
        os.environ["LEFT"] = "over"
        sys.path.insert(0, "/scratch")
        os.chdir("/")

    def look() -> list[object]:
        import json
        import os
        import sys

        return [callable(json.dumps), len("ab"), os.environ.get("LEFT"), sys.path[0], os.getcwd()]

    node = make_node(toolkit_text(BODY), concurrency=1)
    for _ in range(4):
        node.finish(node.begin_inside(poison))
        assert node.inside(look) == [True, 2, None, "/toolkit", "/toolkit"]


@pytest.mark.parametrize("lifetime", ["call", "jail"])
def test_scratch_is_empty_for_each_call_and_shared_with_none(
    make_node: NodeMaker, lifetime: str
) -> None:
    def write(mine: int) -> list[object]:
        import os
        import time

        home = os.environ["HOME"]
        before = os.listdir(home)
        for number in range(20):
            with open(f"{home}/{mine}-{number}", "w") as file:
                file.write("x" * 1000)
        os.makedirs(f"{home}/a/b")
        time.sleep(0.05)
        others = [n for n in os.listdir(home) if n != "a" and not n.startswith(f"{mine}-")]
        return [before, others]

    node = make_node(toolkit_text(BODY), lifetime=lifetime)
    tickets = [node.begin_inside(write, n) for n in range(8 if lifetime == "jail" else 30)]
    node.finish(*tickets)
    assert {str(ticket.value) for ticket in tickets} == {"[[], []]"}


def test_scratch_is_limited_in_size_and_files(make_node: NodeMaker) -> None:
    def fill(what: str) -> str:
        import errno
        import os

        home = os.environ["HOME"]
        try:
            if what == "bytes":
                for number in range(64):
                    with open(f"{home}/{number}", "wb") as file:
                        file.write(b"x" * 1_000_000)
            else:
                for number in range(10_000):
                    open(f"{home}/{number}", "w").close()
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "no limit"

    node = make_node(toolkit_text(BODY), scratch_bytes=4 * 1024 * 1024, scratch_files=100)
    assert node.inside(fill, "bytes") in ("ENOSPC", "EFBIG")
    assert node.inside(fill, "files") == "ENOSPC"
    node.assert_healthy()


def warden_of_this_process() -> psutil.Process:
    """The one jail's first process, which is a child of ours."""
    children = jail_processes()
    (warden,) = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)
    return warden


@pytest.mark.parametrize(
    ("how", "kind", "said"),
    [
        ("error", Kind.TOOL_ERROR, "the tool's own words"),
        ("exit", Kind.CRASHED, "exit status 7"),
        ("signal", Kind.CRASHED, "SIGABRT"),
    ],
)
def test_end_of_a_call_is_told_as_it_was_however_late_the_warden_speaks(
    make_node: NodeMaker, how: str, kind: Kind, said: str
) -> None:
    """As on a machine where the warden waits half a second for its turn."""

    def end(how: str) -> None:
        import os
        import time

        time.sleep(0.3)
        match how:
            case "exit":
                os._exit(7)
            case "signal":
                os.abort()
            case _:
                raise ValueError("the tool's own words")

    node = make_node(toolkit_text(BODY))
    ticket = node.begin_inside(end, how)
    node.until(lambda: node.toolkit is not None and node.toolkit.running == 1, "one at work")
    warden = warden_of_this_process()
    warden.suspend()
    node.loop.run_until(lambda: False, 1.0)
    warden.resume()
    node.finish(ticket)
    assert ticket.failure.kind is kind
    assert said in ticket.failure.error


@pytest.mark.parametrize("victim", ["warden", "zygote"])
def test_loss_of_a_jail_is_answered_and_the_toolkit_comes_back(
    make_node: NodeMaker, victim: str
) -> None:
    def wait() -> None:
        import time

        time.sleep(1000)

    node = make_node(toolkit_text(BODY))
    warden = warden_of_this_process()
    zygote = min(warden.children(), key=psutil.Process.create_time)
    running = node.begin_inside(wait)
    node.until(lambda: node.toolkit is not None and node.toolkit.running == 1, "one at work")
    (warden if victim == "warden" else zygote).kill()
    node.finish(running)
    assert running.failure.kind is Kind.CRASHED
    assert "sandbox ended while the tool ran" in running.failure.error
    assert node.call("count").value[0] == 1
    node.assert_healthy()


def linger(comm: str, fork: bool) -> str:
    import ctypes
    import os
    import time

    libc = ctypes.CDLL(None)
    libc.prctl(15, comm.encode(), 0, 0, 0)
    if fork:
        try:
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    time.sleep(1000)
                os._exit(0)
        except PermissionError:
            return "may not fork"
        return "left a daemon"
    time.sleep(1000)
    return ""


@pytest.mark.parametrize("lifetime", ["call", "calls:5", "jail"])
def test_killed_worker_is_gone_from_the_machine(make_node: NodeMaker, lifetime: str) -> None:
    comm = f"atp-t-h-{os.getpid()}"  # the same test may run beside this one, for another lifetime
    node = make_node(toolkit_text(BODY), time_s=5.0, lifetime=lifetime)
    ticket = node.begin_inside(linger, comm, False)
    node.until(lambda: processes_named(comm), "the tool to be seen from outside")
    node.finish(ticket)
    assert ticket.failure.kind is Kind.TIMEOUT
    node.until(lambda: not processes_named(comm), "its end", timeout_s=1.0)


@pytest.mark.parametrize("lifetime", ["call", "jail"])
def test_daemon_that_a_tool_left_is_gone_a_second_after_the_call(
    make_node: NodeMaker, lifetime: str
) -> None:
    comm = f"atp-t-d-{os.getpid()}"
    node = make_node(toolkit_text(BODY), lifetime=lifetime)
    ticket = node.begin_inside(linger, comm, True)
    node.finish(ticket)
    assert ticket.value in ("left a daemon", "may not fork")
    node.until(lambda: not processes_named(comm), "its end", timeout_s=1.0)
    node.assert_healthy()


def test_own_words_of_a_tool_that_fails_are_its_answer_with_lifetime_jail(
    make_node: NodeMaker,
) -> None:
    """Its process may end before the warden has told how full its scratch is."""

    def fail() -> None:
        raise ValueError("my own words")

    node = make_node(toolkit_text(BODY), lifetime="jail")
    tickets = [node.begin_inside(fail) for _ in range(24)]
    node.finish(*tickets)
    assert {ticket.failure.error for ticket in tickets} == {"my own words"}


def test_memory_limit_is_named_with_lifetime_jail(make_node: NodeMaker) -> None:
    """There the kernel ends the zygote itself; that it was for memory is in its group's count."""

    def take() -> int:
        import time

        kept = bytearray(b"x") * (300 * 1024 * 1024)
        time.sleep(5)
        return len(kept)

    node = make_node(toolkit_text(BODY), lifetime="jail", memory_bytes=64 * 1024 * 1024)
    ticket = node.begin_inside(take)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.MEMORY_LIMIT
