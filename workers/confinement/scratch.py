"""Scratch: one small directory a call, made and removed by the warden alone.

A slot is empty when a worker gets it and gone, with everything in it, after that worker. The
supervisor never looks inside. Slot 0 is the import's.

With a mount namespace a slot is a tmpfs(5) of bounded size, and each forked worker gets a *view*: a
copy of the jail's mounts with nothing but its own slot in it, which it makes its root. So the files
of another call have no name for it, whatever Landlock does not cover (mode, times, statfs). Without
one, slots are plain directories, whose size is only looked at.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Union

from . import syscalls

IMPORT_SLOT = 0
_VIEWS = "/slots"
_IN_VIEW = "/scratch/1"
_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_OPEN = 128
"""Directories that wait at once for being measured; more count as too much."""
_MOST_PASSES = 1_000_000
"""Over a tree that is removed: as many as it has levels, if nobody adds any."""
_STEPS_AT_ONCE = 256
"""Of a removal, between two looks at what else there is to do; about a millisecond."""
_CLOSE_S = 5.0
"""For removing what is left at the end."""


class Places(NamedTuple):
    """Where slots are. Numbers are the supervisor's."""

    directory: str
    has_views: bool

    @classmethod
    def of(cls, plan: dict[str, Any]) -> Places:
        return cls(plan["scratch"]["directory"], plan["scratch"]["has_views"])

    def view(self, slot: int) -> str | None:
        """The root directory of the slot's worker; None if it keeps the jail's."""
        return f"{_VIEWS}/{slot}" if self.has_views and slot != IMPORT_SLOT else None

    def inside(self, slot: int) -> str:
        """The slot as its own worker names it."""
        return f"{self.directory}/{slot}" if self.view(slot) is None else _IN_VIEW

    def outside(self, slot: int) -> str:
        """The slot as warden and zygote name it."""
        return (self.view(slot) or "") + self.inside(slot)


class MountedSlots:
    """The slots of a jail with a mount namespace; owned by the warden."""

    def __init__(self, plan: dict[str, Any]) -> None:
        scratch = plan["scratch"]
        self._places = Places.of(plan)
        self._options = f"mode=0700,size={scratch['bytes']},nr_inodes={scratch['files']}"
        self._mounted: set[int] = set()
        self._views: set[int] = set()

    def prepare(self) -> None:
        """The import's slot, and room for views."""
        self.renew(IMPORT_SLOT)
        if self._places.has_views:
            syscalls.mount("views", _VIEWS, "tmpfs", _FLAGS, "mode=0711,size=64k")
            # A copy of the jail's mounts must not hold the copies that were made before it.
            syscalls.mount("none", _VIEWS, None, syscalls.MS_UNBINDABLE)

    def renew(self, slot: int) -> None:
        """Give `slot` a fresh, empty scratch directory; what was there is dropped."""
        self._make_view(slot)
        path = self._places.outside(slot)
        if slot in self._mounted:
            self._mounted.discard(slot)
            syscalls.unmount(path, syscalls.MNT_DETACH)
        syscalls.mount("scratch", path, "tmpfs", _FLAGS, self._options)
        self._mounted.add(slot)

    def is_full(self, slot: int) -> bool:
        """Whether no further page or no further file fits into the slot (statvfs(3))."""
        if slot not in self._mounted:
            return False
        usage = os.statvfs(self._places.outside(slot))
        return usage.f_bfree == 0 or usage.f_ffree == 0

    def tidy(self) -> bool:
        """There is never anything left to remove."""
        return False

    def close(self) -> None:
        """The mounts go with their namespace."""

    def _make_view(self, slot: int) -> None:
        view = self._places.view(slot)
        if view is None or slot in self._views:
            return
        os.mkdir(view, 0o755)
        syscalls.mount("/", view, None, syscalls.MS_BIND | syscalls.MS_REC)
        # What the import left behind can be read by every call, and changed by none.
        left = view + self._places.outside(IMPORT_SLOT)
        syscalls.mount_set_attributes(left, syscalls.MOUNT_ATTR_RDONLY, recursive=False)
        self._views.add(slot)


class PlainSlots:
    """The slots of a toolkit without namespaces: directories in one that the builder made.

    Whoever writes in them may still be alive and has our user id, so nothing is reached by a path:
    each directory is opened without following links, and worked on through its descriptor. Nothing
    that a tool makes of its slot is an error of ours.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        scratch = plan["scratch"]
        self._places = Places.of(plan)
        self._bytes, self._files = scratch["bytes"], scratch["files"]
        self._made: set[int] = set()
        self._removals: list[Iterator[None]] = []

    def prepare(self) -> None:
        """The import's slot."""
        self.renew(IMPORT_SLOT)

    def renew(self, slot: int) -> None:
        """Give `slot` a fresh, empty directory; what was there is moved aside, to be removed."""
        path = self._places.outside(slot)
        if slot in self._made:
            self._discard(slot)
        os.mkdir(path, 0o700)
        self._made.add(slot)

    def is_full(self, slot: int) -> bool:
        """Whether it holds more than it may; also if it cannot be looked through."""
        if slot not in self._made:
            return False
        try:
            return self._is_over(self._places.outside(slot))
        except OSError:  # whose is it, if not a tool's that has something to hide?
            return True

    def tidy(self) -> bool:
        """Remove a bit of what was moved aside; whether there is more."""
        if self._removals:
            for _ in range(_STEPS_AT_ONCE):
                try:
                    next(self._removals[-1])
                except (StopIteration, OSError):  # done, or somebody is at work in it: left
                    self._removals.pop()
                    break
        return bool(self._removals)

    def close(self) -> None:
        """Remove every slot, now that nobody writes there any more; what takes too long is left."""
        for slot in self._made:
            self._discard(slot)
        self._made.clear()
        deadline = time.monotonic() + _CLOSE_S
        while self.tidy() and time.monotonic() < deadline:
            pass

    def _discard(self, slot: int) -> None:
        aside = os.urandom(16).hex()
        try:
            os.rename(self._places.outside(slot), f"{self._places.directory}/{aside}")
        except FileNotFoundError:
            return
        self._removals.append(_remove_tree(self._places.directory, aside))

    def _is_over(self, path: str) -> bool:
        size, files = 0, 0
        waiting = [_open_own(path)]
        try:
            while waiting:
                fd = waiting.pop()
                try:
                    for name in os.listdir(fd):
                        status = _status(name, fd)
                        if status is None:
                            continue
                        files += 1
                        size += status.st_blocks * 512
                        is_directory = stat.S_ISDIR(status.st_mode)
                        too_many = is_directory and len(waiting) >= _MOST_OPEN
                        if files >= self._files or size >= self._bytes or too_many:
                            return True
                        if is_directory:
                            waiting.append(_open_own(name, fd))
                finally:
                    os.close(fd)
        finally:
            for fd in waiting:
                os.close(fd)
        return False


Slots = Union[MountedSlots, PlainSlots]


def _status(name: str, directory_fd: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    except OSError:
        return None


def _remove_tree(parent: str, name: str) -> Iterator[None]:
    """Remove a directory of any depth, a bit with each `next`; OSError if somebody is in the way.

    Each level is moved up to the top before it is emptied.
    """
    parent_fd = os.open(parent, _OPEN_DIRECTORY)
    try:
        top = _open_to_empty(name, parent_fd)
        try:
            for _ in range(_MOST_PASSES):
                names = os.listdir(top)
                if not names:
                    break
                for entry in names:
                    if not _unlink(entry, top):
                        yield from _move_children(entry, top)
                    yield
        finally:
            os.close(top)
        os.rmdir(name, dir_fd=parent_fd)
    finally:
        os.close(parent_fd)


def _move_children(name: str, top: int) -> Iterator[None]:
    """Remove the directory `name` of `top`; its own directories go to `top` under new names."""
    fd = _open_to_empty(name, top)
    try:
        for child in os.listdir(fd):
            if not _unlink(child, fd):
                os.close(_open_to_empty(child, fd))
                os.rename(child, os.urandom(16).hex(), src_dir_fd=fd, dst_dir_fd=top)
            yield
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=top)


def _unlink(name: str, directory_fd: int) -> bool:
    """Whether `name` is gone; False if it is a directory."""
    try:
        os.unlink(name, dir_fd=directory_fd)
    except IsADirectoryError:
        return False
    except FileNotFoundError:
        pass
    return True


def _open_own(name: str, directory_fd: int | None = None) -> int:
    """Open a directory of ours, also one whose mode is closed to its own owner."""
    try:
        return os.open(name, _OPEN_DIRECTORY, dir_fd=directory_fd)
    except PermissionError:
        path_fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory_fd)
        try:
            os.chmod(f"/proc/self/fd/{path_fd}", 0o700)
        finally:
            os.close(path_fd)
        return os.open(name, _OPEN_DIRECTORY, dir_fd=directory_fd)


def _open_to_empty(name: str, directory_fd: int) -> int:
    """As above, and make it one that can be emptied and moved."""
    fd = _open_own(name, directory_fd)
    if os.fstat(fd).st_mode & 0o700 != 0o700:
        os.fchmod(fd, 0o700)
    return fd
