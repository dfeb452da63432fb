"""Landlock: what files, ports, signals and sockets a zygote and each of its workers can reach.

Two layers. The *base layer* is entered once by the zygote, before any foreign code, and inherited by
all: nothing outside scratch can be written. The *worker layer* is entered by each worker: of all
scratch, only its own slot. A process under one worker layer can neither trace nor, from ABI 6 on,
signal or reach by an abstract socket a process under another.

A rule set is made, filled, entered and closed within one call here, and never handed on: a rule
added to an inherited rule set would reach every sibling that enters it later. Once entered, a layer
is a copy that nothing can widen.

What no ABI covers, even for a path without any right: stat, access, chdir, readlink, chmod, chown,
utimes, the setxattr family, statfs, inotify_add_watch and open with O_PATH. A slot has to be out of
reach by other means, or its name unknown. Nor covered: mmap of an open file, memfd_create and exec
of it, UDP, listen() without bind(), and, before ABI 9, connect() to a named unix socket.

Documentation/userspace-api/landlock.rst, landlock(7), include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from typing import NamedTuple

from . import syscalls

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
REMOVE_DIR = 1 << 4
REMOVE_FILE = 1 << 5
MAKE_CHAR = 1 << 6
MAKE_DIR = 1 << 7
MAKE_REG = 1 << 8
MAKE_SOCK = 1 << 9
MAKE_FIFO = 1 << 10
MAKE_BLOCK = 1 << 11
MAKE_SYM = 1 << 12
REFER = 1 << 13  # ABI 2
TRUNCATE = 1 << 14  # ABI 3
IOCTL_DEV = 1 << 15  # ABI 5
RESOLVE_UNIX = 1 << 16  # ABI 9
BIND_TCP = 1 << 0  # ABI 4
SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # ABI 6
SCOPE_SIGNAL = 1 << 1  # ABI 6
LOG_SAME_EXEC_OFF = 1 << 0  # ABI 7
LOG_SUBDOMAINS_OFF = 1 << 2  # ABI 7

NEWEST_ABI = 9
"""The newest one that this module knows; a newer kernel is used as this one."""

_FS_ABI_1 = (1 << 13) - 1
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV | RESOLVE_UNIX
"""What a rule on something that is not a directory may name; EINVAL otherwise."""
_NEVER_IN_SCRATCH = EXECUTE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_FIRST_DESCRIPTOR = 210
"""High, so that code which closes or reuses the low descriptors does not meet ours."""


class Support(NamedTuple):
    """What the running kernel has of Landlock."""

    abi: int
    """0 where there is none."""
    reason: str
    """ENOSYS (not built in), EOPNOTSUPP (not enabled at boot) or another errno; empty if there."""


class Rights(NamedTuple):
    """The access rights of one ABI, sorted by what they are granted for."""

    handled_fs: int
    """Everything the ABI knows: what no rule grants is refused."""
    handled_net: int
    scoped: int
    flags: int
    """For landlock_restrict_self(2)."""
    execute: int
    """Beneath read-only code and data."""
    read: int
    """Beneath what is to be looked at but not run."""
    device: int
    """On a device file: no device ioctl."""
    scratch: int
    """Beneath a scratch directory: everything but device nodes, device ioctls and exec."""


class Tree(NamedTuple):
    """The file system that the layers speak of: existing absolute paths, none beneath `scratch`."""

    code: tuple[str, ...]
    """Files and directories to read and to execute."""
    data: tuple[str, ...]
    """Files and directories to read only."""
    devices: tuple[str, ...]
    """Device files to read and write."""
    scratch: str
    """The directory of all slots."""
    import_scratch: str | None
    """The slot that the import wrote to; workers may read it."""


def probe() -> Support:
    """Ask the kernel; never raises."""
    try:
        return Support(syscalls.landlock_abi(), "")
    except OSError as error:
        return Support(0, errno.errorcode.get(error.errno or 0, str(error.errno)))


def abi() -> int:
    """The kernel's Landlock ABI; 0 where there is none, and `probe` says why."""
    return probe().abi


def rights_for(abi: int) -> Rights:
    """PURE: what to handle and to grant at `abi` (1 or more), as far as this module knows it."""
    handled = _FS_ABI_1
    for right, since in ((REFER, 2), (TRUNCATE, 3), (IOCTL_DEV, 5), (RESOLVE_UNIX, 9)):
        if abi >= since:
            handled |= right
    return Rights(
        handled_fs=handled,
        handled_net=BIND_TCP if abi >= 4 else 0,
        scoped=SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if abi >= 6 else 0,
        # A tool that is refused a million times shall not fill the machine's audit log.
        flags=LOG_SAME_EXEC_OFF | LOG_SUBDOMAINS_OFF if abi >= 7 else 0,
        execute=EXECUTE | READ_FILE | READ_DIR,
        read=READ_FILE | READ_DIR,
        device=READ_FILE | WRITE_FILE,
        scratch=handled & ~_NEVER_IN_SCRATCH,
    )


def jail_tree(root: str = "/") -> Tree:
    """The tree of a jail made by `root`: all of its top level is code but /proc and /scratch.

    Links are left out, since what they lead to stands in the top level itself. No rule is on the root
    itself, because it would hold for every slot as well: nobody in a jail can list `/`.
    """
    with os.scandir(root) as entries:
        code = sorted(
            entry.path
            for entry in entries
            if not entry.is_symlink() and entry.name not in ("proc", "scratch")
        )
    scratch = os.path.join(root, "scratch")
    return Tree(
        code=tuple(code),
        data=(os.path.join(root, "proc"),),
        devices=tuple(os.path.join(root, device[1:]) for device in _DEVICES),
        scratch=scratch,
        import_scratch=os.path.join(scratch, "0"),
    )


def enter_base(tree: Tree, abi: int) -> None:
    """Confine this process and all that come of it to `tree`; needs no_new_privs.

    Only the calling thread is confined, so there must be no other: RuntimeError. OSError names the
    call; the process is then not confined and must not go on.
    """
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the base layer must be entered before there is a second thread")
    rights = rights_for(abi)
    with contextlib.ExitStack() as stack:
        rules = [
            (_open_path(stack, path), access) for path, access in _shared_rules(tree, rights)
        ]
        rules.append((_open_path(stack, tree.scratch), rights.scratch))
        _restrict(rules, rights)


class WorkerLayer:
    """The layer of a worker, prepared once in the zygote, entered once by each worker.

    Holds one O_PATH descriptor a rule, so that a worker resolves only its own slot. Owned by the
    zygote; inherited over fork, and closed in a worker by `enter`.
    """

    def __init__(self, tree: Tree, abi: int) -> None:
        self._rights = rights_for(abi)
        self._rules: list[tuple[int, int]] = []
        shared = list(_shared_rules(tree, self._rights))
        if tree.import_scratch is not None:
            shared.append((tree.import_scratch, self._rights.read))
        try:
            for path, access in shared:
                with contextlib.ExitStack() as stack:
                    low = _open_path(stack, path)
                    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
                    self._rules.append((high, _fitting(low, access)))
        except OSError:
            self.close()
            raise

    def enter(self, slot_path: str) -> None:
        """Confine this process to reading, and to `slot_path` for everything else.

        `slot_path` is resolved now, without following a link: a slot that is mounted anew is another
        directory, and rules are of directories, not of names. Only for a process with one thread.
        OSError names the call; this process is then not confined and must end.
        """
        flags = os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW
        slot_fd = os.open(slot_path, flags)
        try:
            _restrict([*self._rules, (slot_fd, self._rights.scratch)], self._rights, fitted=True)
        finally:
            os.close(slot_fd)
            self.close()

    def close(self) -> None:
        """Safe to call twice."""
        rules, self._rules = self._rules, []
        for fd, _access in rules:
            with contextlib.suppress(OSError):  # foreign code may have closed "all" descriptors
                os.close(fd)


def _shared_rules(tree: Tree, rights: Rights) -> list[tuple[str, int]]:
    return [
        *((path, rights.execute) for path in tree.code),
        *((path, rights.read) for path in tree.data),
        *((path, rights.device) for path in tree.devices),
    ]


def _open_path(stack: contextlib.ExitStack, path: str) -> int:
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    return fd


def _fitting(fd: int, access: int) -> int:
    return access if stat.S_ISDIR(os.fstat(fd).st_mode) else access & _OF_FILES


def _restrict(
    rules: Sequence[tuple[int, int]], rights: Rights, *, fitted: bool = False
) -> None:
    ruleset = syscalls.landlock_create_ruleset(
        rights.handled_fs, rights.handled_net, rights.scoped
    )
    try:
        for fd, access in rules:
            syscalls.landlock_allow_beneath(
                ruleset, fd, access if fitted else _fitting(fd, access)
            )
        syscalls.landlock_restrict_self(ruleset, rights.flags)
    finally:
        os.close(ruleset)
