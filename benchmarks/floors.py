"""Floors: what a fork and a round trip cost when nobody checks anything.

    python -m benchmarks.floors fork|two|pingpong [SECONDS]

Each measurement has a process of its own, which prints JSON.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import NoReturn

from benchmarks.measured import Measured
from benchmarks.work import VALUE

_SYS_CLONE = {"x86_64": 56, "aarch64": 220}
_LIBC = ctypes.CDLL(None, use_errno=True)
_DATA = VALUE.encode()
MAX_START_S = 60.0


def measure_fork_loop(seconds: float, megabytes: int = 0) -> Measured:
    """One raw fork for each echo, one after the other, with what a zygote has imported.

    `megabytes`: that much more memory which the forking process has touched.
    """
    return _result(_spawn("fork", seconds, megabytes), seconds)


def measure_fork_loop_two(seconds: float) -> Measured:
    """Two such loops at once: calls and processor time of both."""
    both = [_spawn("fork", seconds), _spawn("fork", seconds)]
    one, other = (_result(process, seconds) for process in both)
    return Measured(
        one.calls + other.calls,
        max(one.seconds, other.seconds),
        sorted(one.latencies_s + other.latencies_s),
        one.cpu_s + other.cpu_s,
    )


def measure_pingpong(seconds: float) -> Measured:
    """Round trips of 300 bytes over a socket pair between two processes."""
    return _result(_spawn("pingpong", seconds), seconds)


def _spawn(what: str, seconds: float, megabytes: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.floors", what, str(seconds), str(megabytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str], seconds: float) -> Measured:
    try:
        output, _ = process.communicate(timeout=MAX_START_S + seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    if process.returncode:
        raise RuntimeError(f"the floor ended with {process.returncode}")
    return Measured(**json.loads(output))


def _fork() -> int:
    """The system call alone: no at-fork hooks run, here or in the child."""
    number = _SYS_CLONE[os.uname().machine]
    pid: int = _LIBC.syscall(number, int(signal.SIGCHLD), None, None, None, None)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    return pid


def _echo_in_child(writing: int) -> NoReturn:
    os.write(writing, _DATA)
    os._exit(0)


def _fork_loop(seconds: float, megabytes: int) -> Measured:
    import workers.call  # with all that a zygote imports

    assert workers.call
    ballast = bytearray(b"x") * (megabytes << 20)
    gc.collect()
    gc.freeze()
    reading, writing = os.pipe()
    taken = []
    began = now = time.perf_counter()
    while now < began + seconds:
        pid = _fork()
        if not pid:
            _echo_in_child(writing)
        answer = os.read(reading, len(_DATA) + 1)
        _, status = os.waitpid(pid, 0)
        if answer != _DATA or status:
            raise AssertionError(f"a wrong answer: {answer!r}, status {status}")
        before, now = now, time.perf_counter()
        taken.append(now - before)
    assert len(ballast) == megabytes << 20
    return Measured(len(taken), now - began, sorted(taken))


def _pingpong(seconds: float) -> Measured:
    near, far = socket.socketpair()
    pid = _fork()
    if not pid:
        near.close()
        while data := far.recv(4096):
            far.sendall(data)
        os._exit(0)
    far.close()
    taken = []
    began = now = time.perf_counter()
    while now < began + seconds:
        near.sendall(_DATA)
        answer = near.recv(len(_DATA), socket.MSG_WAITALL)
        if answer != _DATA:
            raise AssertionError(f"a wrong answer: {answer!r}")
        before, now = now, time.perf_counter()
        taken.append(now - before)
    near.close()
    os.waitpid(pid, 0)
    return Measured(len(taken), now - began, sorted(taken))


def _cpu_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(what: str, seconds: str = "2", megabytes: str = "0") -> Measured:
    """Measure here."""
    before = _cpu_s()
    if what == "pingpong":
        measured = _pingpong(float(seconds))
    else:
        measured = _fork_loop(float(seconds), int(megabytes))
    measured.cpu_s = _cpu_s() - before
    return measured


if __name__ == "__main__":
    given = sys.argv[1:]
    if given[0] == "two":
        result = measure_fork_loop_two(float(given[1]) if given[1:] else 2.0)
    else:
        result = main(*given)
    print(json.dumps(dataclasses.asdict(result)))
