"""The janitor as its supervisor sees it: launched, told what to clear up, replaced if it ends.

See `janitor`, which is the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from atp_sandbox import log
from atp_sandbox.jails import janitor
from atp_sandbox.jails.cgroups import TreePlace
from atp_sandbox.jails.processes import ProcessHandle
from atp_sandbox.loop import READ, Loop, Timer

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]
_FIRST_RESTART_S = 0.1
_MAX_RESTART_S = 60.0
_END_S = 1.0
"""From its last word to its end; usually a few milliseconds."""


@dataclass(frozen=True, slots=True)
class Duty:
    """What is to be cleared up if this process is killed."""

    scratch_prefix: str
    """Directories whose path begins so are ours: scratch of jails without namespaces."""
    groups: TreePlace | None


class JanitorService:
    """Owns the janitor's process, and the pipe by whose end it knows of ours."""

    def __init__(self, loop: Loop, duty: Duty) -> None:
        """Returns before the janitor is up. One that cannot be launched is told and tried again."""
        self._loop = loop
        self.duty = duty
        self._restart_s = _FIRST_RESTART_S
        self._timer: Timer | None = None
        self._popen: subprocess.Popen[bytes] | None = None
        self._process: ProcessHandle | None = None
        self._pipe = -1
        self._launch()

    @property
    def pid(self) -> int | None:
        """None while there is none."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Tell it that all is in order, and wait for its end. Safe to call again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._process is None:
            return
        with contextlib.suppress(OSError):  # it has ended, or is full of what it does not read
            os.write(self._pipe, janitor.END)
        self._drop(patience_s=_END_S)

    def _launch(self) -> None:
        self._timer = None
        try:
            reader, writer = os.pipe()
        except OSError as error:
            self._restart_later(f"it could not be launched: {error.strerror}")
            return
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", janitor.__file__],
                stdin=reader,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                start_new_session=True,  # Ctrl-C is for the supervisor
            )
            os.set_blocking(writer, False)
            os.write(writer, self._line())
        except OSError as error:
            os.close(writer)
            self._restart_later(f"it could not be launched: {error.strerror}")
            return
        finally:
            os.close(reader)
        try:
            self._process = ProcessHandle(self._popen.pid)
        except OSError as error:
            os.close(writer)
            self._popen.kill()  # it is our child, not reaped yet
            self._popen.wait()
            self._restart_later(f"it cannot be watched: {error.strerror}")
            return
        self._pipe = writer
        self._loop.watch(self._process.fileno(), READ, lambda _events: self._on_end())

    def _line(self) -> bytes:
        groups = self.duty.groups
        line = {
            "path": str(_PACKAGE_PARENT),
            "supervisor": os.getpid(),
            "scratch": self.duty.scratch_prefix,
            "version": groups and groups.version,
            "groups": groups and dict(groups.directories),
            "tree": groups and groups.name,
        }
        return json.dumps(line).encode() + b"\n"

    def _on_end(self) -> None:
        assert self._popen is not None
        self._drop(patience_s=0.0)
        self._restart_later(f"it ended with status {self._popen.returncode}")

    def _restart_later(self, reason: str) -> None:
        log.emit(
            log.WARNING,
            "janitor_ended",
            "nobody would clear up if this process were killed; starting another one",
            reason=reason,
            retry_in_s=self._restart_s,
        )
        self._timer = self._loop.call_later(self._restart_s, self._launch)
        self._restart_s = min(_MAX_RESTART_S, 2 * self._restart_s)

    def _drop(self, *, patience_s: float) -> None:
        assert self._popen is not None
        assert self._process is not None
        self._loop.unwatch(self._process.fileno())
        try:
            self._popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._popen.wait()
        self._process.close()
        self._process = None
        os.close(self._pipe)
        self._pipe = -1
