"""One cgroup, whichever the version: its directories, its processes, its counters.

Trusted side only; no jail has a cgroup file system. A group is one directory on version 2 and one
in each controller's hierarchy on version 1, all of the same relative path; what both versions have
in common is here, the rest in `cgroups_v1` and `cgroups_v2`. Sources: cgroups(7), and of the
kernel's Documentation/admin-guide `cgroup-v2.rst` and `cgroup-v1/`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from atp_sandbox.jails.cgroup_files import CgroupError, KernelFile, read_value, write_value

_REMOVE_TRIES = 50
_REMOVE_PAUSE_S = 0.004
_GONE = (errno.ENOENT, errno.ENODEV)
"""Of what was removed meanwhile."""


@dataclass(frozen=True, slots=True)
class Counters:
    """What the kernel has counted in a group since it was made."""

    oom_kills: int
    memory_refusals: int
    pids_refused: int
    cpu_us: int


class Group(ABC):
    """One cgroup that we made; owns its directories and the descriptors on them.

    Not locked: one thread at a time, but `add` may run in another one than the rest.
    """

    def __init__(self, directories: Mapping[str, str]) -> None:
        """`directories`: controller → directory. Nothing is made yet."""
        self._directories = dict(directories)
        self._distinct = list(dict.fromkeys(directories.values()))
        self._procs: list[KernelFile] = []
        self._counting: list[KernelFile] = []
        self._memory_bytes = self._processes_most = 0
        self.known: Counters | None = None
        """What was counted when a call began the last time that it was looked at."""
        self.marks = b""

    # -- making and removing -----------------------------------------------------------------------

    def make(self) -> Self:
        """Create it; on CgroupError nothing of it is left."""
        made: list[str] = []
        try:
            for directory in self._distinct:
                try:
                    os.mkdir(directory, 0o700)
                except OSError as error:
                    raise CgroupError("make", directory, error) from error
                made.append(directory)
            self._set_up()
        except BaseException:
            self.close_files()
            for directory in reversed(made):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            raise
        return self

    def child(self, name: str, *, has_children: bool) -> Group:
        """Make a group inside. One with children must hold no process itself (version 2's rule)."""
        below = {key: f"{path}/{name}" for key, path in self._directories.items()}
        child = type(self)(below).make()
        try:
            if has_children:
                child.delegate()
            else:
                child.open_files()
        except BaseException:
            child.remove()
            raise
        return child

    def open_files(self) -> None:
        """Keep open what each call needs: the lists of processes and the counters."""
        self._procs = [KernelFile(f"{path}/cgroup.procs", os.O_RDWR) for path in self._distinct]
        self._counting = self._open_counters()

    def close_files(self) -> None:
        """Safe to call again."""
        for file in (*self._procs, *self._counting):
            file.close()
        self._procs, self._counting = [], []

    def remove(self) -> None:
        """Remove it with all groups inside; CgroupError (EBUSY) if a process is still there.

        A process leaves its group a moment after it was reaped, so that is waited for.
        """
        self.close_files()
        for top in reversed(self._distinct):
            for directory in directories_below(top):
                _remove_directory(directory)

    # -- limits ------------------------------------------------------------------------------------

    def limit_memory(self, size_bytes: int) -> None:
        """At most `size_bytes` for everything inside, and no swap. Nothing if it is so already."""
        if size_bytes != self._memory_bytes:
            self._write_memory(size_bytes, was_bytes=self._memory_bytes)
            self._memory_bytes = size_bytes

    def limit_processes(self, most: int) -> None:
        """At most `most` processes and threads inside. Nothing if it is so already."""
        if most != self._processes_most:
            write_value(f"{self._directories['pids']}/pids.max", most)
            self._processes_most = most

    @property
    def has_cpu_controller(self) -> bool:
        return "cpu" in self._directories

    # -- processes ---------------------------------------------------------------------------------

    def add(self, pid: int) -> None:
        """Move process `pid` with all its threads here; ProcessLookupError if it is gone.

        After CgroupError it may have been moved in part: end it.
        """
        if pid <= 0:  # to the kernel, 0 is whoever writes
            raise ValueError(f"{pid} is no process")
        number = str(pid).encode("ascii")
        if not self._procs:
            closed = OSError(errno.EBADF, "the group was closed")
            raise CgroupError("move a process to", self._distinct[0], closed)
        for file in self._procs:
            try:
                file.write(number)
            except CgroupError as error:
                if error.errno == errno.ESRCH:
                    raise ProcessLookupError(pid) from None
                raise

    def is_empty(self) -> bool:
        """Whether no process is here; for a group with `open_files`. Zombies do not count."""
        return not any(file.read() for file in self._procs)

    def processes(self) -> set[int]:
        """Every process here and in all groups inside; 0 is one of another PID namespace.

        CgroupError if that cannot be seen, as for want of descriptors: then there may be some.
        """
        found: set[int] = set()
        # One hierarchy tells for all: who cannot `add` to each ends the process.
        for directory in directories_below(self._directories.get("pids", self._distinct[0])):
            try:
                found.update(map(int, read_value(f"{directory}/cgroup.procs").split()))
            except CgroupError as error:
                if error.errno not in _GONE:
                    raise
        return found

    def wait_empty(self, timeout_s: float) -> bool:
        """Wait until no process is left here or inside; False if one is after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while pids := self.processes():
            with _handles(pids) as handles:
                poll = select.poll()
                for fd in handles.values():
                    poll.register(fd, select.POLLIN)
                left_s = deadline - time.monotonic()
                if left_s <= 0 or (handles and not poll.poll(left_s * 1000)):
                    return False
        return True

    def end_and_remove(self, timeout_s: float) -> bool:
        """Kill what is inside, wait for its end, remove it; whether that was done in time."""
        try:
            if self.processes():
                self.kill()
                if not self.wait_empty(timeout_s):
                    return False
            self.remove()
        except CgroupError:
            return False
        return True

    # -- what differs ------------------------------------------------------------------------------

    @abstractmethod
    def delegate(self) -> None:
        """Let groups inside have limits of their own."""

    @abstractmethod
    def thaw(self) -> None:
        """Let what was frozen here and inside run on, so that it can end."""

    @abstractmethod
    def kill(self) -> None:
        """SIGKILL everything here and inside, whatever it forks meanwhile; does not wait."""

    @abstractmethod
    def counters(self) -> Counters:
        """For a group with `open_files`."""

    def counters_since(self, known: Counters | None, marks: bytes) -> tuple[Counters, bytes]:
        """`known` as long as the kernel says the same of ended and refused processes as then.

        `marks` is what it said; two reads in place of all. What may have gone on meanwhile is the
        time used, and memory refusals without an end.
        """
        now = b"".join(file.read() for file in self._counting[:2])
        return (self.counters(), now) if known is None or marks != now else (known, now)

    @abstractmethod
    def share_cpu(self, weight: int, quota: float | None) -> None:
        """`weight` 1–10,000, 100 being usual; at most `quota` CPUs, None for all."""

    @abstractmethod
    def kill_together(self) -> None:
        """Let the kernel's out-of-memory killer end all of this group or none, where it can."""

    @abstractmethod
    def _set_up(self) -> None:
        """Settings of a directory that was just made."""

    @abstractmethod
    def _open_counters(self) -> list[KernelFile]:
        """The first two tell of processes that were ended for want of memory, or refused."""

    @abstractmethod
    def _write_memory(self, size_bytes: int, *, was_bytes: int) -> None: ...


def kill_listed(group: Group) -> set[int]:
    """SIGKILL the processes of `group` as it is now; gives those that were found.

    Safe against reused numbers because one that is listed after its descriptor was opened is the
    process that the descriptor is for.
    """
    with _handles(group.processes()) as handles:
        found = group.processes()
        for pid in found & handles.keys():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handles[pid], signal.SIGKILL)
    return found


@contextlib.contextmanager
def _handles(pids: set[int]) -> Iterator[dict[int, int]]:
    handles: dict[int, int] = {}
    try:
        for pid in pids - {0}:
            with contextlib.suppress(OSError):  # it ended, or EMFILE: then it is there next time
                handles[pid] = os.pidfd_open(pid)
        yield handles
    finally:
        for fd in handles.values():
            os.close(fd)


def lock_directory(directory: str) -> int | None:
    """A descriptor that holds the lock on a group; None if another supervisor has it or it is gone.

    The kernel lets go of it when the last holder ends, so a lock that is free means a dead owner,
    whatever became of its number and in whichever PID namespace it was. flock(2).
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CgroupError("open", directory, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.exists(directory):
            return fd
    except BlockingIOError:
        pass
    except OSError as error:
        os.close(fd)
        raise CgroupError("lock", directory, error) from error
    os.close(fd)
    return None


def directories_below(top: str) -> list[str]:
    """`top` and every directory inside, the innermost first; CgroupError if one is unreadable."""
    return [directory for directory, _, _ in os.walk(top, topdown=False, onerror=_unless_gone)]


def _unless_gone(error: OSError) -> None:
    if error.errno not in _GONE:
        raise CgroupError("look into", str(error.filename), error) from error


def _remove_directory(directory: str) -> None:
    for tries_left in reversed(range(_REMOVE_TRIES)):
        try:
            os.rmdir(directory)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY or not tries_left or _has_processes(directory):
                raise CgroupError("remove", directory, error) from error
        # No descriptor tells that the kernel has let go of a dead process.
        time.sleep(_REMOVE_PAUSE_S)


def _has_processes(directory: str) -> bool:
    with contextlib.suppress(CgroupError):
        return bool(read_value(f"{directory}/cgroup.procs"))
    return False
