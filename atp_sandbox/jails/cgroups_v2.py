"""Cgroups version 2: one directory, and no process in a group that has groups with limits inside."""

from __future__ import annotations

import contextlib
import os

from atp_sandbox.jails.cgroup_group import (
    CgroupError,
    Counters,
    Group,
    KernelFile,
    field_of,
    forbid_swap,
    kill_listed,
    read_value,
    write_value,
)

REQUIRED = ("memory", "pids")
OPTIONAL = ("cpu",)
SUPERVISOR = "supervisor"
"""The leaf that we move ourselves to, so that the group above may have limits put on its groups."""
_CPU_PERIOD_US = 100_000
_KILL_ROUNDS = 100


class GroupV2(Group):
    """See `Group`."""

    def __init__(self, directories: dict[str, str]) -> None:
        super().__init__(directories)
        self._path = self._distinct[0]
        self._can_restart_peak = True

    def delegate(self) -> None:
        enable_controllers(self._path, self._directories)

    def kill(self) -> None:
        whole = f"{self._path}/cgroup.kill"
        if os.path.exists(whole):  # Linux 5.14
            write_value(whole, 1)
            return
        killed: set[int] = set()
        write_value(f"{self._path}/cgroup.freeze", 1)
        try:
            # A frozen process dies of SIGKILL at once here, and what is in mid-fork is born frozen.
            for _ in range(_KILL_ROUNDS):
                found = kill_listed(self)
                if found <= killed:
                    break
                killed |= found
        finally:
            write_value(f"{self._path}/cgroup.freeze", 0)

    def counters(self) -> Counters:
        memory, pids, cpu, *peak = (file.read() for file in self._counting)
        return Counters(
            oom_kills=field_of(memory, b"oom_kill"),
            memory_refusals=field_of(memory, b"max"),
            pids_refused=field_of(pids, b"max"),
            cpu_us=field_of(cpu, b"usage_usec"),
            peak_bytes=int(peak[0]) if peak else 0,
        )

    def restart_peak(self) -> None:
        # Linux 6.12 and later; it holds for what is read through this descriptor.
        if self._can_restart_peak and len(self._counting) > 3:
            try:
                self._counting[3].write(b"0")
            except CgroupError:
                self._can_restart_peak = False

    def share_cpu(self, weight: int, quota: float | None) -> None:
        write_value(f"{self._path}/cpu.weight", min(10_000, max(1, weight)))
        allowed = "max" if quota is None else str(max(1000, round(quota * _CPU_PERIOD_US)))
        write_value(f"{self._path}/cpu.max", f"{allowed} {_CPU_PERIOD_US}")

    def kill_together(self) -> None:
        write_value(f"{self._path}/memory.oom.group", 1)

    def _set_up(self) -> None:
        """A group without limits is fit as it is."""

    def _open_counters(self) -> list[KernelFile]:
        names = ["memory.events", "pids.events", "cpu.stat"]
        files = [KernelFile(f"{self._path}/{name}") for name in names]
        peak = f"{self._path}/memory.peak"  # Linux 5.19
        if os.path.exists(peak):
            # Opened for writing only where that means something: elsewhere its mode is 0444.
            flags = os.O_RDWR if os.stat(peak).st_mode & 0o200 else os.O_RDONLY
            files.append(KernelFile(peak, flags))
        return files

    def _write_memory(self, size_bytes: int, *, was_bytes: int) -> None:
        forbid_swap(f"{self._path}/memory.swap.max", 0)
        write_value(f"{self._path}/memory.max", size_bytes)


def is_root(directory: str) -> bool:
    """Whether this is the root of the hierarchy, the one group with limits inside and processes."""
    return not os.path.exists(f"{directory}/cgroup.type")


def enable_controllers(directory: str, wanted: dict[str, str]) -> None:
    """Let the groups inside `directory` have these controllers."""
    names = " ".join(f"+{name}" for name in wanted)
    write_value(f"{directory}/cgroup.subtree_control", names)


def occupy(directory: str, wanted: dict[str, str]) -> None:
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


def vacate(directory: str, wanted: dict[str, str]) -> None:
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
