"""A system under test that speaks ATP: one process, and the load generator it is connected to."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.generator import Generator, PeerGone, WrongAnswer
from benchmarks.loads import Load
from benchmarks.measured import Measured
from benchmarks.system import System

START_S = 90.0
STOP_S = 30.0
GAP_S = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


class Peer:
    """Owns both; `command` is told the address to connect to."""

    def __init__(
        self, folder: Path, command: Callable[[str], Sequence[str]], **environment: str
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._generator = Generator()
        self._system = System(command(self._generator.url), folder, environment)

    @property
    def pid(self) -> int:
        return self._system.pid

    def start(self) -> None:
        """Until it is connected."""
        self._system.start()
        self._tell(lambda: self._generator.wait_for_link(START_S, lambda: self._system.is_running))

    def measure(self, seconds: float, load: Load) -> Measured:
        return self.measure_all(seconds, load)[0]

    def measure_all(self, seconds: float, *loads: Load) -> list[Measured]:
        """Loads at the same time over the one websocket; the first carries the peer's CPU time."""
        before = cpu_s(self.pid)
        found: list[Measured] = []
        self._tell(lambda: found.extend(self._generator.measure(seconds, *loads)))
        found[0].cpu_s = cpu_s(self.pid) - before
        return found

    def ask(self, load: Load) -> bytes:
        """One call, and its whole answer."""
        answers: list[bytes] = []
        self._tell(lambda: answers.append(self._generator.ask(load)))
        return answers[0]

    def measure_apart(self, seconds: float, load: Load) -> Measured:
        """One call at a time with a pause before each, so that a worker is ready for it."""
        ends = time.monotonic() + seconds
        latencies: list[float] = []
        while not latencies or time.monotonic() < ends:
            time.sleep(GAP_S)
            latencies += self.measure(0.0, load).latencies_s
        return Measured(len(latencies), sum(latencies), sorted(latencies))

    def stop(self) -> None:
        """End it, kindly first. Safe to repeat."""
        try:
            if self._system.is_running:
                self._system.signal(signal.SIGTERM)
                deadline = time.monotonic() + STOP_S
                while self._system.is_running and time.monotonic() < deadline:
                    self._generator.look()
                    time.sleep(0.02)
        finally:
            self._system.kill()
            self._generator.close()

    def _tell(self, act: Callable[[], object]) -> None:
        """Do it; where it fails, with the last lines of the peer's log."""
        try:
            act()
        except (PeerGone, WrongAnswer) as error:
            raise type(error)("\n".join([str(error), *self._system.last_lines(12)])) from error


def cpu_s(pid: int) -> float:
    """Processor time of a process, all its threads together."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS
