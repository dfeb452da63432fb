"""Each step of a jail's set-up that can be refused: what it protects, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass

from atp_sandbox.errors import IsolationError
from atp_sandbox.isolation import Isolation, Level
from atp_sandbox.jails.jail import SetupFailure


@dataclass(frozen=True, slots=True)
class Remedy:
    layer: str
    """What is missing, in the field's terms."""
    tip: str


_NAMESPACES = Remedy(
    "user namespaces",
    "Allow user namespaces to ordinary users, as whom jails of root are made too: "
    "sysctl kernel.unprivileged_userns_clone=1 (Debian), "
    "sysctl kernel.apparmor_restrict_unprivileged_userns=0 (Ubuntu 24.04 and later), "
    "sysctl user.max_user_namespaces=15000; inside a container allow unshare and mount.",
)
_MOUNTS = Remedy(
    "mount namespace",
    "Linux 5.12 or later is needed (mount_setattr); inside a container allow mount and pivot_root.",
)
REMEDIES = {
    "mount_namespace": _MOUNTS,
    "root": _MOUNTS,
    "pivot_root": Remedy(
        "mount namespace",
        "Inside a container, /proc must not be masked and mount and pivot_root must be allowed.",
    ),
    "identity": Remedy("unprivileged user", "The supervisor needs CAP_SETUID and CAP_SETGID."),
    "namespaces": _NAMESPACES,
    "nested_namespaces": _NAMESPACES,
    "hostname": _NAMESPACES,
    "loopback": Remedy("network namespace", "The kernel needs CONFIG_NET_NS."),
    "scratch": Remedy("scratch directories", "The kernel must allow tmpfs in user namespaces."),
    "resource_limits": Remedy(
        "resource limits", "Raise the hard limits of the supervisor (ulimit)."
    ),
    "capabilities": Remedy("capabilities", "The kernel refused to drop them; report it."),
    "landlock": Remedy(
        "Landlock",
        "Linux 5.13 or later with Landlock is needed: CONFIG_SECURITY_LANDLOCK=y and landlock "
        "among lsm= on the kernel command line.",
    ),
    "seccomp": Remedy(
        "seccomp",
        "The kernel needs CONFIG_SECCOMP_FILTER; a filter around us must allow seccomp(2).",
    ),
    "own_root": Remedy(
        "a root directory for each call",
        "A filter around us must allow chroot(2) inside a user namespace.",
    ),
    "parent": Remedy("an end with the supervisor", "A filter around us must allow prctl(2)."),
    "subreaper": Remedy("an end with the jail", "Linux 3.4 or later is needed."),
    "files": Remedy(
        "unprivileged user",
        "Without namespaces, a toolkit of root runs as a user who must be able to read its "
        "snapshot and the interpreter: choose a --state-dir and a Python that every user can "
        "reach, or start as an ordinary user.",
    ),
    "network": Remedy("network namespace", "The kernel needs CONFIG_NET_NS and IPv4."),
    "egress": Remedy(
        "egress process",
        "It confines itself with Landlock and seccomp as jails do; see `atp-sandbox doctor`.",
    ),
    "cgroup": Remedy("control groups", "See `atp-sandbox doctor`."),
    "verification": Remedy("verification", "This is a bug or an unsupported kernel; report it."),
    "start": Remedy("start of the jail", "Look at the cause; the machine may be out of memory."),
}


_OTHERWISE = {
    # What an operator can do, by name, about a machine that will not change.
    **dict.fromkeys(
        (
            "mount_namespace",
            "root",
            "namespaces",
            "nested_namespaces",
            "hostname",
            "loopback",
            "pivot_root",
            "scratch",
            "own_root",
        ),
        "Inside a container that forbids namespaces: --isolation container.",
    ),
    "landlock": "Or do without it, by name: --waive landlock.",
    "seccomp": "Or do without it, by name: --waive seccomp.",
    "cgroup": "Or do without them, by name: --waive cgroup.",
}


def isolation_error(failure: SetupFailure, isolation: Isolation) -> IsolationError:
    """The error that names the layer, the cause and the remedy."""
    remedy = REMEDIES[failure.step]
    tip = remedy.tip
    if isolation.level is Level.STRICT and failure.step in _OTHERWISE:
        tip = f"{tip} {_OTHERWISE[failure.step]}"
    return IsolationError(
        remedy.layer,
        f"This machine cannot enforce: {remedy.layer} (step {failure.step}).",
        cause=failure.message,
        tip=tip,
    )
