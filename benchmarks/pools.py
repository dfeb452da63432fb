"""Peers that are called directly: process pools, and bubblewrap with an interpreter per call.

    python -m benchmarks.pools NAME [WORK] [OUTSTANDING] [SECONDS]

Two workers each, a task of 300 bytes, `OUTSTANDING` tasks open at any time. Each measurement has a
process of its own, so that its threads and forks disturb nobody else; it prints JSON.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import importlib.util
import json
import multiprocessing
import queue
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from benchmarks.measured import Measured
from benchmarks.work import parse

WORKERS = 2
ANSWER_S = 60.0
"""Whoever has not answered by then never will."""
MAX_START_S = 120.0

POOLS = {
    "mp.Pool warm": "multiprocessing.Pool, start method fork",
    "mp.Pool one task": "multiprocessing.Pool(maxtasksperchild=1), start method fork",
    "ProcessPoolExecutor warm": "ProcessPoolExecutor, start method fork",
    "ProcessPoolExecutor one task": "ProcessPoolExecutor(max_tasks_per_child=1), start method"
    " forkserver (it refuses fork)",
    "pebble warm": "pebble.ProcessPool, start method fork",
    "pebble one task": "pebble.ProcessPool(max_tasks=1), start method fork",
    "billiard warm": "billiard.Pool, start method fork",
    "loky warm": "loky's reusable executor, its own start method (fork and exec)",
    "mp.Pool warm, callbacks": "multiprocessing.Pool, each result's callback submits the next task",
    "billiard warm, callbacks": "billiard.Pool, each result's callback submits the next task",
    "bubblewrap": "bwrap with every namespace unshared, and a bare interpreter, for each call",
}
"""What each name stands for."""
_NEEDS = {"pebble": "pebble", "billiard": "billiard", "loky": "loky"}

_INSIDE = """
import sys, json, time
work, value = json.load(sys.stdin)
if work == "sleep":
    time.sleep(value)
elif work == "cpu":
    until = time.process_time() + value
    while time.process_time() < until:
        pass
json.dump(value, sys.stdout)
"""
_BWRAP = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc"]

Done = Callable[[object], None]
Submit = Callable[[Done], None]
"""Submits one task; its answer, or the exception, is handed on from any thread."""


def missing(name: str) -> str:
    """What must be installed before this peer can be measured; empty if nothing."""
    if name == "bubblewrap":
        return "" if shutil.which("bwrap") else "bubblewrap"
    package = _NEEDS.get(name.split()[0], "")
    return package if package and importlib.util.find_spec(package) is None else ""


def measure_pool(name: str, work: str, outstanding: int, seconds: float) -> Measured:
    """In a process of its own; a wrong answer is a RuntimeError."""
    command = [sys.executable, "-m", "benchmarks.pools", name, work]
    command += [str(outstanding), str(seconds)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=MAX_START_S + seconds)
    if ran.returncode:
        raise RuntimeError(f"{name}: {ran.stderr[-2000:]}")
    return Measured(**json.loads(ran.stdout))


def _of_futures(submit: Callable[[], Any]) -> Submit:
    def finish(future: Any, done: Done) -> None:
        error = future.exception()
        done(error if error is not None else future.result())

    return lambda done: submit().add_done_callback(lambda future: finish(future, done))


def _open(name: str, work: str) -> Submit:
    """The pool itself; it ends with this process."""
    function, value = parse(work)
    kind, _, life = name.partition(" ")
    tasks = 1 if life == "one task" else None
    if kind in ("mp.Pool", "billiard"):
        maker: Any = multiprocessing.get_context("fork")
        if kind == "billiard":
            maker = importlib.import_module("billiard").get_context("fork")
        pool = maker.Pool(WORKERS, maxtasksperchild=tasks)
        return lambda done: pool.apply_async(function, (value,), callback=done, error_callback=done)
    if kind == "pebble":
        fork = multiprocessing.get_context("fork")
        pebble = importlib.import_module("pebble")
        pool = pebble.ProcessPool(WORKERS, max_tasks=tasks or 0, context=fork)
        return _of_futures(lambda: pool.schedule(function, args=[value]))
    if kind == "loky":
        pool = importlib.import_module("loky").get_reusable_executor(max_workers=WORKERS)
    elif kind == "ProcessPoolExecutor":
        context = multiprocessing.get_context("forkserver" if tasks else "fork")
        pool = concurrent.futures.ProcessPoolExecutor(
            WORKERS, mp_context=context, max_tasks_per_child=tasks
        )
    else:
        threads = concurrent.futures.ThreadPoolExecutor(256)
        return _of_futures(lambda: threads.submit(_bubblewrap, work.partition(":")[0], value))
    return _of_futures(lambda: pool.submit(function, value))


def _bubblewrap(work: str, value: object) -> object:
    command = [*_BWRAP, sys.executable, "-I", "-S", "-c", _INSIDE]
    ran = subprocess.run(
        command, input=json.dumps([work, value]), capture_output=True, text=True, check=True
    )
    return json.loads(ran.stdout)


def _run_callers(submit: Submit, expected: object, outstanding: int, seconds: float) -> Measured:
    """So many threads, each of which waits for its result before it asks again, as callers do."""
    answers: list[float] = []
    wrong: list[object] = []
    began = time.perf_counter()

    def call() -> None:
        results: queue.SimpleQueue[object] = queue.SimpleQueue()
        while (sent := time.perf_counter()) < began + seconds and not wrong:
            submit(results.put)
            answer = results.get(timeout=seconds + ANSWER_S)
            if answer != expected:
                wrong.append(answer)
            answers.append(time.perf_counter() - sent)

    callers = [threading.Thread(target=call) for _ in range(outstanding)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    if wrong:
        raise AssertionError(f"a wrong answer: {wrong[0]!r:.300}")
    return Measured(len(answers), time.perf_counter() - began, sorted(answers))


def _run(submit: Submit, expected: object, outstanding: int, seconds: float) -> Measured:
    """Keep so many tasks open for so long, without a thread for each, and wait for the last."""
    answers: collections.deque[float] = collections.deque()
    finished: queue.SimpleQueue[object] = queue.SimpleQueue()
    began = time.perf_counter()
    until = began + seconds

    def start() -> None:
        sent = time.perf_counter()

        def done(answer: object) -> None:
            now = time.perf_counter()
            if answer != expected:
                finished.put(answer)
                return
            answers.append(now - sent)
            if now >= until:
                finished.put(expected)
                return
            try:
                start()
            except Exception as error:  # a callback's exception would be swallowed by the pool
                finished.put(error)

        submit(done)

    for _ in range(outstanding):
        start()
    for _ in range(outstanding):
        answer = finished.get(timeout=seconds + ANSWER_S)
        if answer != expected:
            raise AssertionError(f"a wrong answer: {answer!r:.300}")
    return Measured(len(answers), time.perf_counter() - began, sorted(answers))


def _cpu_s() -> float:
    """Of this process and its children that have been waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main(
    name: str, work: str = "echo", outstanding: str = "16", seconds: str = "2"
) -> Measured | str:
    """Measure here; a text says why not."""
    if name not in POOLS:
        return f"no such peer: {name!r}; there is {', '.join(POOLS)}"
    if lacks := missing(name):
        return f"{name} needs {lacks}"
    submit, expected = _open(name, work), parse(work)[1]
    run = _run if name.endswith("callbacks") else _run_callers
    run(submit, expected, WORKERS, 0.1)  # warm
    before = _cpu_s()
    measured = run(submit, expected, int(outstanding), float(seconds))
    measured.cpu_s = _cpu_s() - before
    return measured


if __name__ == "__main__":
    result = main(*sys.argv[1:])
    if isinstance(result, str):
        sys.exit(result)
    print(json.dumps(dataclasses.asdict(result)), flush=True)
