"""What the egress process gives up before it sees a byte of a toolkit.

From then on it has the sockets that it was handed and those that it dials with, over IP alone: no
program can be started, no process made or looked at, no file written, and none read but what the C
library needs to resolve names. Uses the same mechanisms as a jail's processes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable
from typing import Any

from workers.confinement import (
    landlock,
    namespaces,
    privileges,
    seccomp,
    seccomp_profiles,
    syscalls,
)
from workers.confinement.seccomp_rules import (
    ALLOW,
    EPERM,
    OWN_PID,
    Group,
    Profile,
    equals,
    fails_with,
    when,
)

_RESOLVER_FILES = (
    "/etc",  # resolv.conf, hosts, nsswitch.conf, gai.conf: they are replaced, so not by name
    "/run/systemd/resolve",
    "/run/resolvconf",
    "/run/NetworkManager",
    # Modules of nsswitch.conf(5) are loaded when the first name is asked for.
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
)
_RESOURCE_LIMITS = {
    "core": 1,
    # A certificate's key passes through a file without a name (memfd_create(2)).
    "fsize": 1024 * 1024,
    # No group counts it; a connection's buffers are at most half a MiB.
    "as": 8 * 1024 * 1024 * 1024,
}
_INET = equals(0, 2, 10)
_STREAM = equals(1, 1, mask=~0x80800)
_DGRAM = equals(1, 2, mask=~0x80800)
_IP_ALONE = Group(
    "IP sockets alone",
    "TCP to dial, UDP to resolve. Not AF_UNIX, behind which this machine's own services are; a C "
    "library that finds its cache or its local resolver that way goes on without.",
    "socket",
    fails_with(errno.EAFNOSUPPORT),
    (when(ALLOW, _INET, _STREAM), when(ALLOW, _INET, _DGRAM)),
)
_ONESELF = Group(
    "signals to itself",
    "What abort(3) and raise(3) use, in its own process.",
    "tgkill",
    EPERM,
    (when(ALLOW, equals(0, OWN_PID)),),
)
_NOBODY_ELSE = Group(
    "signals to others, servers, pairs",
    "All sockets that it listens on are handed to it, bound; a datagram pair could send to any "
    "path, such as /dev/log, and the event loop has its pair by now.",
    "kill tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open pidfd_send_signal bind socketpair",
    EPERM,
)
_TAKEN_OVER = (_IP_ALONE, _ONESELF, _NOBODY_ELSE)


class Refused(Exception):
    """A step of the lock-down was refused, or does not hold."""

    def __init__(self, step: str, reason: str) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason


def profile() -> Profile:
    """The system calls that are left: a lone jail process's, with IP sockets and no signals."""
    taken = {name for group in _TAKEN_OVER for name in group.calls.split()}
    base = seccomp_profiles.LONE
    kept = [
        group._replace(calls=" ".join(n for n in group.calls.split() if n not in taken))
        for group in base.groups
    ]
    probes = tuple(probe for probe in base.probes if probe.call != "socket")
    return Profile(
        "egress",
        (*(group for group in kept if group.calls), *_TAKEN_OVER),
        base.unlisted,
        probes,
    )


def lock_down(outside_id: int | None, *, has_landlock: bool, has_seccomp: bool) -> None:
    """Confine this process for good and see that it holds; Refused.

    To be called while there is one thread, with everything imported. `outside_id`: the user to
    become, if this is root's. A layer that was waived is done without.
    """
    if threading.active_count() != 1:
        raise Refused("start", "there is more than one thread")
    if outside_id is not None:
        # While it may: whoever is nobody special cannot.
        _step("capabilities", privileges.empty_bounding_set)
        _step("identity", namespaces.become_user, outside_id)
    # Whoever hangs up on it ends it too, but not while it is stopped.
    _step("parent", privileges.die_with_parent)
    _step("resource_limits", privileges.set_resource_limits, _RESOURCE_LIMITS)
    _step("capabilities", privileges.drop_capabilities)
    if has_landlock:
        _step("landlock", _restrict_files)
    if has_seccomp:
        program = _step("seccomp", seccomp.compile_profile, profile(), syscalls.MACHINE)
        _step("seccomp", seccomp.install, program)
        _step("seccomp", seccomp.verify_answers, profile())
        _refuse_if("seccomp", "an AF_UNIX socket could be made", _make_unix_socket)
    if has_landlock:
        _refuse_if("landlock", "a file that is not the resolver's could be read", _read_a_file)


def _restrict_files() -> None:
    support = landlock.probe()
    if support.abi < 1:
        raise OSError(errno.EOPNOTSUPP, f"Landlock is not there {support.reason}".rstrip())
    paths = [os.path.realpath(path) for path in _RESOLVER_FILES if os.path.isdir(path)]
    landlock.enter_reading(sorted(set(paths)), support.abi)


def _make_unix_socket() -> None:
    socket.socket(socket.AF_UNIX).close()


def _read_a_file() -> None:
    os.close(os.open("/proc/self/status", os.O_RDONLY))


def _refuse_if(step: str, reason: str, attempt: Callable[[], None]) -> None:
    """A claim of this module, tried."""
    with contextlib.suppress(OSError):
        attempt()
        raise Refused(step, f"does not hold: {reason}")


def _step(name: str, action: Any, *arguments: Any) -> Any:
    try:
        return action(*arguments)
    except OSError as error:
        raise Refused(name, error.strerror or str(error)) from error
