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
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from atp_sandbox.errors import IsolationError
from atp_sandbox.jails import cgroups_v2
from atp_sandbox.jails.cgroup_group import CgroupError, Group, lock_directory
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
    "detect",
    "remove_stale",
]

_GROUPS: dict[int, type[Group]] = {1: GroupV1, 2: GroupV2}
_TOP = "atp-sandbox"
_MAKE_TRIES = 10
"""Another supervisor that ends removes the directory that all share, if it finds it empty."""
_END_S = 2.0
"""From SIGKILL to the last process gone; freeing memory takes about 0.1 s a GiB."""


@dataclass(frozen=True, slots=True)
class CallEvidence:
    """What the kernel counted in a group since `take_call` or `restart`."""

    oom_kills: int
    """More than 0 if processes of the group were ended for want of memory, whichever limit was hit.

    No number of processes: version 2 counts one twice when it ends a whole group."""
    memory_refusals: int
    """How often the group's own limit was reached; alone no failure, for memory may be reclaimed.

    With `oom_kills` it tells the group's limit (more than 0) from the jail's or the machine's (0).
    """
    pids_refused: int
    """Forks and threads refused by the group's own limit; on version 1, and before Linux 6.11, also
    by one above it."""
    cpu_s: float
    """Of all processes of the group, the living included. 0 on version 1 without cpuacct."""
    peak_bytes: int | None
    """Most memory at a time; None where the kernel cannot tell (version 2 before Linux 6.12, if an
    earlier call in the same group had more)."""


class CallGroup:
    """The group of one worker, taken from its jail's; unusable once given back."""

    __slots__ = ("_before", "_group", "_jail")

    def __init__(self, jail: JailGroup, group: Group) -> None:
        """See `JailGroup.take_call`, which calls this."""
        self._jail = jail
        self._group: Group | None = group
        self._before = _Baseline(group)

    def add(self, pid: int) -> None:
        """Move a process here, before it gets its first call; ProcessLookupError if it is gone.

        After CgroupError end the process: it may be under some limits only. Blocks, 10 ms and more
        (`cgroup_mover`).
        """
        self._open.add(pid)

    def adder(self) -> Callable[[int], None]:
        """`add` as it can be called in another thread, and after the group was given back."""
        return self._open.add

    def evidence(self) -> CallEvidence:
        """What was counted since the beginning; any number of times."""
        return self._before.until_now(self._open)

    def restart(self) -> None:
        """Count anew, for the next call of the same worker."""
        self._before = _Baseline(self._open)

    def kill(self) -> None:
        """SIGKILL all that is inside, whatever session, parent or state it has; does not wait."""
        self._open.kill()

    def is_empty(self) -> bool:
        """Whether all processes are gone, or zombies."""
        return self._open.is_empty()

    def wait_empty(self, timeout_s: float) -> bool:
        """After `kill`: wait for the ends; False if something lives on. Blocks."""
        return self._open.wait_empty(timeout_s)

    def give_back(self) -> bool:
        """Leave it to the next call. False if a process is still inside: it is then killed, and the
        group is not used again. Safe to call again."""
        group, self._group = self._group, None
        return group is None or self._jail.take_back(group)

    @property
    def _open(self) -> Group:
        if self._group is None:
            raise ValueError("the group was given back")
        return self._group


class JailGroup:
    """The group of one jail with everything in it; owns the groups inside."""

    def __init__(self, group: Group) -> None:
        """See `CgroupTree.jail`, which calls this."""
        self._group: Group | None = group
        self._calls: list[Group] = []
        self._free: list[Group] = []
        self._base = group.child("base", has_children=False)
        self._base.kill_together()
        self._before = _Baseline(self._base)

    def add(self, pid: int) -> None:
        """Move the process that becomes the jail here; what it forks from then on is here too.

        As `CallGroup.add`.
        """
        self._base.add(pid)

    def adder(self) -> Callable[[int], None]:
        """`add` as it can be called in another thread, and after the jail was closed."""
        return self._base.add

    def take_call(self, *, memory_bytes: int, pids_max: int) -> CallGroup:
        """A group for one worker: one that was given back, else a new one (1 ms).

        CgroupError: the worker must not run.
        """
        group = self._free.pop() if self._free else self._make_call()
        group.limit_memory(memory_bytes)
        group.limit_processes(pids_max)
        return CallGroup(self, group)

    def prepare_calls(self, count: int) -> None:
        """Make groups ahead of need, so that `count` are there and free."""
        while len(self._free) < count:
            self._free.append(self._make_call())

    def base_evidence(self) -> CallEvidence:
        """What was counted of the warden and the zygote: an import that ran out of memory."""
        return self._before.until_now(self._base)

    def processes(self) -> set[int]:
        """Every process of the jail, so that an unknown one is seen. Slow: not for every call."""
        return self._open.processes()

    def kill(self) -> None:
        """SIGKILL the whole jail, whatever its processes do; does not wait."""
        self._open.kill()

    def close(self) -> bool:
        """End what is left in it and remove it. False if something would not end within 2 s: its
        groups stay until `remove_stale`. Safe to call again. Waits only if something is left.
        """
        group, self._group = self._group, None
        if group is None:
            return True
        self._free.clear()  # their directories go with the jail's
        for one in (self._base, *self._calls):
            one.close_files()
        return _end_and_remove(group)

    @property
    def is_closed(self) -> bool:
        return self._group is None

    def take_back(self, group: Group) -> bool:
        """For `CallGroup.give_back`."""
        if self._group is None:
            return True
        if group.is_empty():
            self._free.append(group)
            return True
        group.kill()
        return False

    def _make_call(self) -> Group:
        group = self._open.child(f"call-{len(self._calls) + 1}", has_children=False)
        self._calls.append(group)
        group.kill_together()
        return group

    @property
    def _open(self) -> Group:
        if self._group is None:
            raise ValueError("the jail's group was closed")
        return self._group


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
        prefix = name or str(os.getpid())
        try:
            if support.version == 2:
                cgroups_v2.occupy(_own_directory(support), support.directories)
            self._root = self._make_root(prefix)
        except BaseException:
            self.close()
            raise

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
        self._jails = [one for one in self._jails if not one.is_closed]
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
            is_clean = _end_and_remove(root) and is_clean
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
            name = f"{prefix}-{secrets.token_hex(4)}"
            try:
                _make_tops(self._support)
                root = _GROUPS[self._support.version](
                    {
                        key: f"{path}/{_TOP}/{name}"
                        for key, path in self._support.directories.items()
                    }
                ).make()
            except CgroupError as error:
                if error.errno == errno.ENOENT:
                    continue
                raise
            locks = [lock_directory(f"{top}/{name}") for top in _tops(self._support)]
            self._locks = [fd for fd in locks if fd is not None]
            if len(self._locks) == len(locks):
                try:
                    root.delegate()
                except BaseException:
                    root.remove()
                    raise
                return root
            # `remove_stale` of another supervisor came in between, and is at work on it.
            for fd in self._locks:
                os.close(fd)
            self._locks = []
            with contextlib.suppress(CgroupError):
                root.remove()
        busy = OSError(errno.EBUSY, "others keep removing it")
        raise CgroupError("make", f"{_tops(self._support)[0]}/{prefix}-…", busy)


def remove_stale(support: CgroupSupport) -> list[str]:
    """Kill and remove the groups of dead supervisors; gives their names. To be run at start.

    Dead is one whose lock is free: the kernel lets go of it at the end of the process, so neither a
    process id that is used again nor one of another PID namespace misleads. What cannot be removed
    is left to the next start.
    """
    tops = _tops(support) if support.is_usable else []
    removed: list[str] = []
    for name in sorted({name for top in tops for name in _directories_in(top)}):
        # Judged in each hierarchy by itself: on version 1 another supervisor, alive, may share one
        # of them with us and not the others.
        locks = {top: fd for top in tops if (fd := lock_directory(f"{top}/{name}")) is not None}
        try:
            below = {
                controller: f"{path}/{_TOP}/{name}"
                for controller, path in support.directories.items()
                if f"{path}/{_TOP}" in locks
            }
            if below and _end_and_remove(_GROUPS[support.version](below)):
                removed.append(name)
        finally:
            for fd in locks.values():
                os.close(fd)
    _remove_tops(support)
    return removed


def _end_and_remove(group: Group) -> bool:
    """Kill what is inside, wait for its end, remove it; whether that was done."""
    try:
        if group.processes():
            group.kill()
            if not group.wait_empty(_END_S):
                return False
        group.remove()
    except CgroupError:
        return False
    return True


class _Baseline:
    """What the counters of a group were when a call began; on version 1 they cannot be set to 0."""

    __slots__ = ("_before", "_is_peak_new")

    def __init__(self, group: Group) -> None:
        self._is_peak_new = group.restart_peak()
        self._before = group.counters()

    def until_now(self, group: Group) -> CallEvidence:
        before, now = self._before, group.counters()
        knows_peak = self._is_peak_new or now.peak_bytes > before.peak_bytes
        return CallEvidence(
            oom_kills=now.oom_kills - before.oom_kills,
            memory_refusals=now.memory_refusals - before.memory_refusals,
            pids_refused=now.pids_refused - before.pids_refused,
            cpu_s=(now.cpu_us - before.cpu_us) / 1e6,
            peak_bytes=now.peak_bytes if knows_peak else None,
        )


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
    for top in _tops(support):
        with contextlib.suppress(OSError):
            os.rmdir(top)


def _directories_in(top: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.name for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False)]
    return []
