"""What a machine can run out of, for one process and those below it: short, then plenty again."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

PIDS = Path("/sys/fs/cgroup/pids")
"""Where version 1 has the controller; version 2 allows no such group beside a supervisor's own."""
REMOVE_S = 10.0


class SmallDisk:
    """A file system of a few megabytes on a directory. Root only."""

    def __init__(self, directory: Path, megabytes: int) -> None:
        self.directory = directory
        options = f"size={megabytes}m,mode=0700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)], check=True)
        self._filler = directory / "filler"

    def fill(self) -> None:
        """Nothing more can be written, not one block."""
        with contextlib.suppress(OSError), self._filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 12):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass

    def empty(self) -> None:
        self._filler.unlink(missing_ok=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.directory)], check=True)


class ProcessGroup:
    """A control group that bounds how many processes there are. Root, and version 1, only."""

    def __init__(self) -> None:
        self._directory = PIDS / f"atp-faults-{os.getpid()}-{time.monotonic_ns()}"
        self._directory.mkdir()

    def enter(self) -> None:
        """This process from now on; for what runs between fork and exec."""
        (self._directory / "cgroup.procs").write_text("0")

    def allow_no_more(self) -> None:
        now = (self._directory / "pids.current").read_text()
        (self._directory / "pids.max").write_text(now)

    def allow_all(self) -> None:
        (self._directory / "pids.max").write_text("max")

    def close(self) -> None:
        """Remove it, once those in it have ended."""
        deadline = time.monotonic() + REMOVE_S
        while self._directory.exists() and time.monotonic() < deadline:
            for folder, _, _ in os.walk(self._directory, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
            time.sleep(0.05)


@contextlib.contextmanager
def limited(pids: Iterable[int], kind: int, soft: int) -> Iterator[None]:
    """A resource limit of these processes (`resource.RLIMIT_…`), as it was again afterwards."""
    before: dict[int, tuple[int, int]] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            before[pid] = resource.prlimit(pid, kind)
            resource.prlimit(pid, kind, (soft, before[pid][1]))
    try:
        yield
    finally:
        for pid, usual in before.items():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                resource.prlimit(pid, kind, usual)


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def roles(supervisor: int) -> dict[str, list[int]]:
    """Process ids below a supervisor, by what they are; in a jail, by their number there."""
    found: dict[str, list[int]] = {"worker": [], "zygote": [], "warden": [], "egress": []}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(supervisor).children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                role = _role(process)
                if role is not None:
                    found[role].append(process.pid)
    return {role: sorted(pids) for role, pids in found.items()}


def _role(process: psutil.Process) -> str | None:
    if any(part.endswith("egress/boot.py") for part in process.cmdline()):
        return "egress"
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            numbers = line.split()[1:]
            if len(numbers) < 2:
                return None
            return {"1": "warden", "2": "zygote"}.get(numbers[-1], "worker")
    return None
