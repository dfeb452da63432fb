"""The system under test: one process, started again after each of its ends, over the same state."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TAIL_BYTES = 20_000


class System:
    """Owns the process and its log."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: dict[str, str],
        before_exec: Callable[[], None] | None = None,
    ) -> None:
        self._command = command
        self._folder = folder
        self._before_exec = before_exec
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ATP_")}
        self._environment = {**ours, "PYTHONPATH": str(ROOT), **environment}
        self._log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, **environment: str) -> None:
        self.starts += 1
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._folder,
                env={**self._environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=self._before_exec,
            )

    def signal(self, number: int) -> None:
        if self.is_running:
            assert self.process is not None
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and until it is gone. Safe to repeat."""
        if self.process is not None:
            self.signal(signal.SIGKILL)
            self.process.wait()

    async def wait(self, timeout_s: float) -> int | None:
        """The exit status; None if it does not end in time."""
        assert self.process is not None
        process = self.process
        try:
            return await asyncio.to_thread(process.wait, timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def last_lines(self, count: int) -> list[str]:
        if not self._log.exists():
            return []
        with self._log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]


def sandbox_command(config: Path, state_dir: Path, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "benchmarks.quick_serve", "serve", "--config", str(config)),
        *("--state-dir", str(state_dir), "--log-format", "json", *options),
    ]


def configuration(
    url: str, key_file: Path, defaults: dict[str, object], toolkits: dict[str, dict[str, object]]
) -> str:
    """A configuration's text; values are written as JSON, which TOML reads the same."""

    def table(name: str, values: dict[str, object]) -> str:
        return f"[{name}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())

    parts = [table("backend", {"url": url, "api-key-file": str(key_file)})]
    parts.append(table("defaults", defaults))
    parts += [table(f"toolkit.{name}", values) for name, values in toolkits.items()]
    return "\n".join(parts)
