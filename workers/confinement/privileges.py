"""Capabilities, no_new_privs, dumpability and resource limits of a zygote and its workers.

capabilities(7), prctl(2), getrlimit(2). All of it is inherited by every worker.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any

from . import syscalls

_LAST_CAPABILITY = 63


def drop_capabilities() -> None:
    """No capability is left, none can come back through an exec, and no exec gains anything."""
    for capability in range(_LAST_CAPABILITY + 1):
        with contextlib.suppress(OSError):  # EINVAL beyond the kernel's last one
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)
    with contextlib.suppress(OSError):  # cleared by capset below as well; older kernels have none
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.clear_capabilities()
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def hide_from_tracers() -> None:
    """PR_SET_DUMPABLE 0: no ptrace, and /proc/PID/{mem,fd,environ} belong to root."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def set_resource_limits(limits: dict[str, Any]) -> None:
    """Set each named limit, soft and hard: `{"nofile": 256, …}`."""
    for name, value in limits.items():
        number = getattr(resource, "RLIMIT_" + name.upper())
        resource.setrlimit(number, (value, value))
