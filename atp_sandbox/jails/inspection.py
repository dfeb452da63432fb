"""A confined zygote as the kernel shows it to us, before any foreign code runs in it."""

from __future__ import annotations

from atp_sandbox.confinement.plan import JailSpec
from atp_sandbox.jails.processes import read_descriptors, read_status, shared_namespaces

_MAY_CHANGE_ROOT = 1 << 18
"""CAP_SYS_CHROOT, which a zygote keeps inside its user namespace: capabilities(7)."""
_SOCKETS = 1
"""Its control channel."""


def what_is_wrong(spec: JailSpec, pid: int, outside_id: int | None) -> str:
    """What the kernel says of the zygote `pid` that its plan does not; empty if all is well.

    ProcessLookupError if it has ended.
    """
    isolation = spec.isolation
    if not isolation.is_confined:
        return ""
    status = read_status(pid)
    may_change_root = isolation.has_namespaces and spec.forks_workers
    if status.capabilities & ~(_MAY_CHANGE_ROOT if may_change_root else 0):
        return "it still has capabilities"
    if status.bounding and (isolation.has_namespaces or outside_id is not None):
        # Without a namespace, an ordinary user cannot empty the set; no_new_privs voids it.
        return "it could get capabilities again"
    if not status.no_new_privs:
        return "no_new_privs is not set"
    if isolation.has_seccomp and not status.is_filtered:
        return "its system calls are not filtered"
    if outside_id is not None and status.uid != outside_id:
        return f"it runs as user {status.uid}"
    try:
        shared = shared_namespaces(pid) if isolation.has_namespaces else []
        if shared:
            return f"it shares our namespaces: {', '.join(shared)}"
        return _what_is_open(read_descriptors(pid))
    except PermissionError:
        # Root without CAP_SYS_PTRACE, as in many a container, may not look at another user's.
        return "it cannot be looked at" if isolation.has_namespaces else ""


def _what_is_open(descriptors: list[str]) -> str:
    if sum(name.startswith("socket:") for name in descriptors) > _SOCKETS:
        return "it has a socket that is not its own"
    for name in descriptors:
        if not name.startswith(("socket:", "pipe:")) and name != "/dev/null":
            return f"it has a descriptor of {name}"
    return ""
