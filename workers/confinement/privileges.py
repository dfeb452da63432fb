"""Capabilities, no_new_privs, dumpability and resource limits of a zygote and its workers.

capabilities(7), prctl(2), getrlimit(2). All of it is inherited by every worker.
"""

from __future__ import annotations

import contextlib
import errno
import resource
import signal
from typing import Any

from . import syscalls

_LAST_CAPABILITY = 63


def drop_capabilities(*, may_change_root: bool = False) -> None:
    """No capability is left, none can come back through an exec, and no exec gains anything.

    All but chroot(2), if asked for: each worker then makes a root of its own its root, and drops
    that last one (`drop_last_capability`).
    """
    empty_bounding_set()
    with contextlib.suppress(OSError):  # cleared by capset below as well; older kernels have none
        syscalls.prctl(syscalls.PR_CAP_AMBIENT, syscalls.PR_CAP_AMBIENT_CLEAR_ALL)
    syscalls.keep_capabilities(1 << syscalls.CAP_SYS_CHROOT if may_change_root else 0)
    syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)


def empty_bounding_set() -> None:
    """As far as this process may (CAP_SETPCAP), no exec can bring a capability any more."""
    for capability in range(_LAST_CAPABILITY + 1):
        with contextlib.suppress(OSError):  # EINVAL beyond the kernel's last one; EPERM
            syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)


def drop_last_capability() -> None:
    """What `drop_capabilities` left goes too."""
    syscalls.keep_no_capabilities()


def die_with_parent() -> None:
    """PR_SET_PDEATHSIG: the end of the thread that started this process is its end, if it is
    stopped too. To be called after the last change of user, which undoes it."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)


def wake_with_parent() -> None:
    """PR_SET_PDEATHSIG as above, for one that has to put its house in order before it ends."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGCONT)


def hide_from_tracers() -> None:
    """PR_SET_DUMPABLE 0: no ptrace, and /proc/PID/{mem,fd,environ} belong to root."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)


def show_to_tracers() -> None:
    """PR_SET_DUMPABLE 1: whoever has our user id and no less power may look at us."""
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def set_resource_limits(limits: dict[str, Any]) -> None:
    """Set each named limit, soft and hard: `{"nofile": 256, …}`. OSError names the limit."""
    for name, value in limits.items():
        number = getattr(resource, "RLIMIT_" + name.upper())
        try:
            resource.setrlimit(number, (value, value))
        except (ValueError, OSError) as error:  # the former is Python's word for EPERM and EINVAL
            raise OSError(errno.EPERM, f"setrlimit {name} to {value}: {error}") from error
