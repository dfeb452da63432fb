"""Content-hashed, read-only copies of toolkits: what a jail sees of one, and all it sees.

Runs in the supervisor. Owns the store: which toolkits may enter it, under which name they stand
there, and when they leave. How a tree is read is `_tree_copy`'s.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from atp_sandbox.errors import SandboxError, ToolkitError
from atp_sandbox.jails._tree_copy import Row, TreeCopy, digest, reading, reason
from atp_sandbox.log import printable

ENTRY_NAMES = ("__main__.py", "toolkit.py", "main.py")
"""What a folder may start with, in order of preference."""
STALE_DRAFT_S = 3_600.0
"""Age from which a draft is a leftover: copying the permitted size takes seconds."""

_DRAFT_PREFIX = "draft-"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

_NEVER_WHOLE = tuple(
    Path(p) for p in ("/boot", "/dev", "/etc", "/home", "/root", "/run", "/tmp", "/usr", "/var")
)
"""Never a toolkit or data as a whole, nor is what contains them; what lies in them may be."""
_NEVER_AT_ALL = (Path("/proc"), Path("/sys"))
"""Views of the kernel, not files."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One toolkit as it was at one moment; below `directory` nothing ever changes.

    On `sys.path` goes the directory itself. A package lies in it as `<package>/`, and its entry
    runs as the module `<package>.<entry's stem>`, so that relative imports work; `<package>/` may
    follow on `sys.path` for toolkits that also import their neighbours by bare name. Any other
    folder's content, or the one file, lies in the directory itself. Data lies there too, each
    under its own name: beside the file, or beside the package.
    """

    digest: str
    """sha256, in hex, over each relative path with its executable bit and content."""
    directory: Path
    """`<store>/<digest>`, absolute."""
    entry: str
    """The file to run, relative to `directory`."""
    is_package: bool
    package: str = ""
    """The package's name; empty if it is none."""
    skipped: tuple[str, ...] = ()
    """What was left out, a line each, with the reason."""


def take_snapshot(settings_path: Path, data: Sequence[Path], store: Path) -> Snapshot:
    """Copy the toolkit at `settings_path`, with `data`, to `store`; an equal one there is reused.

    `store` is made (0700) if it is missing; it must be writable by us alone. Several processes may
    take snapshots in one store. Left out and reported in `skipped`: names with a leading dot,
    `__pycache__`, sockets, FIFOs, devices, and links out of the folder that is copied. Links inside
    it become copies of what they lead to, hidden or not (mounted Kubernetes volumes are made so).

    ToolkitError: no such toolkit, no entry file, a folder that is too large or too much of the
    machine, two things of one name, something that cannot be read. SandboxError: `store` cannot be
    written. In both cases nothing is added to it.
    """
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = store.resolve(strict=True)
        with tempfile.TemporaryDirectory(prefix=_DRAFT_PREFIX, dir=store) as draft:
            tree = Path(draft, "tree")
            tree.mkdir()
            copy = TreeCopy(tree)
            entry, package = _copy_toolkit(copy, settings_path, store)
            for path in data:
                _copy_data(copy, path, store)
            copy.finish()
            name = digest(copy.rows)
            directory = _publish(tree, store / name, copy.rows)
    except OSError as error:
        # What is wrong with a source has become a ToolkitError where it was read.
        raise SandboxError(
            f"cannot store a snapshot in {store}",
            cause=reason(error),
            tip="free some space, or name another state directory",
        ) from error
    return Snapshot(name, directory, entry, bool(package), package, tuple(sorted(copy.skipped)))


def prune(store: Path, keep: set[str]) -> None:
    """Remove every snapshot whose digest is not in `keep`, and drafts older than an hour.

    Spared as well: snapshots that some process holds, see `SnapshotHold`. Safe to call while
    others take snapshots; a snapshot vanishes as a whole. What cannot be removed is left.
    """
    with suppress(FileNotFoundError):
        for name in os.listdir(store):
            with suppress(OSError):
                if _DIGEST.fullmatch(name) and name not in keep:
                    _remove_unheld(store, name)
                elif name.startswith(_DRAFT_PREFIX):
                    age_s = time.time() - os.lstat(store / name).st_mtime
                    if age_s > STALE_DRAFT_S:
                        shutil.rmtree(store / name)


class SnapshotHold:
    """Keeps one snapshot from being pruned, by any process, until `close`.

    Owns one descriptor with a shared flock(2) on the snapshot's directory; the kernel drops it if
    we die. SandboxError if the snapshot is gone already: take it again.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._fd: int | None = None
        try:
            fd = os.open(snapshot.directory, _OPEN_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                # Whoever prunes moves a directory away under its exclusive lock: look again.
                if not os.path.samestat(os.fstat(fd), os.lstat(snapshot.directory)):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise SandboxError(
                f"the snapshot {snapshot.digest[:12]} cannot be used any more",
                cause=reason(error),
                tip="try again: another atp-sandbox was clearing the same state directory",
            ) from error
        self._fd = fd

    def close(self) -> None:
        """Let the snapshot be pruned; safe to call again."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _copy_toolkit(copy: TreeCopy, path: Path, store: Path) -> tuple[str, str]:
    """Copy the toolkit; its entry file, relative to the snapshot, and its package's name or ""."""
    source = _resolve(path, "toolkit")
    name = _name(path)
    if not source.is_dir():
        if not source.is_file() or not name.endswith(".py"):
            raise ToolkitError(
                f"{_show(path)} is not a Python file",
                tip="name a file that ends in .py, or the toolkit's folder",
            )
        copy.add_file(source, name)
        return name, ""
    _refuse_too_much(source, path, store)
    with reading(str(path)):
        found = set(os.listdir(source))
    if not found.intersection(ENTRY_NAMES):
        raise ToolkitError(
            f"{_show(path)} has no file to start with",
            cause=f"none of {', '.join(ENTRY_NAMES)} is there",
            tip="name the file itself, or call it toolkit.py",
        )
    package = name if "__init__.py" in found else ""
    if package and not package.isidentifier():
        raise ToolkitError(
            f"{_show(path)} cannot be imported as a package",
            cause="it has an __init__.py, but its name is no Python name",
            tip="rename the folder, for example my_toolkit, or remove its __init__.py",
        )
    copy.add_tree(source, package)
    inside = f"{package}/" if package else ""
    entry = next((inside + n for n in ENTRY_NAMES if inside + n in copy.files()), "")
    if not entry:
        raise ToolkitError(
            f"{_show(path)} has no file to start with",
            cause="; ".join(
                line
                for line in copy.skipped
                if line.startswith(tuple(inside + n for n in ENTRY_NAMES))
            ),
            tip="make it an ordinary file",
        )
    return entry, package


def _copy_data(copy: TreeCopy, path: Path, store: Path) -> None:
    source, name = _resolve(path, "data"), _name(path)
    if name in copy.rows:
        raise ToolkitError(
            f"two things are named {printable(name)!r} in one snapshot",
            cause=f"the data {_show(path)} would replace the other",
            tip="rename one of them; data lies beside the toolkit under its own name",
        )
    if source.is_dir():
        _refuse_too_much(source, path, store)
        copy.add_tree(source, name)
    elif source.is_file():
        copy.add_file(source, name)
    else:
        raise ToolkitError(
            f"the data {_show(path)} is neither a file nor a folder", tip="leave it out"
        )


def _resolve(path: Path, what: str) -> Path:
    try:
        source = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise ToolkitError(
            f"the {what} {_show(path)} cannot be found",
            cause=reason(error) if isinstance(error, OSError) else "",
            tip="check the spelling; in a configuration, paths are relative to its own folder",
        ) from error
    if any(source.is_relative_to(never) for never in _NEVER_AT_ALL):
        raise ToolkitError(
            f"the {what} {_show(path)} is no file of its own", tip="copy what is needed of it"
        )
    return source


def _name(path: Path) -> str:
    """The name that the operator calls it by, whatever it is a link to."""
    return os.path.basename(os.path.abspath(path))


def _refuse_too_much(source: Path, path: Path, store: Path) -> None:
    """Refuse folders that hold more than a toolkit: system and home directories, the store."""
    never = [p.resolve() for p in _NEVER_WHOLE]
    with suppress(OSError, RuntimeError):
        never.append(Path.home().resolve())
    if source.parent in (Path("/home"), Path("/home").resolve()):
        never.append(source)  # somebody's, though not ours: HOME may be root's, under sudo
    for precious in (*never, store):
        if precious.is_relative_to(source):
            raise ToolkitError(
                f"{_show(path)} is more than a toolkit",
                cause=f"it would show the jail all of {_show(precious)}",
                tip="put the toolkit in a folder of its own",
            )
    if source.is_relative_to(store):
        raise ToolkitError(
            f"{_show(path)} lies among the snapshots",
            tip="name the folder that the snapshot was taken of",
        )


def _publish(tree: Path, directory: Path, rows: dict[str, Row]) -> Path:
    """Put a finished tree where it belongs, at once and as a whole; an intact one there stays."""
    if directory.exists() and not _is_intact(directory, rows):
        # A power cut can leave files empty that a rename made visible before they were on disk.
        with suppress(FileNotFoundError):
            os.rename(directory, tree.with_name("damaged"))
    try:
        os.rename(tree, directory)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    return directory


def _is_intact(directory: Path, rows: dict[str, Row]) -> bool:
    """Whether every entry is there with its kind, size and mode; the content is not read again."""
    try:
        return all(_is_as_written(os.lstat(directory / path), row) for path, row in rows.items())
    except OSError:
        return False


def _is_as_written(status: os.stat_result, row: Row) -> bool:
    if not row.content:
        return stat.S_ISDIR(status.st_mode)
    expected = stat.S_IFREG | (0o755 if row.executable else 0o644)
    return status.st_mode == expected and status.st_size == row.size


def _remove_unheld(store: Path, name: str) -> None:
    fd = os.open(store / name, _OPEN_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Moved away first: nobody finds half a snapshot under its digest.
        with tempfile.TemporaryDirectory(prefix=_DRAFT_PREFIX, dir=store) as draft:
            os.rename(store / name, Path(draft, name))
    finally:
        os.close(fd)


def _show(path: Path) -> str:
    return printable(str(path))
