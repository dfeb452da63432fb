"""What each Landlock ABI brings, and what stands in for it on an older kernel. PURE data.

Read by whoever decides whether a jail may start and by whoever writes that decision down.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Standing(enum.Enum):
    """What the absence of a feature means for a start."""

    REQUIRED = "required"
    """No start, unless the operator waives it by name."""
    SUBSTITUTED = "substituted"
    """Something else of ours gives the same; named in the feature's `substitute`."""
    WAIVABLE = "waivable"
    """Nothing that we promise depends on it."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that Landlock does for us."""

    name: str
    since_abi: int
    since_kernel: str
    protects: str
    standing: Standing
    """That of its absence."""
    substitute: str
    """What does the same, or what is lost, where the kernel has not got it."""


FEATURES = (
    Feature(
        "files",
        1,
        "5.13",
        "a call's files from other calls of its toolkit; all but its scratch from being written",
        Standing.REQUIRED,
        'lifetime = "jail": each call has a mount namespace of its own. Without it the read-only '
        "mounts still protect all but scratch",
    ),
    Feature(
        "ptrace",
        1,
        "5.13",
        "a call's memory and descriptors from other calls of its toolkit",
        Standing.REQUIRED,
        'lifetime = "jail", or both: seccomp refuses ptrace, process_vm_readv, process_vm_writev '
        "and pidfd_getfd; workers are not dumpable, so /proc/PID/mem does not open",
    ),
    Feature(
        "refer",
        2,
        "5.19",
        "nothing further: it lets a tool move a file between directories of its own scratch",
        Standing.WAIVABLE,
        "every rename and link to another directory fails with EXDEV; programs then copy",
    ),
    Feature(
        "truncate",
        3,
        "6.2",
        "files that may not be written from being emptied by truncate(2) or O_RDONLY|O_TRUNC",
        Standing.SUBSTITUTED,
        "all but scratch is on read-only mounts; scratch of other calls has to be out of reach, as "
        "must be its metadata, which no ABI covers",
    ),
    Feature(
        "bind_tcp",
        4,
        "6.7",
        "egress addresses and ports inside the jail from being taken over",
        Standing.SUBSTITUTED,
        "the worker's seccomp filter refuses bind(2) and listen(2); the jail's network namespace "
        "has only its loopback",
    ),
    Feature(
        "ioctl_dev",
        5,
        "6.10",
        "device drivers from ioctl",
        Standing.SUBSTITUTED,
        "the jail's /dev has five memory devices and no terminal; seccomp allows ioctls by number",
    ),
    Feature(
        "scope_signal",
        6,
        "6.12",
        "other calls, the zygote and the warden from being signalled",
        Standing.SUBSTITUTED,
        "the worker's seccomp filter, made after its fork, allows signals only to its own process "
        "id, and refuses pidfd_send_signal and fcntl F_SETOWN; not where subprocesses are allowed",
    ),
    Feature(
        "scope_abstract_unix_socket",
        6,
        "6.12",
        "abstract unix sockets of other calls of the same toolkit from being connected to",
        Standing.SUBSTITUTED,
        "the network namespace keeps them inside the jail; the worker's seccomp filter refuses "
        "bind(2), so that no call has one",
    ),
    Feature(
        "quiet_log",
        7,
        "6.15",
        "nothing: it keeps refusals out of the machine's audit log",
        Standing.WAIVABLE,
        "older kernels log no refusal",
    ),
    Feature(
        "tsync",
        8,
        "7.0",
        "nothing further: it confines the other threads of a process at once",
        Standing.SUBSTITUTED,
        "each layer is entered while its process has one thread, which the base layer checks",
    ),
    Feature(
        "resolve_unix",
        9,
        "7.1",
        "named unix sockets of other calls of the same toolkit from being connected to",
        Standing.SUBSTITUTED,
        "the worker's seccomp filter refuses bind(2), so that no call has one",
    ),
)


def substitutes(abi: int) -> list[Feature]:
    """The features that a kernel of this Landlock ABI (0: none) has not got, oldest first."""
    return [feature for feature in FEATURES if feature.since_abi > abi]
