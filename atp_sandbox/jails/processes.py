"""What the kernel says about a process of a jail: read from outside, never asked of it. proc(5)."""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """The lines of `/proc/PID/status` that decisions rest on."""

    parent_pid: int
    inner_pid: int
    """Its process id in the innermost PID namespace."""
    namespace_depth: int
    uid: int
    threads: int
    no_new_privs: bool
    is_filtered: bool
    """Whether its system calls pass a seccomp filter."""
    capabilities: int
    """Effective, permitted, inheritable and ambient sets, joined."""
    bounding: int
    """The capabilities that an exec could still bring."""


def read_status(pid: int) -> ProcessStatus:
    """The status of process `pid`; ProcessLookupError if there is none."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            rows = dict(line.split(":", 1) for line in file if ":" in line)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    inner = rows["NSpid"].split()
    capabilities = 0
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        capabilities |= int(rows[name], 16)
    return ProcessStatus(
        parent_pid=int(rows["PPid"]),
        inner_pid=int(inner[-1]),
        namespace_depth=len(inner),
        uid=int(rows["Uid"].split()[0]),
        threads=int(rows["Threads"]),
        no_new_privs=rows["NoNewPrivs"].strip() == "1",
        is_filtered=rows.get("Seccomp", "").strip() == "2",
        capabilities=capabilities,
        bounding=int(rows["CapBnd"], 16),
    )


@dataclass(frozen=True, slots=True)
class Descent:
    """Where a process comes from; two of the lines of `ProcessStatus`."""

    parent_pid: int
    inner_pid: int


_STATUS_BYTES = 8_192
"""More than the file has: about 1,500, of which the longest line tells of 4 times 64 nodes."""


def read_descent(pid: int) -> Descent:
    """As `read_status`, at a fraction of the cost, for every worker."""
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    try:
        # A process chooses its name, but the kernel escapes line ends in it.
        text = os.read(fd, _STATUS_BYTES)
    finally:
        os.close(fd)
    return Descent(_number_in(text, b"\nPPid:"), _number_in(text, b"\nNSpid:"))


def _number_in(text: bytes, name: bytes) -> int:
    """The last number of the line that begins with `name`."""
    start = text.index(name) + len(name)
    return int(text[start : text.index(b"\n", start)].rsplit(None, 1)[-1])


NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
"""Those that a jail has for itself: namespaces(7)."""
_O_PATH = 0o10000000


def shared_namespaces(pid: int) -> list[str]:
    """Which of `NAMESPACES` process `pid` is in together with us; ProcessLookupError if gone."""
    try:
        return [
            name
            for name in NAMESPACES
            if os.stat(f"/proc/{pid}/ns/{name}").st_ino == os.stat(f"/proc/self/ns/{name}").st_ino
        ]
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None


def read_descriptors(pid: int) -> list[str]:
    """What process `pid` has open for use, as proc(5) spells it: no mere path (O_PATH).

    PermissionError if it is not dumpable, ProcessLookupError if it is gone.
    """
    found = []
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as file:
                flags = next(int(row.split()[1], 8) for row in file if row.startswith("flags:"))
            if not flags & _O_PATH:
                found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return found


def read_children(pid: int) -> set[int]:
    """Process ids of the living children of `pid`, of whichever thread (proc(5)).

    ProcessLookupError if there is no such process.
    """
    found: set[int] = set()
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", encoding="ascii") as file:
                found.update(map(int, file.read().split()))
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return found


def descendants(pid: int) -> set[int]:
    """Process ids of all that came of `pid` and lives, but for what was orphaned elsewhere."""
    found: set[int] = set()
    waiting = [pid]
    while waiting:
        with contextlib.suppress(ProcessLookupError):
            new = read_children(waiting.pop()) - found
            found |= new
            waiting += new
    return found


class ProcessHandle:
    """A process by descriptor (pidfd_open(2)), so that a reused number is never hit. Owns it."""

    def __init__(self, pid: int) -> None:
        """ProcessLookupError if the process is gone. Verify who it is after opening."""
        self.pid = pid
        self._fd = os.pidfd_open(pid)

    def kill(self) -> None:
        """SIGKILL; nothing if it has ended."""
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def fileno(self) -> int:
        """Readable once the process has ended."""
        return self._fd

    def close(self) -> None:
        """Safe to call again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
