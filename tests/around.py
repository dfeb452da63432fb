"""Run a command as if this machine lacked something: `python around.py '{"refuse": …}' COMMAND…`.

The kernel itself refuses, by a system call filter around the command, by control groups that are
mounted read-only, or by capabilities that are dropped, as in an ordinary container. No mock.

`refuse`: {"call": "EPERM"}, or {"call": ["EPERM", argument, value, …]}: only if the argument there
has all bits of one of these values. `read_only_cgroups`, `ordinary_container`: true.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workers.confinement import namespaces, seccomp, syscalls  # noqa: E402
from workers.confinement.seccomp_rules import (  # noqa: E402
    ALLOW,
    Case,
    Group,
    Profile,
    equals,
    fails_with,
    when,
)

_NAMESPACES = [0x00020000, *(1 << bit for bit in range(25, 31))]
CONTAINER = {
    "unshare": ["EPERM", 0, *_NAMESPACES],
    "clone": ["EPERM", 0, *_NAMESPACES],
    **dict.fromkeys(("setns", "mount", "umount2", "pivot_root", "mount_setattr"), "EPERM"),
    "clone3": "ENOSYS",
}
"""What a container runtime's usual filter refuses of what we would use."""
_CONTAINER_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""Those that container runtimes leave to root: capabilities(7) has the numbers."""


def refuse(calls: dict[str, Any]) -> None:
    """Install a filter that refuses these calls and nothing else."""
    groups = []
    for name, how in calls.items():
        error, *bits = [how] if isinstance(how, str) else how
        action = fails_with(getattr(errno, error))
        if not bits:
            groups.append(Group(name, "", name, action))
            continue
        argument, *values = bits
        cases: tuple[Case, ...] = tuple(when(action, equals(argument, v, mask=v)) for v in values)
        groups.append(Group(name, "", name, ALLOW, cases))
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(seccomp.compile_profile(Profile("around", tuple(groups), ALLOW, ()), _MACHINE))


_MACHINE = syscalls.MACHINE


def mount_cgroups_read_only() -> None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point, kind = line.split()[4], line.partition(" - ")[2].split()[0]
        if kind in ("cgroup", "cgroup2"):
            remount, read_only = 32, syscalls.MS_RDONLY | syscalls.MS_BIND
            syscalls.mount("none", point, None, remount | read_only)


def open_the_way_to(paths: list[str]) -> None:
    """For an interpreter below a closed directory: a copy of the way to it that is open to all."""
    syscalls.mount("kept", "/mnt", "tmpfs", 0, "mode=0700")
    for path in paths:
        parents = [p for p in reversed(Path(path).parents) if not p.stat().st_mode & 0o001]
        if not parents:
            continue
        closed, kept = parents[0], f"/mnt/{len(os.listdir('/mnt'))}"
        os.mkdir(kept)
        inside = [Path(p).relative_to(closed) for p in paths if Path(p).is_relative_to(closed)]
        syscalls.mount(str(closed), kept, None, syscalls.MS_BIND | syscalls.MS_REC)
        syscalls.mount("way", str(closed), "tmpfs", 0, "mode=0755")
        for one in inside:
            (closed / one).mkdir(mode=0o755, parents=True, exist_ok=True)
            source, target = str(Path(kept, one)), str(closed / one)
            syscalls.mount(source, target, None, syscalls.MS_BIND | syscalls.MS_REC)


def main() -> None:
    asked = json.loads(sys.argv[1])
    calls = dict(asked.get("refuse", {}))
    if os.geteuid() == 0 and (asked.get("read_only_cgroups") or asked.get("ordinary_container")):
        namespaces.enter_mount_namespace()
    if asked.get("read_only_cgroups"):
        mount_cgroups_read_only()
    if asked.get("ordinary_container"):
        calls |= CONTAINER
        if os.geteuid() == 0:
            open_the_way_to([sys.base_prefix, sys.prefix, str(ROOT)])
            for capability in range(41):
                if capability not in _CONTAINER_CAPABILITIES:
                    syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
            syscalls.keep_capabilities(sum(1 << c for c in _CONTAINER_CAPABILITIES))
    if calls:
        refuse(calls)
    os.chdir(ROOT)
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
