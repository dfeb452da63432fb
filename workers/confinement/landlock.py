"""Landlock: what files, ports, signals and sockets a zygote and each of its workers can reach.

Two layers. The *base layer* is entered once by the zygote, before any foreign code, and inherited
by all: nothing outside scratch can be written. The *worker layer* is entered by each worker: of all
scratch, only its own slot. A process under one worker layer can neither trace nor, from ABI 6 on,
signal or reach by an abstract socket a process under another.

A rule set is made, filled, entered and closed within one call here and never handed on: a rule
added to an inherited rule set reaches every sibling that enters it later. Once entered, a layer is
a copy that nothing can widen.

What no ABI covers, even for a path without any right: stat, access, chdir, readlink, chmod, chown,
utimes, the xattr calls, statfs, inotify_add_watch and open with O_PATH. A slot has to be out of
reach by other means, or its name unknown. Nor covered: what is reached through an open descriptor,
exec of a memfd, UDP, listen() without bind() and, before ABI 9, connect() to a named unix socket.

Documentation/userspace-api/landlock.rst, landlock(7), include/uapi/linux/landlock.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterable
from typing import NamedTuple

from . import syscalls

EXECUTE = 1 << 0
WRITE_FILE = 1 << 1
READ_FILE = 1 << 2
READ_DIR = 1 << 3
MAKE_CHAR = 1 << 6
MAKE_BLOCK = 1 << 11
REFER = 1 << 13
TRUNCATE = 1 << 14
IOCTL_DEV = 1 << 15
RESOLVE_UNIX = 1 << 16
BIND_TCP = 1 << 0
SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0
SCOPE_SIGNAL = 1 << 1
LOG_SAME_EXEC_OFF = 1 << 0
LOG_SUBDOMAINS_OFF = 1 << 2

NEWEST_ABI = 9
"""The newest that this module knows; a newer kernel is used as if it were this one."""

_FS_OF_ABI_1 = (1 << 13) - 1
_FS_SINCE = ((REFER, 2), (TRUNCATE, 3), (IOCTL_DEV, 5), (RESOLVE_UNIX, 9))
_OF_FILES = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV | RESOLVE_UNIX
"""What a rule on anything but a directory may name; EINVAL otherwise."""
_NEVER_IN_SCRATCH = EXECUTE | MAKE_CHAR | MAKE_BLOCK | IOCTL_DEV
_DEVICES = ("null", "zero", "full", "random", "urandom")
_FIRST_DESCRIPTOR = 210
"""High, so that code which closes all low descriptors does not meet ours."""
_PROBE_NAME = "landlock-probe"
_OPEN_SLOT = os.O_PATH | os.O_CLOEXEC | os.O_DIRECTORY | os.O_NOFOLLOW

_entered_base = False


class Support(NamedTuple):
    """What the running kernel has of Landlock."""

    abi: int
    """0 where there is none."""
    reason: str
    """ENOSYS (not built in), EOPNOTSUPP (not enabled at boot), another errno; empty if there."""


class Rights(NamedTuple):
    """The access rights of one ABI, sorted by what they are granted for."""

    handled_fs: int
    """All that the ABI knows: what no rule grants is refused."""
    handled_net: int
    scoped: int
    flags: int
    """Those of landlock_restrict_self(2)."""
    code: int
    """Beneath what is to be read and run."""
    data: int
    """Beneath what is to be read and not run."""
    device: int
    """On a device file: no device ioctl."""
    scratch: int
    """Beneath a scratch directory: all but device nodes, device ioctls and exec."""


class Tree(NamedTuple):
    """The file system that both layers speak of: existing absolute paths."""

    code: tuple[str, ...]
    """Files and directories to read and run; neither above nor beneath `scratch`."""
    data: tuple[str, ...]
    """Files and directories to read; neither above nor beneath `scratch`."""
    devices: tuple[str, ...]
    """Device files to read and write."""
    scratch: str
    """The directory of all slots."""
    import_scratch: str | None
    """The slot that the import wrote to, which workers read."""


def probe() -> Support:
    """Ask the kernel; never raises."""
    try:
        return Support(syscalls.landlock_abi(), "")
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:  # which Python knows by its other name
            return Support(0, "EOPNOTSUPP")
        return Support(0, errno.errorcode.get(error.errno or 0, str(error.errno)))


def abi() -> int:
    """The kernel's Landlock ABI; 0 where there is none, and `probe` says why."""
    return probe().abi


def rights_for(abi: int) -> Rights:
    """PURE: what to handle and what to grant at `abi`, which is 1 or more."""
    handled = _FS_OF_ABI_1
    for right, since in _FS_SINCE:
        if abi >= since:
            handled |= right
    return Rights(
        handled_fs=handled,
        handled_net=BIND_TCP if abi >= 4 else 0,
        scoped=SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if abi >= 6 else 0,
        # A tool that is refused a million times shall not fill the machine's audit log.
        flags=LOG_SAME_EXEC_OFF | LOG_SUBDOMAINS_OFF if abi >= 7 else 0,
        code=EXECUTE | READ_FILE | READ_DIR,
        data=READ_FILE | READ_DIR,
        device=READ_FILE | WRITE_FILE,
        scratch=handled & ~_NEVER_IN_SCRATCH,
    )


def jail_tree(root: str = "/") -> Tree:
    """The tree of the jail at `root`: its whole top level is code, but for /proc and scratch.

    Links are left out, as what they lead to stands in the top level itself. No rule is on the root,
    because it would hold for every slot as well: nobody under these layers can list `/`.
    """
    with os.scandir(root) as entries:
        code = [
            entry.path
            for entry in entries
            if not entry.is_symlink() and entry.name not in ("proc", "scratch", "slots")
        ]
    scratch = os.path.join(root, "scratch")
    return Tree(
        code=tuple(sorted(code)),
        data=(os.path.join(root, "proc"),),
        devices=tuple(os.path.join(root, "dev", name) for name in _DEVICES),
        scratch=scratch,
        import_scratch=os.path.join(scratch, "0"),
    )


def tree_of(code: Iterable[str], scratch: str) -> Tree:
    """The tree of a toolkit that keeps the machine's root: `code` to read and run, and `scratch`.

    Of /proc only the entry of the calling process, which is to be the zygote.
    """
    return Tree(
        code=tuple(code),
        data=(f"/proc/{os.getpid()}",),
        devices=tuple(f"/dev/{name}" for name in _DEVICES),
        scratch=scratch,
        import_scratch=os.path.join(scratch, "0"),
    )


def enter_base(tree: Tree, abi: int) -> None:
    """Confine this process and all that come of it to `tree`. Needs no_new_privs.

    Once a process only, and before there is a second thread, which would not be confined:
    RuntimeError. OSError names the call; the process is then not confined and must end.
    """
    global _entered_base
    if _entered_base:
        raise RuntimeError("the base layer was entered already")
    if len(os.listdir("/proc/self/task")) != 1:
        raise RuntimeError("the base layer must be entered before there is a second thread")
    rights = rights_for(abi)
    rules = [*_shared_rules(tree, rights), (tree.scratch, rights.scratch)]
    descriptors: list[int] = []
    try:
        packed = _open_rules(rules, descriptors)
        _restrict(_pack_handled(rights), packed, rights.flags)
    finally:
        _close(descriptors)
    _entered_base = True


def enter_reading(paths: Iterable[str], abi: int) -> None:
    """Confine this process to reading beneath `paths`, which exist; conditions as `enter_base`."""
    rights = rights_for(abi)
    descriptors: list[int] = []
    try:
        packed = _open_rules([(path, rights.data) for path in paths], descriptors)
        _restrict(_pack_handled(rights), packed, rights.flags)
    finally:
        _close(descriptors)


class WorkerLayer:
    """The layer of a worker: prepared once, in the zygote; entered once, by each worker.

    Holds one O_PATH descriptor a rule, so that a worker resolves nothing but its own slot. The
    zygote owns it; a worker closes its copies as it enters.
    """

    def __init__(self, tree: Tree, abi: int) -> None:
        self._is_one_range = False
        self._rights = rights_for(abi)
        self._handled = _pack_handled(self._rights)
        rules = _shared_rules(tree, self._rights)
        if tree.import_scratch is not None:
            rules.append((tree.import_scratch, self._rights.data))
        self._descriptors: list[int] = []
        try:
            self._rules = _open_rules(rules, self._descriptors)
        except OSError:
            self.close()
            raise
        self._is_one_range = _are_consecutive(self._descriptors)

    def enter(self, slot_path: str) -> None:
        """Confine this process to reading the tree, and to `slot_path` for all else.

        The slot is looked up now, through no link in its last part: rules are of directories, not
        of names, and a slot that was mounted anew is another directory. Only for a process with one
        thread. OSError names the call; this process is then not confined and must end.
        """
        slot_fd = os.open(slot_path, _OPEN_SLOT)
        try:
            own = _pack_rule(slot_fd, self._rights.scratch)
            _restrict(self._handled, [*self._rules, own], self._rights.flags)
        finally:
            os.close(slot_fd)
            self.close()

    @property
    def descriptors(self) -> list[int]:
        """What is held until a worker enters."""
        return self._descriptors

    def close(self) -> None:
        """Give up the descriptors; safe to call twice."""
        held, self._descriptors = self._descriptors, []
        if held and self._is_one_range:
            os.closerange(held[0], held[-1] + 1)  # one system call, and no error
        else:
            _close(held)


def verify_base(abi: int) -> list[str]:
    """What of the base layer does not hold in this process, found by trying; empty if all does."""
    return _allowed(
        (
            ("the root cannot be listed", lambda: os.listdir("/")),
            ("no TCP port can be bound", _bind_tcp if abi >= 4 else None),
            ("no other process can be signalled", _signal_parent if abi >= 6 else None),
        )
    )


def verify_worker(slot_path: str, other_slot_path: str, readable: str, abi: int) -> list[str]:
    """What of a worker's confinement does not hold, found by trying; empty if all does.

    To be run by a process that entered both layers and whose parent did not enter the worker's.
    Both slots and the directory `readable`, which is part of the tree, exist.
    """
    other, own = (os.path.join(p, _PROBE_NAME) for p in (other_slot_path, slot_path))
    found = _allowed(
        (
            ("other slots cannot be listed", lambda: os.listdir(other_slot_path)),
            ("other slots cannot be written", lambda: _make_and_remove(other)),
            ("slots cannot be listed", lambda: os.listdir(os.path.dirname(slot_path))),
            (
                "nothing else can be written",
                lambda: _make_and_remove(os.path.join(readable, _PROBE_NAME)),
            ),
            ("no device node can be made", lambda: os.mknod(own, stat.S_IFCHR, os.makedev(1, 3))),
            ("no TCP port can be bound", _bind_tcp if abi >= 4 else None),
            ("no other process can be signalled", _signal_parent if abi >= 6 else None),
        )
    )
    for claim, action in (
        ("the own slot can be written", lambda: _make_and_remove(own)),
        ("the rest can be read", lambda: os.listdir(readable)),
    ):
        if _is_refused(action):
            found.append(claim)
    return found


def _allowed(claims: Iterable[tuple[str, Callable[[], object] | None]]) -> list[str]:
    """The claims whose attempt was not refused."""
    return [claim for claim, action in claims if action is not None and not _is_refused(action)]


def verify_layer(
    layer: WorkerLayer, slot_path: str, other_slot_path: str, readable: str, abi: int
) -> list[str]:
    """`verify_worker` in a child of its own that is gone afterwards; for the zygote at the barrier.

    OSError if the child could not be made; a child that fails is reported as a claim that does not
    hold. To be called before a seccomp filter that forbids fork(2).
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            layer.enter(slot_path)
            found = verify_worker(slot_path, other_slot_path, readable, abi)
        except BaseException as error:  # the child's outer door
            found = [f"the layer can be entered: {type(error).__name__}: {error}"]
        os.write(writer, "\n".join([*found, "done"]).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        told = file.read().split("\n")
    os.waitpid(pid, 0)
    return told[:-1] if told[-1] == "done" else ["the layer can be entered: the child died"]


def _is_refused(action: Callable[[], object]) -> bool:
    try:
        action()
    except OSError as error:
        # A file system that is read-only refuses before Landlock is asked.
        return error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return False


def _make_and_remove(path: str) -> None:
    os.mkdir(path, 0o700)
    os.rmdir(path)


def _bind_tcp() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))


def _signal_parent() -> None:
    os.kill(os.getppid(), 0)


def _shared_rules(tree: Tree, rights: Rights) -> list[tuple[str, int]]:
    return [
        *((path, rights.code) for path in tree.code),
        *((path, rights.data) for path in tree.data),
        *((path, rights.device) for path in tree.devices),
    ]


def _open_rules(rules: Iterable[tuple[str, int]], descriptors: list[int]) -> list[bytes]:
    """The packed rules; what was opened for them is in `descriptors`, also after OSError."""
    packed = []
    for path, access in rules:
        low = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(low).st_mode):
                access &= _OF_FILES
            fd = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_DESCRIPTOR)
        finally:
            os.close(low)
        descriptors.append(fd)
        packed.append(_pack_rule(fd, access))
    return packed


def _close(descriptors: Iterable[int]) -> None:
    for fd in descriptors:
        try:
            os.close(fd)
        except OSError:  # foreign code may have closed "all" of them
            continue


def _are_consecutive(descriptors: list[int]) -> bool:
    return descriptors == list(range(descriptors[0], descriptors[0] + len(descriptors)))


def _pack_handled(rights: Rights) -> bytes:
    """`struct landlock_ruleset_attr`."""
    return struct.pack("=QQQ", rights.handled_fs, rights.handled_net, rights.scoped)


def _pack_rule(fd: int, access: int) -> bytes:
    """`struct landlock_path_beneath_attr`."""
    return struct.pack("=Qi", access, fd)


def _restrict(handled: bytes, rules: Iterable[bytes], flags: int) -> None:
    ruleset = syscalls.landlock_create_ruleset(handled)
    try:
        syscalls.landlock_add_rules(ruleset, rules)
        syscalls.landlock_restrict_self(ruleset, flags)
    finally:
        os.close(ruleset)
