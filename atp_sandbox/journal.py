"""The journal of one link: what a successor must know of calls that were accepted before it came.

accepted → started → answered → confirmed, in SQLite, written before anything is done about it: a
worker gets its call, and the backend its answer, only after the commit. It outlives the process,
not the machine: nothing is synced to the disk. Neither parameters nor tokens are ever in it, and an
answer only until the backend has read past it.

Owned by one link, whose lock keeps other processes away. All in the loop's thread: a commit is a
write into the page cache.

What a turn of the loop changed is appended as one row, which is cheaper than a row for each call
and leaves older pages alone. Now and then the rows are merged into a table of calls: those of them
that are confirmed by then, as most are, so that each is written there once, without its answer.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgpack

from atp_sandbox import log
from atp_sandbox.atp.record import Record, Stage
from atp_sandbox.atp.session import Session
from atp_sandbox.errors import SandboxError
from atp_sandbox.outcome import Failure, Kind
from atp_sandbox.settings import JournalMode
from atp_sandbox.state import JOURNALS, is_link_served

RETRY_S = 5.0
"""Between two attempts to write a journal that could not be written."""
TIDY_S = 60.0
"""Between two moves of the log of changes into the file, which empties it."""
MAX_UNUSED_S = 7 * 86_400.0
"""A journal that no link has used for so long is removed: its key was replaced, or its backend."""
MERGE_BYTES = 256 * 1024
"""Of turns: what some hundreds of calls leave. It takes 2 ms to merge them."""
_VERSION = 2
_MAX_KEY = 1 << 62
"""Half of what SQLite can take: keys go on from the largest that was found."""
_SUFFIX = ".journal"
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_CALLS = """
    CREATE TABLE calls (
        key INTEGER PRIMARY KEY,
        identity BLOB NOT NULL,
        request_id TEXT NOT NULL,
        tool TEXT NOT NULL,
        stage INTEGER NOT NULL,
        since REAL NOT NULL,
        answer TEXT
    )
"""
_TURNS = """
    CREATE TABLE turns (
        number INTEGER PRIMARY KEY,
        changes BLOB NOT NULL  -- msgpack: [rows of calls, keys of calls that are forgotten]
    )
"""
_Row = tuple[int, bytes, str, str, int, float, str | None]
_pack = msgpack.Packer().pack
UNAVAILABLE = Failure(
    Kind.UNAVAILABLE,
    "This server's journal cannot be written, and it is set to take no calls without.",
    retry_after_s=RETRY_S,
)


class JournalError(SandboxError):
    """The journal cannot be read or written."""

    is_damaged = False
    """Whether what is in the file is no journal (any more)."""


class JournalFile:
    """The file. Every method may raise JournalError; after that, only `close` is of use."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # Made here and not by SQLite, whose files have the mode of this one.
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            self._made = os.fstat(fd)
            os.close(fd)
        except OSError as error:
            raise self._error(str(error.strerror)) from None
        self._rows: dict[int, _Row] = {}
        """What turns say of calls, by key; the table of calls may say otherwise, or nothing."""
        self._forgotten: set[int] = set()
        self._turn_bytes = 0
        """Of all turns since the last merge."""
        self._open_bytes = 0
        """Of those among them that the last merge left."""
        with self._faults():
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None)
        try:
            self._prepare()
        except BaseException:
            self._database.close()
            raise

    def _prepare(self) -> None:
        with self._faults():
            run = self._database.execute
            # One process alone has it open: no shared memory, and nobody can lock us out later.
            run("PRAGMA locking_mode = EXCLUSIVE")
            run("PRAGMA journal_mode = WAL")
            run("PRAGMA synchronous = OFF")
            run("PRAGMA secure_delete = ON")
            run("PRAGMA journal_size_limit = 4194304")
            (version,) = run("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise self._error(f"it was written by another version ({version})")
            (boot,) = run("PRAGMA application_id").fetchone()
            if version == _VERSION:
                for (changes,) in run("SELECT changes FROM turns ORDER BY number"):
                    self._note(*_unpack(changes), len(changes))
                if boot == _boot():
                    return
            run("BEGIN IMMEDIATE")
            if version != _VERSION:
                run(_CALLS)
                run(_TURNS)
                run(f"PRAGMA user_version = {_VERSION}")
            self._merge(everything=True)
            # Its times are of a clock that has begun anew since: nothing is old now.
            run("UPDATE calls SET since = ?", (time.monotonic(),))
            run(f"PRAGMA application_id = {_boot()}")
            run("COMMIT")

    def load(self) -> list[Record]:
        """What was known at the last commit, in order of arrival."""
        with self._faults():
            rows = {row[0]: row for row in self._database.execute("SELECT * FROM calls")}
            rows.update(self._rows)
            return [_record(rows[key]) for key in sorted(rows) if key not in self._forgotten]

    def write(
        self, changed: Iterable[Record], forgotten: Iterable[int], *, anew: bool = False
    ) -> None:
        """All of it or nothing; `anew`: in place of what is there."""
        rows, keys = [_row(record) for record in changed], list(forgotten)
        changes: bytes = _pack((rows, keys))
        with self._faults():
            if anew:
                self._rows.clear()
                self._forgotten.clear()
            self._note(rows, keys, len(changes))
            if anew or self._turn_bytes > MERGE_BYTES + 2 * self._open_bytes:
                self._merge_alone(everything=anew, in_place=not anew)
            else:
                self._database.execute("INSERT INTO turns (changes) VALUES (?)", (changes,))

    def _note(self, rows: Iterable[_Row], forgotten: Iterable[int], size_bytes: int) -> None:
        for row in rows:
            self._rows[row[0]] = row
        self._forgotten.update(forgotten)
        self._turn_bytes += size_bytes

    def _merge_alone(self, *, everything: bool, in_place: bool = True) -> None:
        """All of it or nothing."""
        self._database.execute("BEGIN")
        try:
            if not in_place:
                self._database.execute("DELETE FROM calls")
            self._merge(everything=everything)
            self._database.execute("COMMIT")
        except sqlite3.Error:
            # A full disk has rolled back already; whatever else failed did not.
            with contextlib.suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise

    def _merge(self, *, everything: bool) -> None:
        """Move turns into the table of calls; but for `everything`, what is open stays a turn."""
        left = [
            row
            for row in self._rows.values()
            if row[4] != Stage.CONFIRMED and row[0] not in self._forgotten and not everything
        ]
        open_keys = {row[0] for row in left}
        self._database.executemany(
            "INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)",
            [row for key, row in self._rows.items() if key not in open_keys],
        )
        self._database.executemany(
            "DELETE FROM calls WHERE key = ?", [(key,) for key in self._forgotten]
        )
        self._database.execute("DELETE FROM turns")
        self._rows.clear()
        self._forgotten.clear()
        self._turn_bytes = self._open_bytes = 0
        if left:
            changes = _pack((left, []))
            self._database.execute("INSERT INTO turns (changes) VALUES (?)", (changes,))
            self._note(left, (), len(changes))
            self._open_bytes = len(changes)

    def check_place(self) -> None:
        """JournalError if a successor would not find it: SQLite writes on without an error."""
        try:
            is_there = os.path.samestat(self._made, os.lstat(self._path))
        except OSError:
            is_there = False
        if not is_there:
            raise self._error("it was removed, or another file put in its place")

    def tidy(self) -> None:
        """Move the log of changes into the file and empty it: answers that were deleted go too."""
        with self._faults():
            self._merge_alone(everything=True)
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._database.close()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, ValueError) as error:  # ValueError: see `_record` and `_unpack`
            fault = self._error(str(error))
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            fault.is_damaged = code in _DAMAGED or isinstance(error, ValueError)
            raise fault from None

    def _error(self, cause: str) -> JournalError:
        return JournalError(
            f"The journal {self._path} cannot be used.",
            cause=cause,
            tip="Mend what is wrong there, move the file away, or do without: --journal off.",
        )


def _boot() -> int:
    """Which boot of which machine this is, in 31 bits."""
    try:
        return zlib.crc32(Path("/proc/sys/kernel/random/boot_id").read_bytes()) & 0x7FFFFFFF
    except OSError:
        return 0


def _unpack(changes: bytes) -> tuple[list[_Row], list[int]]:
    """ValueError if it is none that we wrote."""
    try:
        rows, forgotten = msgpack.unpackb(changes, use_list=False)
        for row in rows:
            _record(row)
        if not all(type(key) is int and 0 <= key <= _MAX_KEY for key in forgotten):
            raise ValueError("keys that none of us wrote")
        return list(rows), list(forgotten)
    except Exception as error:  # msgpack raises a dozen classes, and so does what is no such pair
        raise ValueError("a turn that none of us wrote") from error


def _record(row: tuple[Any, ...]) -> Record:
    """ValueError if it is none that `_row` makes: SQLite itself knows no types, and no sums."""
    key, identity, request_id, tool, stage, since, answer = row
    types = tuple(type(value) for value in (*row[:6], "" if answer is None else answer))
    if types != (int, bytes, str, str, int, float, str) or key > _MAX_KEY:
        raise ValueError("a row that none of us wrote")
    return Record(key, identity, request_id, tool, Stage(stage), since, answer)


def _row(record: Record) -> _Row:
    answer = record.text if record.stage is Stage.ANSWERED else None
    tool = record.tool
    if not tool.isascii():
        tool = tool.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no text
    return (
        record.key,
        record.identity,
        record.request_id_json,
        tool,
        int(record.stage),
        record.since,
        answer,
    )


class Journal:
    """What a link writes down, and what happens when that cannot be done."""

    def __init__(self, path: Path | None, mode: JournalMode) -> None:
        """JournalError if it is required and cannot be used; without a path there is none."""
        self._path = path
        self._mode = JournalMode.OFF if path is None else mode
        self._file: JournalFile | None = None
        self._is_behind = False
        """Whether what is in the file is older than what is known."""
        self._is_foreign = False
        """Whether the file holds what nobody could read: it is left alone."""
        self._retry_at = 0.0
        self._tidy_at = 0.0
        self._is_tidy = True

    @property
    def refusal(self) -> Failure | None:
        """What a new call is answered while the journal is required and cannot be written."""
        is_missing = self._file is None or self._is_behind
        return UNAVAILABLE if self._mode is JournalMode.REQUIRED and is_missing else None

    def open(self) -> list[Record]:
        """What a predecessor left, in order of arrival."""
        if self._mode is JournalMode.OFF or self._path is None:
            return []
        try:
            self._file = JournalFile(self._path)
            return self._file.load()
        except JournalError as error:
            self._drop_file()
            if self._mode is JournalMode.REQUIRED:
                raise
            if error.is_damaged:
                self._set_aside(error)
                self._is_behind = True  # a new one is written with the first change
            elif not self._holds_anything():
                self._report(error, "serving on; what is due would be lost with this process")
                self._is_behind = True
            else:
                self._is_foreign = True
                self._report(error, "serving without a journal until the next start")
            return []

    def commit(self, session: Session, now: float, *, everything: bool = False) -> bool:
        """Write what changed; False if calls must not start since it cannot be written.

        Confirmations alone wait for something else, but for `everything`.
        """
        if not everything and not session.has_changes and not self._is_behind:
            return True
        changed, forgotten = session.take_changes()
        if self._mode is JournalMode.OFF or self._is_foreign:
            return True
        if not self._is_behind and not changed and not forgotten:
            return True
        if self._is_behind and now < self._retry_at:
            return self._mode is not JournalMode.REQUIRED
        assert self._path is not None
        try:
            if self._file is None:
                self._file = JournalFile(self._path)
            if self._is_behind:
                self._file.write(session.records(), (), anew=True)
                self._is_behind = False
                log.emit(log.INFO, "journal_restored", "the journal is written again")
            else:
                self._file.write(changed, forgotten)
        except JournalError as error:
            self._drop_file()
            if error.is_damaged:
                self._set_aside(error)
            elif not self._is_behind:
                self._report(error, "serving on; what is due would be lost with this process")
            self._is_behind, self._retry_at = True, now + RETRY_S
            return self._mode is not JournalMode.REQUIRED
        self._is_tidy = False
        return True

    def tidy(self, now: float) -> None:
        """Now and then: leave nothing in the log of changes of a file that is still there."""
        if self._file is None:
            return
        try:
            self._file.check_place()
        except JournalError as error:
            self._drop_file()
            self._is_behind = True
            self._report(error, "it is written anew")
            return
        if self._is_tidy or now < self._tidy_at:
            return
        self._tidy_at, self._is_tidy = now + TIDY_S, True
        with contextlib.suppress(JournalError):  # the next commit says so
            self._file.tidy()

    def close(self) -> None:
        """Safe to call again."""
        if self._file is not None:
            with contextlib.suppress(JournalError):
                self._file.tidy()
        self._drop_file()

    def _drop_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _holds_anything(self) -> bool:
        assert self._path is not None
        try:
            return self._path.stat().st_size > 0
        except FileNotFoundError:
            return False
        except OSError:
            return True

    def _set_aside(self, error: JournalError) -> None:
        """Out of the way, for whoever wants to look at it; one at most."""
        assert self._path is not None
        aside = self._path.with_suffix(".damaged")
        with contextlib.suppress(OSError):
            self._path.replace(aside)
            Path(f"{self._path}-wal").unlink(missing_ok=True)
        self._report(error, f"what was in it is not known any more; it is now {aside.name}")

    def _report(self, error: JournalError, meaning: str) -> None:
        log.emit(
            log.ERROR,
            "journal_failed",
            meaning,
            journal=str(self._path),
            cause=error.cause,
            tip=error.tip,
        )


def journal_path(state_dir: Path, link: str) -> Path:
    """Of the link whose lock is called `link`."""
    return state_dir / JOURNALS / f"{link}{_SUFFIX}"


def remove_unused(state_dir: Path) -> None:
    """Remove journals that no link has used for long, and what was set aside of them."""
    for path in (state_dir / JOURNALS).iterdir():
        with contextlib.suppress(OSError):
            # SQLite touches the file itself only when it moves the log of changes into it.
            changed_at, log_of_changes = path.stat().st_mtime, Path(f"{path}-wal")
            if log_of_changes.exists():
                changed_at = max(changed_at, log_of_changes.stat().st_mtime)
            is_old = time.time() - changed_at > MAX_UNUSED_S
            # Whoever serves that link has its lock; a journal without changes grows old in use.
            if is_old and not is_link_served(state_dir, path.name.partition(".")[0]):
                path.unlink()
