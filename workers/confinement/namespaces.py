"""Namespaces and identity: user, mount, PID, network, IPC, UTS and cgroup, once per jail.

namespaces(7), user_namespaces(7). Inside, the jail's one user and group are `INSIDE_ID`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

from . import syscalls

INSIDE_ID = 1000
ALL = (
    syscalls.CLONE_NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWCGROUP
)


def enter_mount_namespace() -> None:
    """A mount namespace of our own whose changes reach nobody (root only)."""
    syscalls.unshare(syscalls.CLONE_NEWNS)
    keep_mounts_private()


def keep_mounts_private() -> None:
    """What is mounted here from now on reaches no other namespace, and the other way round."""
    syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)


def become_user(outside_id: int) -> None:
    """Give up root for the unprivileged `outside_id` for good."""
    os.setgroups([])
    os.setresgid(outside_id, outside_id, outside_id)
    os.setresuid(outside_id, outside_id, outside_id)
    # A change of user makes the process undumpable and /proc/self belong to root, so that the
    # identity maps could not be written; it becomes undumpable again before foreign code runs.
    syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)


def enter_all() -> None:
    """Unshare every namespace and map this user to `INSIDE_ID`; children are in the new PID one."""
    outside_uid, outside_gid = os.getuid(), os.getgid()
    syscalls.unshare(ALL)
    _write("/proc/self/setgroups", "deny")
    _write("/proc/self/uid_map", f"{INSIDE_ID} {outside_uid} 1")
    _write("/proc/self/gid_map", f"{INSIDE_ID} {outside_gid} 1")


def forbid_nested_user_namespaces() -> None:
    """Nobody in the jail can become privileged in a namespace of their own: unshare is ENOSPC.

    The limit is that of the writer's user namespace (Documentation/admin-guide/sysctl/user.rst);
    to be called where the machine's /proc is still there.
    """
    _write("/proc/sys/user/max_user_namespaces", "0")


def bring_loopback_up() -> None:
    """`ip link set lo up`: netdevice(7)."""
    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 0x1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack_from("16xh", fcntl.ioctl(sock, siocgifflags, request))
        fcntl.ioctl(sock, siocsifflags, struct.pack("16sh22x", b"lo", flags | iff_up))


def name_host(name: str) -> None:
    """The host name that the jail sees."""
    syscalls.set_hostname(name)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
