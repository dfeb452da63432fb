"""Calls while everything breaks: is each answered once, and executed at most once?

    python -m benchmarks.faults [--seed N] [--reconnects N] [--kills N] [--seconds S] [--json FILE]
                                [--against sdk-0.1.0]

One `serve` with a toolkit for each lifetime, a backend of our own, and an execution counter that
the tools reach over the network. Connections are cut, reset, closed, stalled, silenced; processes
are killed and stopped, the supervisor too; descriptors, processes and disk run out; the clock
jumps. The same seed gives the same faults in the same order. What may not happen is in
`benchmarks.history`; exits with 1 if it did. `--against` runs the published SDK under the faults of
connections alone, to see that they are found.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter as Tally
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from atp_sandbox.journal import RETRY_S
from benchmarks import machine
from benchmarks.history import Fault, FaultKind, History
from benchmarks.load import MIX, PUBLISHED_SDK_MIX, Counter, Load, write_toolkit
from benchmarks.schedule import CONNECTION_FAULTS, DEATHS, Kind, Planned, schedule
from benchmarks.system import ROOT, System, configuration, sandbox_command
from benchmarks.wire import Backend

TIME_LIMIT_S = 4.0
SLACK_S = 15.0
"""For a busy machine, over the time limit of a call."""
LINK_S = 60.0
"""From a start or the end of a fault to a link."""
DRAIN_S = 30.0
CRASH_POINT_S = 3.0
"""For the supervisor to pass the point at which it is to end itself."""
UNNOTICED = 0.15
"""Of silences, the part that the supervisor has to notice by itself."""
NOTICE_S = 20.0
GONE_S = 10.0
JOURNAL_S = RETRY_S + 1.0
"""From a disk that has room again to a journal that knows everything again."""
STORIES_PER_KIND = 3
STORY_S = 3.0
"""Before and after what happened to a request, faults are told too."""
PROGRESS_S = 10.0
RECEIVE_BUFFER_BYTES = 64 * 1024
DISK_MEGABYTES = 32
COUNTER_HOST = "counter.test"
PREFIXES = {"call_": 6, "calls_": 6, "jail_": 1}
LIFETIMES = {"call_": "call", "calls_": "calls:8", "jail_": "jail"}
PUBLISHED_SDK = "sdk-0.1.0"
SDK_SETTLE_S = 3.0


@dataclass(slots=True)
class Report:
    """What came out of one run; `faults` is empty if all was as it should be."""

    seed: int
    against: str
    seconds: float = 0.0
    requests: int = 0
    answers: int = 0
    copies: int = 0
    executions: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    reconnects: int = 0
    kills: int = 0
    died_at_points: int = 0
    made: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    by_kind: dict[str, int] = field(default_factory=dict)
    last: list[str] = field(default_factory=list)
    """Faults that were made last."""
    stories: list[list[str]] = field(default_factory=list)
    """Of the first requests that faults were found with."""
    log: list[str] = field(default_factory=list)


class Stuck(Exception):
    """The system under test does not come back, so that nothing more can be learnt."""


class FaultRun:
    """One system, its load, and one fault after the other."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        *,
        sdk_python: str | None = None,
        seconds: float = 3_600.0,
        on_progress: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """`sdk_python`: interpreter that has the published SDK, which then is tested instead."""
        self._folder = folder
        self._is_sdk = sdk_python is not None
        self._sdk_python = sdk_python or ""
        self._seconds = seconds
        self._on_progress = on_progress
        self._history = History(time_limit_s=TIME_LIMIT_S, slack_s=SLACK_S)
        self._load = Load(
            self._history,
            seed=seed,
            concurrency=6 if self._is_sdk else 12,
            prefixes={"call_": 1} if self._is_sdk else PREFIXES,
            mix=PUBLISHED_SDK_MIX if self._is_sdk else MIX,
            patience=1.0 if self._is_sdk else 0.5,
        )
        self._counter = Counter(self._history)
        self._backend = Backend(self._load)
        self._made: Tally[str] = Tally()
        self._timeline: list[tuple[float, str]] = []
        """Faults and links, each with its moment."""
        self._problems: list[str] = []
        self._kills = 0
        self._began = time.monotonic()
        self._disk: machine.SmallDisk | None = None
        self._group: machine.ProcessGroup | None = None
        self._disk_full_at = -JOURNAL_S
        self._clock: mmap.mmap | None = None
        self._cleanup = contextlib.ExitStack()
        self._seed = seed
        self._report = Report(seed, PUBLISHED_SDK if self._is_sdk else "atp_sandbox")

    async def run(self, reconnects: int, kills: int) -> Report:
        def note(_loop: object, context: dict[str, object]) -> None:
            self._problems.append(
                f"in the backend: {context.get('exception', context['message'])!r}"
            )

        asyncio.get_running_loop().set_exception_handler(note)
        with self._cleanup:
            await self._prepare()
            plan = schedule(
                self._seed, reconnects=reconnects, kills=kills, without=self._impossible()
            )
            load = asyncio.create_task(self._load.run())
            told = asyncio.create_task(self._tell(len(plan)))
            try:
                self._start()
                await self._linked()
                for planned in plan:
                    if time.monotonic() - self._began > self._seconds:
                        break
                    await self._make(planned)
                await self._settle()
                await self._end()
            except Stuck as error:
                self._problems.append(f"stuck: {error}")
            finally:
                told.cancel()
                if load.done():
                    load.result()  # raises
                load.cancel()
            return self._finish()

    # -- before and after --------------------------------------------------------------------------

    async def _prepare(self) -> None:
        await self._backend.start(RECEIVE_BUFFER_BYTES)
        self._cleanup.callback(self._backend.close)
        await self._counter.start()
        self._cleanup.callback(self._counter.close)
        folder = self._folder
        if self._is_sdk:
            self._write_toolkit("call_", "127.0.0.1")
            command = [self._sdk_python, str(folder / "call_.py")]
            self._system = System(command, folder, {"PYTHONPATH": ""})
        else:
            self._system = self._prepare_sandbox()
        self._cleanup.callback(self._system.kill)

    def _prepare_sandbox(self) -> System:
        folder, port = self._folder, self._counter.port
        for prefix in PREFIXES:
            self._write_toolkit(prefix, COUNTER_HOST)
        key = folder / "key"
        key.write_text("faults")
        key.chmod(0o600)
        state = folder / "state"
        state.mkdir(mode=0o700)
        if os.geteuid() == 0:
            self._disk = machine.SmallDisk(state, DISK_MEGABYTES)
            self._cleanup.callback(self._disk.close)
        if os.geteuid() == 0 and machine.PIDS.is_dir():
            self._group = machine.ProcessGroup()
            self._cleanup.callback(self._group.close)
        clock = folder / "clock"
        clock.write_bytes(bytes(8))
        with clock.open("r+b") as file:
            self._clock = mmap.mmap(file.fileno(), 8)
        reach = {"egress": [f"{COUNTER_HOST}:{port}"], "private-ok": [COUNTER_HOST]}
        config = folder / "atp-sandbox.toml"
        config.write_text(
            configuration(
                self._backend.url,
                key,
                {"time": f"{TIME_LIMIT_S:g}s", "concurrency": 6},
                {
                    name: {"path": f"{name}.py", "lifetime": LIFETIMES[name], **reach}
                    for name in PREFIXES
                },
            )
        )
        reroute = f"{COUNTER_HOST}:{port}=127.0.0.1:{port}"
        command = sandbox_command(config, state, "--reroute", reroute, "--journal", "required")
        return System(
            command,
            folder,
            {"FAULTS_CLOCK": str(clock)},
            None if self._group is None else self._group.enter,
        )

    def _write_toolkit(self, prefix: str, host: str) -> None:
        path = str(self._folder / f"{prefix}.py")
        write_toolkit(
            path, prefix=prefix, url=self._backend.url, host=host, port=self._counter.port
        )

    def _impossible(self) -> list[Kind]:
        """What cannot be made here: left out, and said."""
        if self._is_sdk:
            return [kind for kind in Kind if kind not in CONNECTION_FAULTS]
        left_out = []
        if self._disk is None:
            left_out.append(Kind.FULL_DISK)
        if self._group is None and os.geteuid() == 0:
            left_out.append(Kind.NO_PROCESSES)
        self._report.left_out = [str(kind) for kind in left_out]
        return left_out

    async def _settle(self) -> None:
        """Everything works again; each request that is still open gets its answer."""
        self._load.is_over = True
        deadline = time.monotonic() + (SDK_SETTLE_S if self._is_sdk else TIME_LIMIT_S + SLACK_S)
        while self._history.unanswered() and time.monotonic() < deadline:
            await self._linked()
            await asyncio.sleep(0.05)

    async def _end(self) -> None:
        if self._is_sdk:
            return
        family = psutil.Process(self._system.pid).children(recursive=True)
        self._system.signal(signal.SIGTERM)
        self._note_status("at the end", await self._system.wait(DRAIN_S))
        _, left = await asyncio.to_thread(psutil.wait_procs, family, GONE_S)
        if left:
            self._problems.append(f"{len(left)} processes are left: {left[0]}")

    def _finish(self) -> Report:
        report, history = self._report, self._history
        found = history.faults()
        report.seconds = round(time.monotonic() - self._began, 1)
        report.requests, report.answers = history.requests, history.answers
        report.copies, report.executions = history.copies, history.executions
        report.kinds = dict(history.kinds().most_common())
        report.reconnects = max(0, self._backend.links - 1)
        report.kills = self._kills
        report.made = dict(self._made.most_common())
        report.by_kind = dict(Tally(str(fault.kind) for fault in found).most_common())
        report.faults = [*self._problems, *map(str, found)]
        if report.faults:
            report.last = [f"{at - self._began:.3f} {what}" for at, what in self._timeline[-20:]]
            report.stories = [self._story(name) for name in _first_of_each(found)]
            report.log = self._system.last_lines(40)
        return report

    def _story(self, request_id: str) -> list[str]:
        """One request's, with the faults and starts that fell into it."""
        told = self._history.story(request_id)
        if told:
            begin, end = told[0][0] - STORY_S, told[-1][0] + STORY_S
            told = sorted([*told, *(row for row in self._timeline if begin <= row[0] <= end)])
        return [request_id, *(f"{at - self._began:.3f} {what}" for at, what in told)]

    async def _tell(self, planned: int) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            history = self._history
            self._on_progress(
                f"{time.monotonic() - self._began:.0f} s: "
                f"{sum(self._made.values())} of {planned} faults, "
                f"{self._backend.links - 1} reconnects, {self._kills} kills, "
                f"{history.requests} requests, {history.executions} executions, "
                f"{len(history.unanswered())} open, {len(self._problems)} problems"
            )

    # -- faults ------------------------------------------------------------------------------------

    async def _make(self, planned: Planned) -> None:
        await self._linked()
        gap_s = planned.gap_s
        if planned.kind in DEATHS:
            # What cannot be written down is lost with the process, and its log says so.
            gap_s = max(gap_s, self._disk_full_at + JOURNAL_S - time.monotonic())
        await asyncio.sleep(gap_s)
        self._made[str(planned.kind)] += 1
        self._timeline.append((time.monotonic(), f"-- {planned} --"))
        match planned.kind:
            case Kind.KILL_PROCESS:
                self._signal_one(planned, signal.SIGKILL)
            case Kind.STOP_PROCESS:
                pid = self._signal_one(planned, signal.SIGSTOP)
                await asyncio.sleep(planned.seconds)
                _continue(pid)
            case Kind.CLOCK:
                assert self._clock is not None
                self._clock[:8] = struct.pack("d", planned.jump_s)
            case _:
                async with self._disturbed():
                    await self._disturb(planned)

    async def _disturb(self, planned: Planned) -> None:
        match planned.kind:
            case Kind.KILL_SUPERVISOR:
                self._kill()
                self._start()
            case Kind.CRASH_POINT:
                await self._crash_at(planned)
            case Kind.DRAIN:
                self._system.signal(signal.SIGTERM)
                self._note_status("after a drain", await self._system.wait(DRAIN_S))
                self._system.kill()
                self._start()
            case Kind.STOP_SUPERVISOR:
                self._system.signal(signal.SIGSTOP)
                await asyncio.sleep(planned.seconds)
                self._system.signal(signal.SIGCONT)
            case Kind.NO_DESCRIPTORS:
                most = machine.open_descriptors(self._system.pid) + 2
                with machine.limited([self._system.pid], resource.RLIMIT_NOFILE, most):
                    await asyncio.sleep(planned.seconds)
            case Kind.NO_PROCESSES:
                await self._without_processes(planned.seconds)
            case Kind.FULL_DISK:
                assert self._disk is not None
                self._disk.fill()
                await asyncio.sleep(planned.seconds)
                self._disk.empty()
                self._disk_full_at = time.monotonic()
            case _:
                await self._break_link(planned)

    async def _break_link(self, planned: Planned) -> None:
        link = self._backend.link
        if link is None:
            return
        match planned.kind:
            case Kind.CUT:
                link.cut()
            case Kind.RESET:
                link.reset()
            case Kind.CLOSE:
                link.close(planned.code)
                await self._gone(link.number)
                link.cut()
            case Kind.STALL:
                link.stop_reading()
                await asyncio.sleep(planned.seconds)
                link.reset()
            case Kind.HALF_FRAME:
                link.send_half(self._load.new_request())
                link.cut()
            case Kind.SILENCE:
                link.silence()
                if planned.pick < UNNOTICED and not self._is_sdk:
                    await self._gone(link.number, NOTICE_S)
                else:
                    await asyncio.sleep(planned.seconds)
                link.cut()
            case Kind.REFUSE:
                self._backend.refusals = 3
                link.cut()
        await self._gone(link.number)

    async def _without_processes(self, seconds: float) -> None:
        if self._group is not None:
            self._group.allow_no_more()
            await asyncio.sleep(seconds)
            self._group.allow_all()
            return
        # Without a group: who makes processes is refused them as a user that has too many.
        makers = [self._system.pid, *machine.roles(self._system.pid)["zygote"]]
        with machine.limited(makers, resource.RLIMIT_NPROC, 1):
            await asyncio.sleep(seconds)

    async def _crash_at(self, planned: Planned) -> None:
        self._kill()
        self._start(ATP_SANDBOX_CRASH_AT=f"{planned.point}:{planned.count}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._backend.connected.wait(), LINK_S)
        if await self._system.wait(CRASH_POINT_S) is not None:
            self._report.died_at_points += 1
        self._kill()
        self._start()

    def _start(self, **environment: str) -> None:
        self._timeline.append((time.monotonic(), "-- start --"))
        self._backend.forget_link()
        self._load.is_restarted = True
        self._system.start(**environment)

    def _kill(self) -> None:
        self._timeline.append((time.monotonic(), "-- killed --"))
        # Before it, so that no answer of the last moment is taken for one from before the death.
        self._history.died(time.monotonic())
        self._kills += 1
        self._system.kill()

    def _signal_one(self, planned: Planned, number: int) -> int | None:
        pids = machine.roles(self._system.pid)[planned.role]
        if not pids:
            return None
        pid = pids[int(planned.pick * len(pids))]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return pid

    def _note_status(self, when: str, status: int | None) -> None:
        if status != 0:
            self._problems.append(f"exit status {status} {when}")

    # -- waiting -----------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def _disturbed(self) -> AsyncIterator[None]:
        """Until there is a link again, no answer is due."""
        begin = time.monotonic()
        try:
            yield
            await self._linked()
        finally:
            self._history.disturbed(begin, time.monotonic())

    async def _linked(self) -> None:
        """Return once there is a link; the system is started again if it ended by itself."""
        deadline = time.monotonic() + LINK_S
        while not self._backend.connected.is_set():
            if not self._system.is_running:
                assert self._system.process is not None
                status = self._system.process.returncode
                self._problems.append(f"it ended by itself with {status}")
                raise Stuck("see its log")
            if time.monotonic() > deadline:
                raise Stuck(f"no link within {LINK_S:g} s")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._backend.connected.wait(), 0.5)

    async def _gone(self, number: int, timeout_s: float = 5.0) -> None:
        """Return once that link is not the open one any more; at last anyway."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            link = self._backend.link
            if link is None or link.number != number:
                return
            await asyncio.sleep(0.005)


def _first_of_each(faults: list[Fault]) -> list[str]:
    """Ids of a few requests with each kind of fault."""
    found: dict[str, None] = {}
    for kind in FaultKind:
        names = [fault.request_id for fault in faults if fault.kind is kind]
        found |= dict.fromkeys(names[:STORIES_PER_KIND])
    return list(found)


def _continue(pid: int | None) -> None:
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def run_faults(
    seed: int,
    *,
    reconnects: int,
    kills: int,
    seconds: float = 3_600.0,
    sdk_python: str | None = None,
    on_progress: Callable[[str], None] = lambda _line: None,
) -> Report:
    """Make so many reconnects and kills, or fewer if `seconds` are over before."""
    with tempfile.TemporaryDirectory(prefix="atp-faults-") as folder:
        run = FaultRun(
            Path(folder), seed, sdk_python=sdk_python, seconds=seconds, on_progress=on_progress
        )
        return asyncio.run(run.run(reconnects, kills))


def published_sdk_python() -> str:
    """Where the tests of the backend have installed it."""
    cache = Path(os.environ.get("ATP_TEST_CACHE") or ROOT / ".cache")
    folder = cache / "atp_sdk-0.1.0"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():  # or somebody is just installing it
        sys.exit(f"no {python}: `pytest tests/test_backend.py -k sdk_0_1_0` installs the SDK there")
    return str(python)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--reconnects", type=int, default=1_000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=3_600.0, help="no more faults after that")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--against", choices=[PUBLISHED_SDK])
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # mounts and groups are given back
    print(f"seed {given.seed}", file=sys.stderr)
    report = run_faults(
        given.seed,
        reconnects=given.reconnects,
        kills=given.kills,
        seconds=given.seconds,
        sdk_python=None if given.against is None else published_sdk_python(),
        on_progress=lambda line: print(line, file=sys.stderr),
    )
    told = {**asdict(report), "faults": report.faults[:40]}
    if given.json:
        given.json.write_text(json.dumps({**asdict(report)}, indent=2))
    print(json.dumps(told, indent=2))
    if report.faults:
        print(f"{len(report.faults)} faults with seed {report.seed}", file=sys.stderr)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
