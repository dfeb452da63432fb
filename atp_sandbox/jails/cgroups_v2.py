"""Cgroups version 2: one directory, and no process in one that has groups with limits inside."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Mapping

from atp_sandbox.jails.cgroup_files import (
    CgroupError,
    KernelFile,
    field_of,
    forbid_swap,
    read_value,
    write_value,
)
from atp_sandbox.jails.cgroup_group import Counters, Group

REQUIRED = ("memory", "pids")
OPTIONAL = ("cpu",)
SUPERVISOR = "supervisor"
"""The leaf that we move ourselves to, so that the group above may have limits put on its groups."""
_CPU_PERIOD_US = 100_000


class GroupV2(Group):
    """See `Group`."""

    def __init__(self, directories: Mapping[str, str]) -> None:
        super().__init__(directories)
        self._path = self._distinct[0]

    def delegate(self) -> None:
        enable_controllers(self._path, self._directories)

    def thaw(self) -> None:
        """Nothing to do: SIGKILL reaches what is frozen."""

    def kill(self) -> None:
        write_value(f"{self._path}/cgroup.kill", 1)

    def counters(self) -> Counters:
        memory, pids, cpu = (file.read() for file in self._counting)
        return Counters(
            oom_kills=field_of(memory, b"oom_kill"),
            memory_refusals=field_of(memory, b"max"),
            pids_refused=field_of(pids, b"max"),
            cpu_us=field_of(cpu, b"usage_usec"),
        )

    def share_cpu(self, weight: int, quota: float | None) -> None:
        write_value(f"{self._path}/cpu.weight", min(10_000, max(1, weight)))
        allowed = "max" if quota is None else str(max(1000, round(quota * _CPU_PERIOD_US)))
        write_value(f"{self._path}/cpu.max", f"{allowed} {_CPU_PERIOD_US}")

    def kill_together(self) -> None:
        write_value(f"{self._path}/memory.oom.group", 1)

    def _set_up(self) -> None:
        kill = f"{self._path}/cgroup.kill"
        if not os.path.exists(kill):
            missing = FileNotFoundError(errno.ENOENT, "Linux 5.14 or later is needed")
            raise CgroupError("use", kill, missing)

    def _open_counters(self) -> list[KernelFile]:
        names = ["memory.events", "pids.events", "cpu.stat"]
        return [KernelFile(f"{self._path}/{name}") for name in names]

    def _write_memory(self, size_bytes: int, *, was_bytes: int) -> None:
        forbid_swap(f"{self._path}/memory.swap.max", 0)
        write_value(f"{self._path}/memory.max", size_bytes)


def is_root(directory: str) -> bool:
    """Whether this is the root of the hierarchy, the one group with limits inside and processes."""
    return not os.path.exists(f"{directory}/cgroup.type")


def enable_controllers(directory: str, wanted: Iterable[str]) -> None:
    """Let the groups inside `directory` have these controllers."""
    names = " ".join(f"+{name}" for name in wanted)
    write_value(f"{directory}/cgroup.subtree_control", names)


def occupy(directory: str, wanted: Iterable[str]) -> None:
    """Move ourselves into a leaf of `directory`, which is ours, and enable controllers in it.

    CgroupError EBUSY: other processes than ours are in `directory`.
    """
    enabled = read_value(f"{directory}/cgroup.subtree_control").split()
    if set(wanted) <= set(enabled):
        return
    if not is_root(directory):
        leaf = f"{directory}/{SUPERVISOR}"
        try:
            os.makedirs(leaf, 0o755, exist_ok=True)
        except OSError as error:
            raise CgroupError("make", leaf, error) from error
        write_value(f"{leaf}/cgroup.procs", os.getpid())
    enable_controllers(directory, wanted)


def vacate(directory: str, wanted: Iterable[str]) -> None:
    """Undo `occupy` if nobody else relies on it. Safe to call again."""
    leaf = f"{directory}/{SUPERVISOR}"
    with contextlib.suppress(CgroupError, OSError):
        groups = {entry.name for entry in os.scandir(directory) if entry.is_dir()}
        if is_root(directory) or groups != {SUPERVISOR}:
            return
        if read_value(f"{leaf}/cgroup.procs").split() != [str(os.getpid())]:
            return
        names = " ".join(f"-{name}" for name in wanted)
        write_value(f"{directory}/cgroup.subtree_control", names)
        write_value(f"{directory}/cgroup.procs", os.getpid())
        os.rmdir(leaf)
