"""Toolkits that may start programs: they run, they are as confined, and nothing of a call stays."""

from __future__ import annotations

import os
from typing import Any

import pytest
from conftest import NodeMaker, ServedNode, processes_named, toolkit_text

from atp_sandbox.outcome import Kind, Success
from atp_sandbox.settings import ToolkitSettings

BODY = """
    import os, subprocess, sys

    @tool
    def run(command, **_):
        done = subprocess.run(command, shell=isinstance(command, str), capture_output=True,
                              text=True)
        return [done.returncode, done.stdout, done.stderr]
"""


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(toolkit_text(BODY), programs=True, time_s=20.0, concurrency=2)


def run(node: ServedNode, command: str | list[str]) -> Any:
    ticket = node.submit("run", {"command": command})
    node.finish(ticket)
    return ticket.value


# -- they run --------------------------------------------------------------------------------------


def test_programs_and_shells_run(node: ServedNode) -> None:
    assert run(node, ["/bin/echo", "hello"]) == [0, "hello\n", ""]
    assert run(node, "echo one | tr a-z A-Z > $HOME/x && cat $HOME/x") == [0, "ONE\n", ""]


def test_the_interpreter_runs_as_a_program(node: ServedNode) -> None:
    def attempt() -> str:
        import subprocess
        import sys

        source = "import json, msgpack; print(json.dumps(list(range(3))))"
        command = [sys.executable, "-c", source]
        environment = {"PYTHONPATH": ":".join(path for path in sys.path if "packages" in path)}
        return subprocess.check_output(command, text=True, env=environment)

    assert node.inside(attempt) == "[0, 1, 2]\n"


def test_multiprocessing_works(node: ServedNode) -> None:
    def attempt() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2, -3])

    assert node.inside(attempt) == [1, 2, 3]


def test_asyncio_subprocesses_work(node: ServedNode) -> None:
    def attempt() -> str:
        import asyncio

        async def talk() -> str:
            process = await asyncio.create_subprocess_exec(
                "/bin/cat", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
            out, _ = await process.communicate(b"through a pipe")
            return out.decode()

        return asyncio.run(talk())

    assert node.inside(attempt) == "through a pipe"


# -- they are confined -----------------------------------------------------------------------------


def test_a_program_has_no_more_than_its_tool(node: ServedNode) -> None:
    status = dict(
        line.split(":\t", 1) for line in run(node, "cat /proc/self/status")[1].splitlines()
    )
    assert {status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
    for command in (
        "mount -t tmpfs x /tmp",
        "unshare -U true",
        "chroot / true",
        "echo x > /toolkit/x",
        "cp /bin/true $HOME/t && $HOME/t",
        "cat /root/.bashrc",
    ):
        assert run(node, command)[0] != 0, command


def test_programs_have_no_name_where_none_may_be_started(make_node: NodeMaker) -> None:
    def attempt() -> list[bool]:
        import os

        return [os.path.exists(path) for path in ("/bin/sh", "/usr/bin/env")]

    assert make_node(toolkit_text()).inside(attempt) == [False, False]
    assert make_node(toolkit_text(), programs=True).inside(attempt) == [True, True]


def test_programs_need_a_jail_a_call() -> None:
    with pytest.raises(ValueError, match="needs the lifetime jail"):
        ToolkitSettings("kit", __file__, may_start_programs=True)  # type: ignore[arg-type]


# -- nothing stays, nothing else answers -----------------------------------------------------------


def leave(comm: str, how: str) -> str:
    import ctypes
    import os
    import signal
    import time

    def rest() -> None:
        ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.close(reader)
            os.write(writer, b"x")
            os.close(writer)
            rest()
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    if how == "while it runs":
        rest()
    return "left"


@pytest.mark.parametrize("how", ["daemon", "stopped"])
def test_daemon_that_a_tool_left_is_gone_a_second_after_the_call(
    node: ServedNode, how: str
) -> None:
    comm = f"atp-p-{how[:3]}-{os.getpid() % 10000}"
    ticket = node.begin_inside(leave, comm, how)
    node.finish(ticket)
    assert ticket.value == "left"
    node.until(lambda: not processes_named(comm), "its end", timeout_s=1.0)
    node.assert_healthy()


def test_processes_of_a_call_that_is_stopped_go_with_it(make_node: NodeMaker) -> None:
    comm = f"atp-p-run-{os.getpid() % 10000}"
    node = make_node(toolkit_text(), programs=True, time_s=8.0)  # its jail has to start, too
    ticket = node.begin_inside(leave, comm, "while it runs")
    node.until(lambda: len(processes_named(comm)) == 2, "both to be seen from outside")
    node.finish(ticket)
    assert ticket.failure.kind is Kind.TIMEOUT
    node.until(lambda: not processes_named(comm), "their end", timeout_s=1.0)


def test_child_that_comes_out_of_the_tool_does_not_answer(node: ServedNode) -> None:
    def attempt() -> str:
        import os

        child = os.fork()
        if child == 0:
            return "the child's answer"
        return f"the parent's, the child's status was {os.waitpid(child, 0)[1]}"

    assert node.inside(attempt) == "the parent's, the child's status was 0"
    node.assert_healthy()


def test_answer_of_a_child_is_not_taken_for_its_tools(node: ServedNode) -> None:
    def attempt(forge: bool) -> str:
        import os
        import sys
        import time

        frames = sys.modules["_atp_jail.frames"]
        frame = sys._getframe()
        while frame is not None and "call_id" not in frame.f_locals:
            frame = frame.f_back
        channel, call_id = frame.f_locals["channel"], frame.f_locals["call_id"]
        sent = frames.encode("answer", call_id, "result", b'"forged"')
        if not forge:
            os.write(channel, sent)
        elif os.fork() == 0:
            os.write(channel, sent)
            os._exit(0)
        time.sleep(1000)
        return "unreachable"

    ticket = node.begin_inside(attempt, True)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.CRASHED
    # The control: from the tool itself, whose answer is its own to give, the same bytes are one.
    ticket = node.begin_inside(attempt, False)
    node.finish(ticket)
    assert ticket.value == "forged"
    node.assert_healthy()


def test_fork_bomb_stays_in_its_jail(make_node: NodeMaker) -> None:
    def bomb() -> None:
        import os

        while True:
            try:
                os.fork()
            except OSError:
                continue

    time_s = 6.0
    node = make_node(toolkit_text(BODY), programs=True, time_s=time_s, processes=20, concurrency=2)
    bystander = node.submit("run", {"command": ["/bin/sleep", "1"]})
    ticket = node.begin_inside(bomb)
    node.finish(ticket, bystander)
    assert ticket.failure.kind in (Kind.TIMEOUT, Kind.PROCESS_LIMIT)
    assert isinstance(bystander.outcome, Success)
    assert ticket.seconds < time_s + 2.0
    node.assert_healthy()


def test_memory_of_children_counts(make_node: NodeMaker) -> None:
    def spread() -> int:
        import os
        import time

        for _ in range(4):
            if os.fork() == 0:
                kept = bytearray(os.urandom(1)) * (40 * 1024 * 1024)
                time.sleep(1000)
                os._exit(len(kept))
        return sum(os.wait()[1] for _ in range(4))

    node = make_node(toolkit_text(), programs=True, time_s=15.0, memory_bytes=100 * 1024 * 1024)
    ticket = node.begin_inside(spread)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.MEMORY_LIMIT
    node.assert_healthy()
