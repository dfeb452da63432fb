"""Cgroups version 1: one directory in each controller's hierarchy.

memory and pids limit, freezer makes a kill complete, cpu and cpuacct are used where they are.
"""

from __future__ import annotations

import contextlib
import mmap
import os

from atp_sandbox.jails.cgroup_files import (
    CgroupError,
    KernelFile,
    field_of,
    forbid_swap,
    read_value,
    write_value,
)
from atp_sandbox.jails.cgroup_group import Counters, Group, directories_below, kill_listed

REQUIRED = ("memory", "pids", "freezer")
OPTIONAL = ("cpu", "cpuacct")
_CPU_PERIOD_US = 100_000
_DEFAULT_SHARES = 1024
_KILL_ROUNDS = 100
"""Each finds what was being forked during the one before; two are usual."""


class GroupV1(Group):
    """See `Group`."""

    def delegate(self) -> None:
        """Nothing to do: every group here can have others inside."""

    def kill(self) -> None:
        # Frozen processes cannot fork, so one look finds all but those that were just being made,
        # and those are born frozen. What has a SIGKILL pending makes no more.
        killed: set[int] = set()
        for _ in range(_KILL_ROUNDS):
            self._freeze("FROZEN")
            try:
                found = kill_listed(self)
            finally:
                self.thaw()
            if found <= killed:
                return
            killed |= found

    def counters(self) -> Counters:
        oom, events, refusals, *cpu = (file.read() for file in self._counting)
        return Counters(
            oom_kills=field_of(oom, b"oom_kill"),
            memory_refusals=int(refusals),
            pids_refused=field_of(events, b"max"),
            cpu_us=int(cpu[0]) // 1000 if cpu else 0,
        )

    def share_cpu(self, weight: int, quota: float | None) -> None:
        self._write("cpu", "cpu.shares", max(2, weight * _DEFAULT_SHARES // 100))
        allowed_us = -1 if quota is None else max(1000, round(quota * _CPU_PERIOD_US))
        self._write("cpu", "cpu.cfs_period_us", _CPU_PERIOD_US)
        self._write("cpu", "cpu.cfs_quota_us", allowed_us)

    def kill_together(self) -> None:
        """Version 1 ends one process; the rest of its group is ended by its owner."""

    def _set_up(self) -> None:
        # Both are inherited from whatever made the group above: a group whose processes wait for
        # memory instead of being ended, and (before Linux 5.11) limits that do not nest.
        self._write("memory", "memory.oom_control", 0)
        nesting = f"{self._directories['memory']}/memory.use_hierarchy"
        if os.path.exists(nesting) and read_value(nesting) != "1":
            write_value(nesting, 1)
        swappiness = f"{self._directories['memory']}/memory.swappiness"
        if os.path.exists(swappiness):
            write_value(swappiness, 0)

    def _open_counters(self) -> list[KernelFile]:
        memory = self._directories["memory"]
        files = [
            KernelFile(f"{memory}/memory.oom_control"),
            KernelFile(f"{self._directories['pids']}/pids.events"),
            KernelFile(f"{memory}/memory.failcnt"),
        ]
        if "cpuacct" in self._directories:
            files.append(KernelFile(f"{self._directories['cpuacct']}/cpuacct.usage"))
        return files

    def _write_memory(self, size_bytes: int, *, was_bytes: int) -> None:
        swap = f"{self._directories['memory']}/memory.memsw.limit_in_bytes"
        # One page more than memory alone: with equal limits the sum is refused first, and that
        # refusal is not counted any more (seen on Linux 6.18).
        with_swap_bytes = size_bytes + mmap.PAGESIZE
        # The sum can never be limited to less than memory alone: which comes first depends.
        is_raise = 0 < was_bytes < size_bytes
        if is_raise:
            forbid_swap(swap, with_swap_bytes)
        self._write("memory", "memory.limit_in_bytes", size_bytes)
        if not is_raise:
            forbid_swap(swap, with_swap_bytes)

    def thaw(self) -> None:
        # A group inside that its supervisor froze before it died stays so whatever is done above.
        for directory in reversed(directories_below(self._directories.get("freezer", ""))):
            with contextlib.suppress(CgroupError):  # removed meanwhile
                write_value(f"{directory}/freezer.state", "THAWED")

    def _freeze(self, state: str) -> None:
        # Of a dead supervisor's groups not every hierarchy may be ours to see.
        if "freezer" in self._directories:
            self._write("freezer", "freezer.state", state)

    def _write(self, controller: str, name: str, value: int | str) -> None:
        write_value(f"{self._directories[controller]}/{name}", value)
