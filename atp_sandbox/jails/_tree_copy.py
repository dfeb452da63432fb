"""One tree, copied race-safely from what a toolkit's author may have arranged.

Runs in the supervisor. The author may change the files while they are read. So every one is opened
below a directory descriptor, without following a link, and looked at again after it is open; and
what is hashed is what was copied, in one reading.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from atp_sandbox import limits
from atp_sandbox.errors import ToolkitError
from atp_sandbox.log import printable

MAX_ENTRIES = 20_000
"""Files and folders looked at; the largest published toolkits have a few hundred."""
MAX_DEPTH = 64
"""Folders within folders; each holds a descriptor while it is read."""

_CHUNK_BYTES = 1 << 20
_MTIME = (315_532_800, 315_532_800)
"""1980-01-01, the earliest that zip files can say: no time tells when a snapshot was taken."""
_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC

_KINDS = {
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_TOO_MUCH_TIP = "keep environments and data sets outside of the toolkit's folder"


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a tree: a folder if `content` is empty, else a file with that sha256."""

    content: bytes = b""
    size: int = 0
    executable: bool = False


def digest(rows: dict[str, Row]) -> str:
    """sha256, in hex, over kind, path and content of every entry; no two trees can look alike."""
    total = hashlib.sha256()
    for path, row in sorted((os.fsencode(path), row) for path, row in rows.items()):
        kind = b"x" if row.executable else b"f" if row.content else b"d"
        total.update(b"%b%d:%b%b" % (kind, len(path), path, row.content))
    return total.hexdigest()


class TreeCopy:
    """A tree that is being filled; `rows` says all that is in it, by relative path."""

    def __init__(self, tree: Path) -> None:
        """`tree` is an empty folder that nobody else writes; its owner removes it."""
        self.tree = tree
        self.rows: dict[str, Row] = {}
        self.skipped: list[str] = []
        self._size = 0
        self._entries = 0

    def files(self) -> set[str]:
        """The relative paths of all files so far."""
        return {path for path, row in self.rows.items() if row.content}

    def add_file(self, source: Path, relative: str) -> None:
        """Copy the one file `source`, which was named by the operator."""
        self.count()
        with reading(relative):
            fd = os.open(source, _OPEN)
        with _closing(fd):
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ToolkitError(f"{printable(relative)} is not an ordinary file any more")
            self.write(fd, relative)

    def add_tree(self, source: Path, relative: str) -> None:
        """Copy what `source` holds to the folder `relative`, or to the root if that is empty."""
        with reading(relative or source.name):
            fd = os.open(source, _OPEN | os.O_DIRECTORY)
        with _closing(fd):
            if relative:
                self.make_folder(relative)
            _Walk(self, source, fd, relative).visit(fd, "", [os.fstat(fd)])

    def finish(self) -> None:
        """Give every folder its final time; folders last changed when something was put in."""
        for path, row in self.rows.items():
            if not row.content:
                os.utime(self.tree / path, _MTIME)
        os.chmod(self.tree, 0o755)
        os.utime(self.tree, _MTIME)

    def count(self) -> None:
        """One more entry was looked at, whether it is taken or not."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise ToolkitError(
                f"the toolkit has more than {MAX_ENTRIES:,} files and folders",
                tip=_TOO_MUCH_TIP,
            )

    def make_folder(self, relative: str) -> None:
        """An empty folder in the tree."""
        (self.tree / relative).mkdir()
        os.chmod(self.tree / relative, 0o755)
        self.rows[relative] = Row()

    def write(self, source: int, relative: str) -> None:
        """Copy an open, regular file, hashing it on the way and watching the size of the whole."""
        executable = bool(os.fstat(source).st_mode & 0o111)
        self._refuse_size(os.fstat(source).st_size)
        content, size = hashlib.sha256(), 0
        target = os.open(
            self.tree / relative, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        with _closing(target):
            while True:
                with reading(relative):
                    chunk = os.read(source, _CHUNK_BYTES)
                if not chunk:
                    break
                size += len(chunk)
                self._refuse_size(size)
                content.update(chunk)
                rest = memoryview(chunk)
                while rest:
                    rest = rest[os.write(target, rest) :]
            os.fchmod(target, 0o755 if executable else 0o644)
            os.utime(target, _MTIME)
        self._size += size
        self.rows[relative] = Row(content.digest(), size, executable)

    def _refuse_size(self, more: int) -> None:
        if self._size + more > limits.MAX_SNAPSHOT_BYTES:
            raise ToolkitError(
                f"the toolkit is larger than {limits.format_size(limits.MAX_SNAPSHOT_BYTES)}",
                cause="its own files and its data count together",
                tip=_TOO_MUCH_TIP,
            )


class _Walk:
    """One folder being read. Every name is opened below `root`, a descriptor of that folder."""

    def __init__(self, copy: TreeCopy, source: Path, root: int, relative: str) -> None:
        self._copy = copy
        self._source = source
        self._root = root
        self._relative = relative

    def visit(self, folder: int, within: str, above: list[os.stat_result]) -> None:
        """Copy the content of the open `folder`, which is `within` of the source ("" for itself).

        `above` holds every folder on the way here, the present one included.
        """
        shown = within or self._source.name
        if len(above) > MAX_DEPTH:
            raise ToolkitError(
                f"{printable(shown)} lies more than {MAX_DEPTH} folders deep",
                tip=_TOO_MUCH_TIP,
            )
        with reading(shown):
            names = sorted(os.listdir(folder))
        for name in names:
            self._copy.count()
            if name.startswith("."):
                self._skip(within, name, "hidden")
            elif name == "__pycache__":
                self._skip(within, name, "compiled files")
            else:
                self._take(folder, within, name, above)

    def _take(self, folder: int, within: str, name: str, above: list[os.stat_result]) -> None:
        path = _join(within, name)
        with reading(path):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                fd = self._open_target(within, name)
                if fd is None:
                    return
            elif kind := _KINDS.get(stat.S_IFMT(status.st_mode)):
                # Not even opened: opening a device can have effects.
                self._skip(within, name, kind)
                return
            else:
                fd = os.open(name, _OPEN, dir_fd=folder)
        with _closing(fd):
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode):
                self._copy.write(fd, _join(self._relative, path))
            elif not stat.S_ISDIR(status.st_mode):
                self._skip(within, name, _KINDS.get(stat.S_IFMT(status.st_mode), "no file"))
            elif any(os.path.samestat(status, other) for other in above):
                self._skip(within, name, "a link to a folder that it lies in")
            else:
                self._copy.make_folder(_join(self._relative, path))
                self.visit(fd, path, [*above, status])

    def _open_target(self, within: str, name: str) -> int | None:
        """What the link leads to, opened, if that lies inside the source; else None, reported.

        The answer of realpath(3) is only a proposal: it is walked down from `root` without
        following anything, so a link that changes meanwhile leads nowhere, never outside.
        """
        try:
            target = Path(os.path.realpath(self._source / within / name, strict=True))
            below = target.relative_to(self._source)
        except OSError:
            self._skip(within, name, "a link to nothing")
            return None
        except ValueError:
            self._skip(within, name, "a link out of the folder")
            return None
        fd = os.dup(self._root)
        try:
            for part in below.parts:
                status = os.stat(part, dir_fd=fd, follow_symlinks=False)
                if kind := _KINDS.get(stat.S_IFMT(status.st_mode)):
                    self._skip(within, name, f"a link to {kind}")
                    os.close(fd)
                    return None
                inner = os.open(part, _OPEN, dir_fd=fd)
                os.close(fd)
                fd = inner
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _skip(self, within: str, name: str, why: str) -> None:
        path = _join(self._relative, _join(within, name))
        self._copy.skipped.append(f"{printable(path)}: {why}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """An operating system's refusal to read `what`, in our words."""
    try:
        yield
    except OSError as error:
        raise ToolkitError(
            f"cannot read {printable(what)}",
            cause=reason(error),
            tip="let the user that runs atp-sandbox read it, or take it out of the toolkit",
        ) from error


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def reason(error: OSError) -> str:
    """`EACCES: Permission denied`: the system's refusal without the path it was about."""
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    return f"{name}: {error.strerror}"
