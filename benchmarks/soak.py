"""Many mixed calls through one `serve`, one in ten of them bad: does anything stay behind?

    python -m benchmarks.soak --calls 20000 --concurrency 16

The supervisor is a process of its own, spoken to over a real websocket. Each request id must be
answered exactly once and as expected; afterwards the supervisor must have as many descriptors,
threads and child processes as before. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.wire import Backend, Link, request_text

ROOT = Path(__file__).resolve().parents[1]

TIME_LIMIT_S = 2.0
WARM_UP_CALLS = 64
SETTLE_S = 20.0
"""For processes that were ended to be reaped, and for workers that wait ready to be made."""
GROUP_FILES_PER_SLOT = 12
"""Most descriptors that one worker's control group has (version 1, three controllers)."""
ANSWER_S = 60.0
"""Longest silence while answers are due."""

TOOLKIT = """
import asyncio, ctypes, os, signal, sys, time
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="x", app_name="soak")


def tool(function):
    return client.register_tool(function.__name__, ["value"], [], "d", None, None, None)(function)


@tool
def echo(value=None, **_):
    return value


@tool
async def wait_a_little(value=None, **_):
    await asyncio.sleep(0.005)
    return value


@tool
def print_much(value=None, **_):
    print("x" * 200_000)
    return value


@tool
def write_files(value=None, **_):
    for number in range(20):
        with open(f"{os.environ['HOME']}/{number}", "x") as file:
            file.write("x" * 1000)
    return value


@tool
def fail(value=None, **_):
    raise ValueError(value)


@tool
def segfault(**_):
    ctypes.string_at(0)


@tool
def exit_at_once(**_):
    os._exit(3)


@tool
def exit_politely(**_):
    sys.exit(4)


@tool
def kill_itself(**_):
    os.kill(os.getpid(), signal.SIGKILL)


@tool
def close_everything(**_):
    os.closerange(0, 1024)
    return 1


@tool
def hang(**_):
    while True:
        time.sleep(1)


@tool
def huge(**_):
    return "x" * 3_000_000


@tool
def hoard(**_):
    held = []
    while True:
        held.append(b"x" * 1_000_000)


client.start()
"""

GOOD = ("echo", "echo", "echo", "echo", "wait_a_little", "print_much", "write_files", "fail")
BAD = {
    "segfault": "crashed",
    "exit_at_once": "crashed",
    "exit_politely": "crashed",
    "kill_itself": "crashed",
    "close_everything": "crashed",
    "huge": "output_limit",
    "hoard": "memory_limit",
    "hang": "timeout",
}
BAD_WEIGHTS = (3, 3, 3, 3, 2, 4, 1, 1)
"""Hanging calls hold their place for the whole time limit, so that few of them fill the run."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process has that it could fail to give back."""

    descriptors: int
    """Without those on control groups, see `group_files`."""
    threads: int
    children: int

    @classmethod
    def of(cls, process: psutil.Process) -> Holdings:
        descriptors = process.num_fds() - group_files(process)
        return cls(descriptors, process.num_threads(), len(process.children(recursive=True)))


def group_files(process: psutil.Process) -> int:
    """Descriptors on control groups, which are made as they are needed, kept and used again."""
    count = 0
    for entry in os.listdir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += "/cgroup" in os.readlink(f"/proc/{process.pid}/fd/{entry}")
    return count


@dataclass(slots=True)
class Report:
    """What came out of one run; `faults` is empty if all was as it should be."""

    calls: int = 0
    seconds: float = 0.0
    calls_per_s: float = 0.0
    good_p50_ms: float = 0.0
    good_p99_ms: float = 0.0
    endings: dict[str, int] = field(default_factory=dict)
    before: Holdings | None = None
    after: Holdings | None = None
    group_files: int = 0
    resident_mb: tuple[float, float] = (0.0, 0.0)
    faults: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    tool: str
    value: object
    sent_at: float
    answers: int = 0


class _Soak:
    """Keeps `concurrency` calls under way until `calls` were made or `seconds` have passed."""

    def __init__(self, calls: int, concurrency: int, seconds: float, seed: int) -> None:
        self._random = random.Random(seed)
        self._wanted = calls
        self._concurrency = concurrency
        self._seconds = seconds
        self._calls: dict[int, _Call] = {}
        self._open = 0
        self._answered = asyncio.Event()
        self._latencies: list[float] = []
        self._endings: Counter[str] = Counter()
        self._backend = Backend(self)
        self.report = Report()

    async def run(self, folder: Path) -> Report:
        await self._backend.start()
        url = self._backend.url
        (folder / "soak.py").write_text(TOOLKIT)
        log_path = folder / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "atp_sandbox", "serve", str(folder / "soak.py")),
                    *("--base-url", url, "--state-dir", str(folder / "state")),
                    *("--time", f"{TIME_LIMIT_S}s", "--memory", "96M"),
                    *("--concurrency", str(self._concurrency), "--log-format", "json"),
                ],
                env={**os.environ, "ATP_API_KEY": "soak", "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            await self._measure(psutil.Process(process.pid))
            process.send_signal(signal.SIGTERM)
            status = await asyncio.to_thread(process.wait, 30)
            if status != 0:
                self.report.faults.append(f"serve ended with {status}")
        except Exception:
            sys.stderr.write(log_path.read_text()[-3_000:])
            raise
        finally:
            process.kill()
            process.wait()
            self._backend.close()
        return self.report

    async def _measure(self, process: psutil.Process) -> None:
        report = self.report
        await asyncio.wait_for(self._backend.connected.wait(), 60)
        await self._make(WARM_UP_CALLS, lambda: "echo")
        # What the warm-up made ready is what rests between calls.
        report.before = await self._settled(process, None)
        resident = process.memory_info().rss
        self._latencies.clear()
        self._endings.clear()
        first, began = len(self._calls), time.monotonic()
        await self._make(self._wanted, self._choose)
        report.seconds = round(time.monotonic() - began, 1)
        report.after = await self._settled(process, report.before)
        report.resident_mb = (
            round(resident / 1e6, 1),
            round(process.memory_info().rss / 1e6, 1),
        )
        report.calls = len(self._calls) - first
        report.calls_per_s = round(report.calls / max(report.seconds, 0.1), 1)
        self._latencies.sort()
        if self._latencies:
            count = len(self._latencies)
            report.good_p50_ms = round(self._latencies[count // 2] * 1000, 1)
            report.good_p99_ms = round(self._latencies[count * 99 // 100] * 1000, 1)
        report.endings = dict(self._endings.most_common())
        for number, call in self._calls.items():
            if call.answers != 1:
                report.faults.append(f"call {number} ({call.tool}): {call.answers} answers")
        if report.after != report.before:
            report.faults.append(f"holdings: {report.before} before, {report.after} after")
        report.group_files = group_files(process)
        if report.group_files > GROUP_FILES_PER_SLOT * (3 * self._concurrency + 10):
            report.faults.append(f"{report.group_files} descriptors on control groups")
        if self._backend.links != 1:
            report.faults.append(f"the link was opened {self._backend.links} times")

    async def _make(self, calls: int, choose: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._seconds
        while (calls > 0 and time.monotonic() < deadline) or self._open:
            while calls > 0 and self._open < self._concurrency and time.monotonic() < deadline:
                calls -= 1
                self._send(choose())
            if time.monotonic() >= deadline:
                calls = 0
            self._answered.clear()
            await asyncio.wait_for(self._answered.wait(), ANSWER_S)

    def _choose(self) -> str:
        if self._random.random() < 0.1:
            return self._random.choices(list(BAD), BAD_WEIGHTS)[0]
        return self._random.choice(GOOD)

    def _send(self, tool: str) -> None:
        number = len(self._calls)
        value = f"{number}-é-" + "v" * self._random.choice((0, 10, 300, 20_000))
        self._calls[number] = _Call(tool, value, time.monotonic())
        self._open += 1
        assert self._backend.link is not None
        self._backend.link.send_text(request_text(number, tool, {"value": value}))

    def link_opened(self, link: Link) -> None:
        pass

    def link_closed(self, link: Link) -> None:
        pass

    def pong_received(self, link: Link, payload: bytes) -> None:
        pass

    def text_received(self, link: Link, data: bytes) -> None:
        answer = json.loads(data)
        self._on_answer(answer["request_id"], answer["result"])

    def _on_answer(self, number: int, result: Any) -> None:
        call = self._calls[number]
        call.answers += 1
        if call.answers == 1:
            self._open -= 1
        kind = result.get("error_type", "?") if isinstance(result, dict) else "success"
        self._endings[kind] += 1
        if call.tool in BAD:
            is_right = kind == BAD[call.tool]
        else:
            self._latencies.append(time.monotonic() - call.sent_at)
            wanted = call.value
            if call.tool == "fail":
                wanted = {"error": call.value, "error_type": "tool_error", "retryable": False}
            is_right = result == wanted
        if not is_right:
            self.report.faults.append(f"call {number} ({call.tool}): {str(result)[:200]}")
        self._answered.set()

    async def _settled(self, process: psutil.Process, wanted: Holdings | None) -> Holdings:
        """Holdings once they are as `wanted`, or have not changed for a second; or at last."""
        deadline = time.monotonic() + SETTLE_S
        last, since = Holdings.of(process), time.monotonic()
        while time.monotonic() < deadline:
            await asyncio.sleep(0.1)
            now = Holdings.of(process)
            if now != last:
                last, since = now, time.monotonic()
            if now == wanted or (wanted is None and time.monotonic() - since > 1.0):
                break
        return last


def run_soak(
    calls: int, *, concurrency: int = 16, seconds: float = 3_600.0, seed: int = 0
) -> Report:
    """Make `calls` calls, or fewer if `seconds` are over before."""
    with tempfile.TemporaryDirectory(prefix="atp-soak-") as folder:
        return asyncio.run(_Soak(calls, concurrency, seconds, seed).run(Path(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3_600.0, help="send no more after that")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    report = run_soak(
        given.calls, concurrency=given.concurrency, seconds=given.seconds, seed=given.seed
    )
    print(json.dumps({**asdict(report), "faults": report.faults[:20]}, indent=2))
    if report.faults:
        print(f"{len(report.faults)} faults", file=sys.stderr)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
