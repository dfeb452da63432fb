"""Limits that the kernel keeps on groups of processes: one group a jail, one inside it a call.

    (our group)
    ├── supervisor                     version 2 only: ourselves
    └── atp-sandbox
        └── PID-RANDOM                 a `CgroupTree`, locked as long as its supervisor lives
            └── NAME                   a `JailGroup`: the hard limit
                ├── base               warden and zygote
                └── call-1 …           a `CallGroup` while taken; used again and again

Trusted side only. The order at the end of a call: reaped, `evidence()` read for the verdict,
scratch unmounted (its files are charged to the group until then), `give_back()`.

What a process has touched before it was moved stays charged to the group where it was: what a
worker shares with its zygote counts for `base`, so a call's limit is on what the call adds.

A move takes 11 ms if none came just before (`Mover`); all else takes microseconds, but what makes,
removes or kills a group waits for a move that is being made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from atp_sandbox.errors import IsolationError
from atp_sandbox.jails import cgroups_v2
from atp_sandbox.jails.cgroup_files import CgroupError
from atp_sandbox.jails.cgroup_group import Group, lock_directory
from atp_sandbox.jails.cgroup_jail import CallEvidence, CallGroup, JailGroup
from atp_sandbox.jails.cgroup_mover import Mover
from atp_sandbox.jails.cgroup_support import CgroupSupport, detect
from atp_sandbox.jails.cgroups_v1 import GroupV1
from atp_sandbox.jails.cgroups_v2 import GroupV2

__all__ = [
    "CallEvidence",
    "CallGroup",
    "CgroupError",
    "CgroupSupport",
    "CgroupTree",
    "JailGroup",
    "Mover",
    "TreePlace",
    "detect",
    "remove_dead",
    "remove_stale",
]

_GROUPS: dict[int, type[Group]] = {1: GroupV1, 2: GroupV2}
_TOP = "atp-sandbox"
_MAKE_TRIES = 10
"""Another supervisor that ends removes the directory that all share, if it finds it empty."""
_REMOVED_MEANWHILE = (errno.ENOENT, errno.ENODEV, errno.EEXIST)
_ALONE_S = 2.0
"""For others that make or judge groups; each takes milliseconds."""
_END_S = 2.0
"""From SIGKILL to the last process gone; freeing memory takes about 0.1 s a GiB."""


@dataclass(frozen=True, slots=True)
class TreePlace:
    """Where a tree is, for whoever removes it after its owner's death."""

    version: int
    directories: Mapping[str, str]
    """As of `CgroupSupport`."""
    name: str


class CgroupTree:
    """All groups of one supervisor. A context manager; owns them and the lock that it lives by."""

    def __init__(self, support: CgroupSupport, name: str = "") -> None:
        """IsolationError (CgroupError) if it cannot be made; nothing of it is left then.

        On version 2 this process moves into the leaf `supervisor` of its group, with all threads.
        """
        if not support.is_usable:
            raise IsolationError(
                "cgroup",
                "This machine cannot enforce: cgroup (limits on groups of processes).",
                cause=support.reason,
                tip=support.remedy,
            )
        self._support = support
        self._jails: list[JailGroup] = []
        self._locks: list[int] = []
        self._root: Group | None = None
        self._name = ""
        prefix = name or str(os.getpid())
        try:
            if support.version == 2:
                cgroups_v2.occupy(_own_directory(support), support.directories)
            self._root = self._make_root(prefix)
        except BaseException:
            self.close()
            raise

    @property
    def version(self) -> int:
        """1 or 2."""
        return self._support.version

    @property
    def place(self) -> TreePlace:
        """For `remove_dead`."""
        return TreePlace(self._support.version, self._support.directories, self._name)

    def jail(
        self,
        name: str,
        *,
        memory_bytes: int,
        pids_max: int,
        cpu_weight: int = 100,
        cpu_quota: float | None = None,
    ) -> JailGroup:
        """Make a jail's group. The limits hold for all of it, whatever its calls may each have.

        `name` is one component of a path, and no other jail's.

        `cpu_weight` 1–10,000 against other jails, `cpu_quota` in CPUs. CgroupError leaves nothing;
        so does a quota where there is no cpu controller.
        """
        if self._root is None:
            raise ValueError("the tree was closed")
        group = self._root.child(name, has_children=True)
        try:
            group.limit_memory(memory_bytes)
            group.limit_processes(pids_max)
            if group.has_cpu_controller:
                group.share_cpu(cpu_weight, cpu_quota)
            elif cpu_quota is not None:
                missing = FileNotFoundError(errno.ENOENT, "there is no cpu controller here")
                raise CgroupError("limit the CPU time of", name, missing)
            jail = JailGroup(group)
        except BaseException:
            group.remove()
            raise
        self._jails = [one for one in self._jails if not (one.is_closed and one.close())]
        self._jails.append(jail)
        return jail

    def close(self) -> bool:
        """End every jail, remove everything, let go of the lock. Safe to call again.

        False if something stays; the next `remove_stale` tries again.
        """
        root, self._root = self._root, None
        is_clean = all([jail.close() for jail in self._jails])
        self._jails.clear()
        if root is not None:
            is_clean = root.end_and_remove(_END_S) and is_clean
        for fd in self._locks:
            os.close(fd)
        self._locks.clear()
        _remove_tops(self._support)
        if self._support.version == 2 and self._support.is_usable:
            cgroups_v2.vacate(_own_directory(self._support), self._support.directories)
        return is_clean

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make_root(self, prefix: str) -> Group:
        for _ in range(_MAKE_TRIES):
            with _alone(self._support):
                root = self._try_to_make_root(f"{prefix}-{secrets.token_hex(4)}")
            if root is None:
                continue
            try:
                root.delegate()
            except BaseException:
                root.remove()
                raise
            return root
        busy = OSError(errno.EBUSY, "others keep removing it")
        raise CgroupError("make", f"{_tops(self._support)[0]}/{prefix}-…", busy)

    def _try_to_make_root(self, name: str) -> Group | None:
        """None if another supervisor came in between; then nothing of it is left."""
        try:
            _make_tops(self._support)
            root = _GROUPS[self._support.version](
                {key: f"{path}/{_TOP}/{name}" for key, path in self._support.directories.items()}
            ).make()
        except CgroupError as error:
            if error.errno in _REMOVED_MEANWHILE:
                return None
            raise
        locks = [lock_directory(f"{top}/{name}") for top in _tops(self._support)]
        self._locks = [fd for fd in locks if fd is not None]
        if len(self._locks) == len(locks):
            self._name = name
            return root
        for fd in self._locks:
            os.close(fd)
        self._locks = []
        with contextlib.suppress(CgroupError):
            root.remove()
        return None


@contextlib.contextmanager
def _alone(support: CgroupSupport) -> Iterator[None]:
    """Nobody else makes a tree, or judges which are stale: one being made is not locked yet.

    Whoever may read the directory can hold this lock for ever, so it is waited for only so long;
    without it, what is being made may be removed, and is made again.
    """
    directory = _own_directory(support)
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CgroupError("open", directory, error) from error
    try:
        deadline = time.monotonic() + _ALONE_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
        yield
    finally:
        os.close(fd)


def remove_stale(support: CgroupSupport) -> list[str]:
    """Kill and remove the groups of dead supervisors; gives their names. To be run at start.

    Dead is one whose lock is free: the kernel lets go of it at the end of the process, so neither a
    process id that is used again nor one of another PID namespace misleads. What cannot be removed
    is left to the next start.
    """
    if not support.is_usable:
        return []
    tops = _tops(support)
    with _alone(support):
        # Judged in each hierarchy by itself: on version 1 another supervisor, alive, may share one
        # of them with us and not the others.
        stale = {
            name: {top: fd for top in tops if (fd := lock_directory(f"{top}/{name}")) is not None}
            for name in sorted({name for top in tops for name in _directories_in(top)})
        }
    removed: list[str] = []
    for name, locks in stale.items():
        try:
            below = {
                controller: f"{path}/{_TOP}/{name}"
                for controller, path in support.directories.items()
                if f"{path}/{_TOP}" in locks
            }
            if below and _GROUPS[support.version](below).end_and_remove(_END_S):
                removed.append(name)
        finally:
            for fd in locks.values():
                os.close(fd)
    _remove_tops(support)
    return removed


def remove_dead(support: CgroupSupport, name: str, orderly_s: float) -> bool:
    """End and remove the tree `name`, whose supervisor is known to be dead; whether it is gone.

    What ends by itself has `orderly_s` for it. Another supervisor that starts may do the same at
    the same time. The leaf that version 2 needs stays: we are in it, and wherever else we went we
    would be in the way of that other one.
    """
    paths = {key: f"{path}/{_TOP}/{name}" for key, path in support.directories.items()}
    tree = _GROUPS[support.version](paths)
    with contextlib.suppress(CgroupError):  # it cannot be looked at now
        tree.thaw()
        tree.wait_empty(orderly_s)
    tree.end_and_remove(_END_S)
    _remove_tops(support)
    return not any(map(os.path.exists, paths.values()))


def _own_directory(support: CgroupSupport) -> str:
    return support.directories["memory"]


def _tops(support: CgroupSupport) -> list[str]:
    """Where the trees of all supervisors of our group are, in each hierarchy."""
    return [f"{path}/{_TOP}" for path in dict.fromkeys(support.directories.values())]


def _make_tops(support: CgroupSupport) -> None:
    for top in _tops(support):
        try:
            os.makedirs(top, 0o755, exist_ok=True)
        except OSError as error:
            raise CgroupError("make", top, error) from error
        if support.version == 2:
            cgroups_v2.enable_controllers(top, support.directories)


def _remove_tops(support: CgroupSupport) -> None:
    """Remove the directory that all supervisors of our group share, if we were the last."""
    with contextlib.suppress(CgroupError), _alone(support):
        for top in _tops(support):
            with contextlib.suppress(OSError):
                os.rmdir(top)


def _directories_in(top: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.name for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False)]
    return []
