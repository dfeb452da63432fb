"""Whatever a tool does, its call is answered in time, and what ran for it is gone soon after.

One table: a way to be stubborn, and where it is tried. What is simpler is in `test_calls.py`,
daemons and fork bombs are in `test_programs.py`, the level `container` is in `container_level.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import NodeMaker, ServedNode, processes_named, toolkit_text

from atp_sandbox.isolation import Isolation, Level
from atp_sandbox.outcome import Kind

TIME_S = 4.0
TIME_OF_A_JAIL_S = 7.0
"""The same where it counts the start of jails, which a busy machine makes slow."""
ANSWER_S = 2.0
"""From the deadline to the answer."""
GONE_S = 1.0
"""From the answer to the end of every process of the call."""
NOISE_S = 1.5
"""What a busy machine may add to the two above."""


# -- ways to be stubborn: each first takes the name by which it is seen from outside ---------------


def sleep_in_c_with_the_interpreter_lock(comm: str) -> None:
    import ctypes

    libc = ctypes.PyDLL(None)
    libc.prctl(15, comm.encode(), 0, 0, 0)
    libc.sleep(1000)


def backtrack_in_a_regular_expression(comm: str) -> None:
    import ctypes
    import re

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    re.match(r"(a+)+$", "a" * 64 + "b")


def multiply_large_numbers(comm: str) -> None:
    import ctypes

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    pow(3, 10**9)


def ignore_all_signals_and_block_them(comm: str) -> None:
    import ctypes
    import signal
    import time

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        time.sleep(1000)


def stop_itself(comm: str) -> None:
    import ctypes
    import os
    import signal

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    while True:
        os.kill(os.getpid(), signal.SIGSTOP)


def read_a_fifo_that_nobody_writes(comm: str) -> None:
    import ctypes
    import os

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    path = os.path.expanduser("~/fifo")
    os.mkfifo(path)
    os.open(path, os.O_RDONLY)


def run_threads_that_never_end(comm: str) -> None:
    import ctypes
    import threading

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    for _ in range(8):
        threading.Thread(target=threading.Event().wait).start()
    threading.Event().wait()


def daemons_in_sessions_of_their_own(comm: str) -> None:
    import ctypes
    import os
    import signal
    import time

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    for stops in (False, True):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                if stops:
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1000)
            os._exit(0)
    time.sleep(1000)


def tree_of_zombies(comm: str) -> None:
    import ctypes
    import os
    import time

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    for _ in range(6):
        if os.fork() == 0:
            for _ in range(4):
                if os.fork() == 0:
                    os._exit(0)  # never waited for
            time.sleep(1000)
    time.sleep(1000)


def wait_for_a_vfork_that_never_execs(comm: str) -> None:
    import ctypes
    import time

    libc = ctypes.PyDLL(None)
    libc.prctl(15, comm.encode(), 0, 0, 0)
    if libc.vfork() == 0:  # the parent cannot be scheduled until this one ends
        libc.pause()
    time.sleep(1000)


def clone_without_end(comm: str) -> None:
    import ctypes
    import os

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    while True:
        if os.fork() == 0:
            os._exit(0)
        os.wait()


def hop_from_process_to_process(comm: str) -> None:
    import ctypes
    import os
    import time

    ctypes.PyDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    if os.fork() == 0:
        while True:  # whoever is looked for has just ended, and left a child
            if os.fork():
                os._exit(0)
            os.setsid()
    time.sleep(1000)


ALONE: tuple[Callable[..., Any], ...] = (
    sleep_in_c_with_the_interpreter_lock,
    backtrack_in_a_regular_expression,
    multiply_large_numbers,
    ignore_all_signals_and_block_them,
    stop_itself,
    read_a_fifo_that_nobody_writes,
    run_threads_that_never_end,
)
WITH_PROCESSES: tuple[Callable[..., Any], ...] = (
    stop_itself,
    daemons_in_sessions_of_their_own,
    tree_of_zombies,
    wait_for_a_vfork_that_never_execs,
    clone_without_end,
    hop_from_process_to_process,
)
NONE = Isolation(Level.NONE)
CONTAINER = Isolation(Level.CONTAINER)


@pytest.fixture(autouse=True)
def healthy_afterwards(node: ServedNode) -> Iterator[None]:
    yield
    node.assert_healthy()


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker, request: pytest.FixtureRequest) -> ServedNode:
    own_jails = request.param.get("lifetime") == "jail" or "programs" in request.param
    time_s = TIME_OF_A_JAIL_S if own_jails else TIME_S
    return make_module_node(
        toolkit_text(), time_s=time_s, concurrency=8, processes=40, **request.param
    )


def hold(node: ServedNode, ways: tuple[Callable[..., Any], ...]) -> None:
    """All at once, so that it takes no longer than one; each is answered and gone in time."""
    assert node.toolkit is not None
    time_s = node.toolkit.settings.limits.time_s
    tickets = {}
    for number, way in enumerate(ways):
        comm = f"dl-{number}-{os.getpid() % 100_000}"
        tickets[comm] = node.begin_inside(way, comm)
    for comm, ticket in tickets.items():
        node.until(lambda c=comm: processes_named(c), f"{ticket.tool} {comm} at work")  # type: ignore[misc]
    node.finish(*tickets.values())
    node.until(
        lambda: not any(map(processes_named, tickets)), "their end", timeout_s=GONE_S + NOISE_S
    )
    for way, ticket in zip(ways, tickets.values(), strict=True):
        assert ticket.failure.kind is Kind.TIMEOUT, f"{way.__name__}: {ticket.failure}"
        assert time_s <= ticket.seconds < time_s + ANSWER_S + NOISE_S, way.__name__


@pytest.mark.parametrize(
    "node",
    [{"lifetime": "call"}, {"lifetime": "calls:4"}, {"lifetime": "jail"}, {"isolation": NONE}],
    ids=["call", "calls:4", "jail", "none"],
    indirect=True,
)
def test_no_tool_outlives_its_deadline(node: ServedNode) -> None:
    hold(node, ALONE)


@pytest.mark.parametrize(
    "node",
    [
        pytest.param({"programs": True}, id="strict"),
        pytest.param(
            {"programs": True, "isolation": CONTAINER},
            id="container",
            marks=pytest.mark.skipif(
                os.geteuid() == 0, reason="toolkits of root are other users', see container_level"
            ),
        ),
        pytest.param({"programs": True, "isolation": NONE}, id="none"),
    ],
    indirect=True,
)
def test_no_process_that_a_tool_starts_outlives_its_deadline(node: ServedNode) -> None:
    hold(node, WITH_PROCESSES)
