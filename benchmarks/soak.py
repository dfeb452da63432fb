"""Many mixed calls through one `serve`, one in ten of them bad: does anything stay behind?

    python -m benchmarks.soak [--calls 20000] [--minutes M | --hours H] [--concurrency 16]

The supervisor is a process of its own, spoken to over a real websocket; it serves one toolkit for
each lifetime. Each request id must be answered exactly once and as expected. Afterwards the
supervisor must have as many descriptors, threads, child processes, mounts and files as before, and
once it knows as many answered requests as it ever will, its memory must not grow. When it has
ended, nothing of it may be left. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import glob
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from atp_sandbox.atp.session import MAX_KEPT_ANSWERS, MAX_REMEMBERED
from benchmarks.system import ROOT, configuration
from benchmarks.wire import Backend, Link, request_text

TIME_LIMIT_S = 4.0
JAIL_TIME_LIMIT_S = 8.0
WARM_UP_CALLS = 64
CALM_CALLS = {"call_": 20, "calls_": 80, "jail_": 3}
"""Enough for each worker that a burst has left waiting to have served what it may serve."""
SETTLE_S = 20.0
"""For processes that were ended to be reaped, and for workers that wait ready to be made."""
QUIET_S = 0.2
GROUP_FILES_PER_SLOT = 12
"""Most descriptors that one worker's control group has (version 1, three controllers)."""
ANSWER_S = 60.0
"""Longest silence while answers are due."""
SCRATCH_ROOT = Path("/run/atp-sandbox")
GONE_S = 10.0
SAMPLE_S = 1.0
PROGRESS_S = 60.0
STEADY_CALLS = 2 * MAX_KEPT_ANSWERS
"""From then on, the texts of answers that a supervisor keeps do not become more."""
FULL_CALLS = MAX_REMEMBERED + 1_000
"""From then on, nor do the requests that it knows again."""
MIN_SLOPE_CALLS = 5_000
MAX_STEADY_SLOPE_KIB = 1_000.0
MAX_FULL_SLOPE_KIB = 64.0
"""Over 1,000 calls: while it learns, most of a KiB for each; then nothing, give or take."""

TOOLKIT = """
import asyncio, ctypes, os, signal, sys, time
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="x", app_name="soak")


def tool(function):
    name = "PREFIX" + function.__name__
    return client.register_tool(name, ["value"], [], "d", None, None, None)(function)


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
        with open(f"{os.environ['HOME']}/{number}", "w") as file:
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


CALLS_PER_WORKER = 4
LIFETIMES = {"call_": "call", "calls_": f"calls:{CALLS_PER_WORKER}", "jail_": "jail"}
WEIGHTS = (60, 38, 2)
"""Of the lifetimes above: a jail for each call takes fifty times as long."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a supervisor has that it could fail to give back."""

    descriptors: int
    """Without those on control groups, see `group_files`."""
    threads: int
    children: int
    mounts: int
    """At places of ours, as the supervisor sees them."""
    files: int
    """In its state directory and in the places for scratch."""

    @classmethod
    def of(cls, process: psutil.Process, state: Path) -> Holdings:
        return cls(
            descriptors=process.num_fds() - group_files(process),
            threads=process.num_threads(),
            children=len(process.children(recursive=True)),
            mounts=len(mounts_of(process.pid, state)),
            files=sum(len(names) for _, _, names in os.walk(state)) + len(scratch_of(process.pid)),
        )


def group_files(process: psutil.Process) -> int:
    """Descriptors on control groups, which are made as they are needed, kept and used again."""
    count = 0
    for entry in os.listdir(f"/proc/{process.pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            count += "/cgroup" in os.readlink(f"/proc/{process.pid}/fd/{entry}")
    return count


def groups_of(pid: int) -> list[str]:
    """Control groups that this supervisor has made."""
    tops = glob.glob(f"/sys/fs/cgroup/**/atp-sandbox/{pid}-*", recursive=True)
    return [folder for top in tops for folder, _, _ in os.walk(top)]


def mounts_of(pid: int, state: Path) -> list[str]:
    """Mount points at places of ours in that process's mount namespace."""
    rows = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    points = [row.split()[4] for row in rows]
    return [point for point in points if point.startswith((str(state), str(SCRATCH_ROOT)))]


def scratch_of(pid: int) -> list[Path]:
    """Scratch directories of this supervisor's jails, where they are plain directories."""
    return list(SCRATCH_ROOT.glob(f"scratch-{pid}-*"))


def slope_kib(samples: Sequence[tuple[int, int]]) -> float | None:
    """Growth in KiB over 1,000 calls, of (calls, bytes): least squares; None if too few calls."""
    if len(samples) < 3 or samples[-1][0] - samples[0][0] < MIN_SLOPE_CALLS:
        return None
    slope, _ = statistics.linear_regression(*zip(*samples, strict=True))
    return slope * 1_000 / 1_024


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
    groups: int = 0
    resident_mb: tuple[float, float] = (0.0, 0.0)
    own_mb: tuple[float, float] = (0.0, 0.0)
    """Memory that nobody shares (USS)."""
    own_kib_per_1000_calls: float | None = None
    """Over all but the first calls; None if there were too few."""
    own_kib_allowed: float | None = None
    machine_mounts: tuple[int, int] = (0, 0)
    """Of everybody, for information."""
    faults: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    tool: str
    value: object
    sent_at: float
    answers: int = 0


class _Soak:
    """Keeps `concurrency` calls under way until `calls` were made or `seconds` have passed."""

    def __init__(
        self,
        calls: int,
        concurrency: int,
        seconds: float,
        seed: int,
        on_progress: Callable[[str], None],
    ) -> None:
        self._random = random.Random(seed)
        self._wanted = calls
        self._concurrency = concurrency
        self._seconds = seconds
        self._on_progress = on_progress
        self._state = Path()
        self._samples: list[tuple[int, int]] = []
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
        self._state = folder / "state"
        key = folder / "key"
        key.write_text("soak")
        key.chmod(0o600)
        for prefix in LIFETIMES:
            (folder / f"{prefix}.py").write_text(TOOLKIT.replace("PREFIX", prefix))
        limits: dict[str, object] = {
            "time": f"{TIME_LIMIT_S:g}s",
            "memory": "96M",
            "concurrency": self._concurrency,
        }
        toolkits: dict[str, dict[str, object]] = {
            prefix: {"path": f"{prefix}.py", "lifetime": lifetime}
            for prefix, lifetime in LIFETIMES.items()
        }
        # Its calls begin with a jail: few at once, and with time for that.
        toolkits["jail_"] |= {
            "concurrency": 2,
            "time": f"{max(TIME_LIMIT_S, JAIL_TIME_LIMIT_S):g}s",
        }
        config = folder / "atp-sandbox.toml"
        config.write_text(configuration(url, key, limits, toolkits))
        log_path = folder / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "atp_sandbox", "serve", "--config", str(config)),
                    *("--state-dir", str(self._state), "--log-format", "json"),
                ],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            await self._measure(psutil.Process(process.pid))
            await self._end(process)
        except Exception:
            sys.stderr.write(log_path.read_text()[-3_000:])
            raise
        finally:
            process.kill()
            process.wait()
            self._backend.close()
        return self.report

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Nothing is left of it."""
        faults = self.report.faults
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(process.wait, 30)
        if status != 0:
            faults.append(f"serve ended with {status}")
        _, left = await asyncio.to_thread(psutil.wait_procs, family, GONE_S)
        faults += [f"process {one.pid} is left" for one in left]
        faults += [f"the group {name} is left" for name in groups_of(process.pid)]
        faults += [f"{path} is left" for path in scratch_of(process.pid)]
        faults += [f"{point} is still mounted" for point in mounts_of(os.getpid(), self._state)]

    async def _watch(self, process: psutil.Process) -> None:
        """Memory over the run, and a line each minute."""
        began = told = time.monotonic()
        while True:
            own = process.memory_full_info().uss
            if len(self._calls) > STEADY_CALLS:
                self._samples.append((len(self._calls), own))
            if time.monotonic() - told >= PROGRESS_S:
                told = time.monotonic()
                self._on_progress(
                    f"{told - began:.0f} s: {len(self._calls)} calls, {self._open} open, "
                    f"{len(self.report.faults)} faults, {own / 1e6:.1f} MB, "
                    f"{process.num_fds()} descriptors, {len(groups_of(process.pid))} groups"
                )
            await asyncio.sleep(SAMPLE_S)

    async def _measure(self, process: psutil.Process) -> None:
        report = self.report
        await asyncio.wait_for(self._backend.connected.wait(), 60)
        await self._make(WARM_UP_CALLS, lambda: self._prefix() + "echo")
        await self._calm_down()
        # What the warm-up made ready is what rests between calls.
        report.before = await self._at_rest(process, None)
        memory, mounts = process.memory_full_info(), machine_mounts()
        self._latencies.clear()
        self._endings.clear()
        first, began = len(self._calls), time.monotonic()
        watch = asyncio.create_task(self._watch(process))
        try:
            await self._make(self._wanted, self._choose)
        finally:
            watch.cancel()
        report.seconds = round(time.monotonic() - began, 1)
        report.calls = len(self._calls) - first
        report.endings = dict(self._endings.most_common())
        await self._calm_down()
        report.after = await self._at_rest(process, report.before)
        now = process.memory_full_info()
        report.resident_mb = (round(memory.rss / 1e6, 1), round(now.rss / 1e6, 1))
        report.own_mb = (round(memory.uss / 1e6, 1), round(now.uss / 1e6, 1))
        report.machine_mounts = (mounts, machine_mounts())
        full = [row for row in self._samples if row[0] > FULL_CALLS]
        slope, most = slope_kib(full), MAX_FULL_SLOPE_KIB
        if slope is None:
            learning = [row for row in self._samples if row[0] <= FULL_CALLS]
            slope, most = slope_kib(learning), MAX_STEADY_SLOPE_KIB
        if slope is not None:
            report.own_kib_per_1000_calls, report.own_kib_allowed = round(slope, 1), most
            if slope > most:
                report.faults.append(f"memory grows by {slope:.0f} KiB in 1,000 calls")
        report.calls_per_s = round(report.calls / max(report.seconds, 0.1), 1)
        self._latencies.sort()
        if self._latencies:
            count = len(self._latencies)
            report.good_p50_ms = round(self._latencies[count // 2] * 1000, 1)
            report.good_p99_ms = round(self._latencies[count * 99 // 100] * 1000, 1)
        for number, call in self._calls.items():
            if call.answers != 1:
                report.faults.append(f"call {number} ({call.tool}): {call.answers} answers")
        if report.after != report.before:
            report.faults.append(f"holdings: {report.before} before, {report.after} after")
        report.group_files = group_files(process)
        report.groups = len(groups_of(process.pid))
        slots = len(LIFETIMES) * (3 * self._concurrency + 10)
        if report.group_files > GROUP_FILES_PER_SLOT * slots:
            report.faults.append(f"{report.group_files} descriptors on control groups")
        if self._backend.links != 1:
            report.faults.append(f"the link was opened {self._backend.links} times")

    async def _calm_down(self) -> None:
        """One call after the other uses up what a burst has made ready beyond need."""
        for prefix, calls in CALM_CALLS.items():
            for _ in range(calls):
                await self._make(1, lambda tool=f"{prefix}echo": tool)

    def _prefix(self) -> str:
        (prefix,) = self._random.choices(list(LIFETIMES), WEIGHTS)
        return prefix

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
        prefix = self._prefix()
        if self._random.random() < 0.1:
            return prefix + self._random.choices(list(BAD), BAD_WEIGHTS)[0]
        return prefix + self._random.choice(GOOD)

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
        tool = call.tool.partition("_")[2]
        if tool in BAD:
            is_right = kind == BAD[tool]
        else:
            self._latencies.append(time.monotonic() - call.sent_at)
            wanted = call.value
            if tool == "fail":
                wanted = {"error": call.value, "error_type": "tool_error", "retryable": False}
            is_right = result == wanted
        call.value = None  # of hours of calls, too much to keep
        if not is_right:
            self.report.faults.append(f"call {number} ({call.tool}): {str(result)[:200]}")
        self._answered.set()

    async def _at_rest(self, process: psutil.Process, wanted: Holdings | None) -> Holdings:
        """Holdings once they are as `wanted`; or the least that there were in a worker's life.

        Of a toolkit whose workers serve several calls, one more than needed may be half used.
        """
        least = await self._settled(process)
        for _ in range(CALLS_PER_WORKER if wanted is None else 4 * CALLS_PER_WORKER):
            if least == wanted:
                break
            await self._make(1, lambda: "calls_echo")
            now = await self._settled(process)
            if now == wanted or now.children < least.children:
                least = now
        return least

    async def _settled(self, process: psutil.Process) -> Holdings:
        """Holdings once they have not changed for a while; or at last."""
        deadline = time.monotonic() + SETTLE_S
        last, since = Holdings.of(process, self._state), time.monotonic()
        while time.monotonic() < deadline and time.monotonic() - since < QUIET_S:
            await asyncio.sleep(0.05)
            now = Holdings.of(process, self._state)
            if now != last:
                last, since = now, time.monotonic()
        return last


def machine_mounts() -> int:
    return len(Path("/proc/self/mountinfo").read_text().splitlines())


def run_soak(
    calls: int,
    *,
    concurrency: int = 16,
    seconds: float = 3_600.0,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Make `calls` calls, or fewer if `seconds` are over before."""
    with tempfile.TemporaryDirectory(prefix="atp-soak-") as folder:
        soak = _Soak(calls, concurrency, seconds, seed, on_progress)
        return asyncio.run(soak.run(Path(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, help="20000, unless a time is given")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3_600.0, help="send no more after that")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--hours", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    seconds = given.hours * 3_600 + given.minutes * 60
    report = run_soak(
        given.calls or (10**9 if seconds else 20_000),
        concurrency=given.concurrency,
        seconds=seconds or given.seconds,
        seed=given.seed,
        on_progress=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps({**asdict(report), "faults": report.faults[:20]}, indent=2))
    if report.faults:
        print(f"{len(report.faults)} faults", file=sys.stderr)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
