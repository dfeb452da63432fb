"""The groups of one jail: what limits it, what limits each of its calls, and what was counted.

Trusted side only; see `cgroups` for the whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from atp_sandbox.jails.cgroup_files import CgroupError
from atp_sandbox.jails.cgroup_group import Counters, Group

_END_S = 0.5
"""From SIGKILL to the last process gone, if any was left when the warden was reaped."""


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


class CallGroup:
    """The group of one worker, taken from its jail's; unusable once given back."""

    __slots__ = ("_before", "_group", "_jail")

    def __init__(self, jail: JailGroup, group: Group, *, counts_cpu: bool) -> None:
        """See `JailGroup.take_call`, which calls this."""
        self._jail = jail
        self._group: Group | None = group
        self._before = self._now(counts_cpu=counts_cpu)

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
        return _counted_since(self._before, self._open.counters())

    def restart(self, *, counts_cpu: bool) -> None:
        """Count anew, for the next call of the same worker; its processor time only if asked to."""
        self._before = self._now(counts_cpu=counts_cpu)

    def _now(self, *, counts_cpu: bool) -> Counters:
        group = self._open
        known = None if counts_cpu else group.known
        group.known, group.marks = group.counters_since(known, group.marks)
        return group.known

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
        self._left: Group | None = None
        """What could not be removed yet."""
        self._calls: list[Group] = []
        self._free: list[Group] = []
        self._base = group.child("base", has_children=False)
        self._base.kill_together()
        self._before = self._base.counters()

    def add(self, pid: int) -> None:
        """Move the process that becomes the jail here; what it forks from then on is here too.

        As `CallGroup.add`.
        """
        self._base.add(pid)

    def adder(self) -> Callable[[int], None]:
        """`add` as it can be called in another thread, and after the jail was closed."""
        return self._base.add

    def take_call(self, *, memory_bytes: int, pids_max: int, counts_cpu: bool = False) -> CallGroup:
        """A group for one worker: one that was given back, else a new one (1 ms).

        `counts_cpu`: whether the processor time of its call will be asked for.

        CgroupError: the worker must not run.
        """
        group = self._free.pop() if self._free else self._make_call()
        group.limit_memory(memory_bytes)
        group.limit_processes(pids_max)
        return CallGroup(self, group, counts_cpu=counts_cpu)

    def prepare_calls(self, count: int) -> None:
        """Make groups ahead of need, so that `count` are there and free."""
        while len(self._free) < count:
            self._free.append(self._make_call())

    def base_evidence(self) -> CallEvidence:
        """What was counted of the warden and the zygote: an import that ran out of memory."""
        return _counted_since(self._before, self._base.counters())

    def processes(self) -> set[int]:
        """Every process of the jail, so that an unknown one is seen. Slow: not for every call."""
        return self._open.processes()

    def kill(self) -> None:
        """SIGKILL the whole jail, whatever its processes do; does not wait."""
        self._open.kill()

    def close(self) -> bool:
        """End what is left in it and remove it. False if something would not end within 0.5 s, or
        there are no descriptors to see to it. Safe to call again: what is left is tried once more,
        without waiting.
        """
        patience_s = 0.0
        if self._group is not None:
            patience_s = _END_S
            self._left, self._group = self._group, None
            self._free.clear()  # their directories go with the jail's
            for one in (self._base, *self._calls):
                one.close_files()
        if self._left is not None and self._left.end_and_remove(patience_s):
            self._left = None
        return self._left is None

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
        with contextlib.suppress(CgroupError):  # the end of the jail is its end, too
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


def _counted_since(before: Counters, now: Counters) -> CallEvidence:
    """On version 1 counters cannot be set to 0."""
    return CallEvidence(
        oom_kills=now.oom_kills - before.oom_kills,
        memory_refusals=now.memory_refusals - before.memory_refusals,
        pids_refused=now.pids_refused - before.pids_refused,
        cpu_s=(now.cpu_us - before.cpu_us) / 1e6,
    )
