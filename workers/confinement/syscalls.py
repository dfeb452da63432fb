"""The system calls that Python does not offer. The only module of `workers` that uses ctypes.

Each function raises OSError with errno and the call's name. Constants are those of the kernel's
uapi headers; call numbers are in `syscall_numbers`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
import struct
from collections.abc import Iterable
from typing import Any

from .syscall_numbers import NUMBERS

# linux/sched.h
CLONE_PARENT = 0x00008000
CLONE_CHILD_CLEARTID = 0x00200000
CLONE_CHILD_SETTID = 0x01000000
CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
SIGCHLD = 17

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
AT_FDCWD = -100
AT_RECURSIVE = 0x8000

# linux/prctl.h, linux/capability.h
PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_TID_ADDRESS = 40
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
CAP_SYS_CHROOT = 18
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

# linux/mman.h
MADV_COLLAPSE = 25

# linux/landlock.h
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1

MACHINE = platform.machine()

_libc = ctypes.CDLL(None, use_errno=True)
# Keeps the interpreter lock during the call: after a raw fork the child must still hold it.
_locked_libc = ctypes.PyDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _number(name: str) -> int:
    try:
        return NUMBERS[MACHINE][name]
    except KeyError:
        raise OSError(errno.ENOSYS, f"{name}: unknown on machine {MACHINE}") from None


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def unshare(flags: int) -> None:
    """unshare(2)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """mount(2)."""
    result = _libc.mount(
        os.fsencode(source),
        os.fsencode(target),
        None if kind is None else kind.encode(),
        ctypes.c_ulong(flags),
        os.fsencode(data) if data else None,
    )
    _check(result, f"mount {kind or source} on {target}")


def unmount(target: str, flags: int = MNT_DETACH) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), f"umount {target}")


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


def mount_set_attributes(target: str, attributes: int, *, recursive: bool) -> None:
    """mount_setattr(2), Linux 5.12: the only way to make every submount of a bind read-only."""
    attr = _MountAttr(attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = _syscall(
        ctypes.c_long(_number("mount_setattr")),
        ctypes.c_int(AT_FDCWD),
        os.fsencode(target),
        ctypes.c_uint(flags),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    _check(result, f"mount_setattr {target}")


def pivot_root_here() -> None:
    """pivot_root(".", "."): the old root ends up stacked on the new one (pivot_root(2), NOTES)."""
    result = _syscall(ctypes.c_long(_number("pivot_root")), b".", b".")
    _check(result, "pivot_root")


def set_hostname(name: str) -> None:
    """sethostname(2)."""
    data = name.encode()
    _check(_libc.sethostname(data, ctypes.c_size_t(len(data))), "sethostname")


# Each worker makes some calls right after its fork, when every page that it touches for the first
# time costs a fault. So they all go through one function, which takes numbers and packed bytes.
def _five_arguments(library: ctypes.CDLL) -> Any:
    function = library["syscall"]
    function.restype = ctypes.c_long
    function.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * 5)
    return function


_call = _five_arguments(_libc)
_fork = _five_arguments(_locked_libc)


def _number_or_none(name: str) -> int:
    """The kernel answers a call with no number ENOSYS."""
    return NUMBERS.get(MACHINE, {}).get(name, -1)


_CAPSET = _number_or_none("capset")
_CLONE = _number_or_none("clone")
_MADVISE = _number_or_none("madvise")
_PRCTL = _number_or_none("prctl")
_LANDLOCK_CREATE_RULESET = _number_or_none("landlock_create_ruleset")
_LANDLOCK_ADD_RULE = _number_or_none("landlock_add_rule")
_LANDLOCK_RESTRICT_SELF = _number_or_none("landlock_restrict_self")
_SECCOMP = _number_or_none("seccomp")


def prctl(option: int, argument: int = 0) -> int:
    """prctl(2) with one argument."""
    result = _call(_PRCTL, option, argument, 0, 0, 0)
    return result if result >= 0 else _check(result, f"prctl {option}")


# struct __user_cap_header_struct and two of struct __user_cap_data_struct.
_CAPABILITIES_OF_THIS_PROCESS = struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0)
_CAPABILITY_SETS = struct.Struct("=6I")
_NO_CAPABILITIES = bytes(_CAPABILITY_SETS.size)


def keep_capabilities(kept: int) -> None:
    """capset(2): of the first 32 capabilities only those in the set `kept` stay, and none else."""
    sets = _CAPABILITY_SETS.pack(kept, kept, 0, 0, 0, 0)
    _check(_call(_CAPSET, _CAPABILITIES_OF_THIS_PROCESS, sets, 0, 0, 0), "capset")


def keep_no_capabilities() -> None:
    """capset(2)."""
    sets = _NO_CAPABILITIES
    _check(_call(_CAPSET, _CAPABILITIES_OF_THIS_PROCESS, sets, 0, 0, 0), "capset")


@functools.lru_cache(maxsize=1)
def _child_tid_address() -> int:
    """Where the C library keeps this thread's id; 0 if the kernel does not tell."""
    address = ctypes.c_void_p(0)
    result = _call(_PRCTL, PR_GET_TID_ADDRESS, ctypes.addressof(address), 0, 0, 0)
    return 0 if result < 0 else (address.value or 0)


def fork_as_sibling() -> int:
    """clone(2) with CLONE_PARENT and no at-fork hooks: 0 in the child, its process id here.

    The child's parent is the caller's parent. Only for a single-threaded caller: nothing that other
    threads might have held is repaired. The child's C library is told its new thread id, which
    fork(3) would have done; what Python's hooks would have reseeded is the caller's task.
    """
    flags = CLONE_PARENT | SIGCHLD
    address = _child_tid_address()
    if address:
        flags |= CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    # The order of the last two differs by machine: clone(2), NOTES.
    tail = (address, 0) if MACHINE == "x86_64" else (0, address)
    result = _fork(_CLONE, flags, 0, 0, *tail)
    return _check(result, "clone")


def landlock_abi() -> int:
    """landlock_create_ruleset(2) asked for its version; ENOSYS or EOPNOTSUPP where it is off."""
    result = _call(_LANDLOCK_CREATE_RULESET, 0, 0, LANDLOCK_CREATE_RULESET_VERSION, 0, 0)
    return _check(result, "landlock_create_ruleset")


def landlock_create_ruleset(attributes: bytes) -> int:
    """landlock_create_ruleset(2): a close-on-exec descriptor that the caller owns.

    `attributes` is a packed `struct landlock_ruleset_attr`. A kernel that does not know the later
    members accepts them as long as they are zero.
    """
    result = _call(_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0, 0, 0)
    return _check(result, "landlock_create_ruleset")


def landlock_add_rules(ruleset_fd: int, rules: Iterable[bytes]) -> None:
    """landlock_add_rule(2) with each packed `struct landlock_path_beneath_attr`."""
    for rule in rules:
        if _call(_LANDLOCK_ADD_RULE, ruleset_fd, LANDLOCK_RULE_PATH_BENEATH, rule, 0, 0) < 0:
            _check(-1, "landlock_add_rule")


def landlock_restrict_self(ruleset_fd: int, flags: int) -> None:
    """landlock_restrict_self(2): of the calling thread, for good; needs no_new_privs."""
    result = _call(_LANDLOCK_RESTRICT_SELF, ruleset_fd, flags, 0, 0, 0)
    _check(result, "landlock_restrict_self")


def collapse_pages(address: int, length: int) -> bool:
    """madvise(2) with MADV_COLLAPSE, Linux 6.1; False if the kernel does not."""
    return int(_call(_MADVISE, address, length, MADV_COLLAPSE, 0, 0)) >= 0


SECCOMP_SET_MODE_FILTER = 1


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


class SeccompFilter:
    """An array of `struct sock_filter` as seccomp(2) takes it; the caller may still change it."""

    def __init__(self, program: bytearray) -> None:
        self._program = (ctypes.c_char * len(program)).from_buffer(program)
        self._fprog = _SockFprog(len(program) // 8, ctypes.addressof(self._program))
        self._address = ctypes.addressof(self._fprog)

    def install(self) -> None:
        """seccomp(2): filter this thread, and what it starts, for good."""
        if _call(_SECCOMP, SECCOMP_SET_MODE_FILTER, 0, self._address, 0, 0) < 0:
            number = ctypes.get_errno()
            reason = _SECCOMP_REASONS.get(number, "failed")
            raise OSError(number, f"seccomp: {os.strerror(number)}: {reason}")


_SECCOMP_REASONS = {
    errno.EACCES: "no_new_privs is not set",
    errno.EINVAL: "a malformed filter, or a kernel without CONFIG_SECCOMP_FILTER",
    errno.ENOMEM: "too many filters",
    errno.ENOSYS: "a kernel without it, or a filter around us that hides it",
    errno.EPERM: "forbidden by a filter around us",
}


def errno_of(number: int, *arguments: int) -> int:
    """The errno that system call `number` answers these plain numbers with; 0 for success."""
    ctypes.set_errno(0)
    result = _syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    return ctypes.get_errno() if result < 0 else 0
