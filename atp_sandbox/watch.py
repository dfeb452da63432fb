"""Says which of the operator's files may have changed: a thread of watchfiles, with --reload only.

Directories are watched and never files, so that a save by rename, a file that is made anew and a
link that is pointed elsewhere are all seen: each directory on the way to a file, for the one name
in it that matters, and all of a folder. What is told is a hint; whoever hears it looks for himself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from atp_sandbox import log
from atp_sandbox.loop import Loop

STEP_MS = 100
"""Without a change for so long, what was gathered is told: an editor saves in several steps."""
DEBOUNCE_MS = 1_000
"""Changes that go on are told of this often."""
LOOK_MS = 1_000
"""After directories have come to be watched, until what happened before is looked for."""
_RETRY_S = 1.0
"""A directory went away just then; it is tried again."""
_START_S = 5.0
"""Between two attempts to start the thread."""
_POLL_S = 1.0
_POLL_SHARE = 10.0
"""Between two looks at least, and so many times as long as a look takes."""
_CLOSE_S = 1.0
MAX_DIRECTORIES = 20_000
"""Of all folders; a toolkit may have no more entries."""
_MAX_LINKS = 40
"""On the way to one file: as many as the kernel follows (path_resolution(7))."""
_REMEDY = (
    "raise fs.inotify.max_user_instances and fs.inotify.max_user_watches (sysctl), or end what "
    "else watches many files"
)
_RENAME = "give every folder a name in UTF-8"


_Seen = dict[str, tuple[int, int, int]]


class Places:
    """Which directories to watch for some paths, and whose a change in them is."""

    def __init__(self, watched: Mapping[str, Collection[Path]]) -> None:
        """`watched`: the paths of each key. Links are followed as they are now."""
        self._names: dict[tuple[str, str], set[str]] = {}
        self._folders: dict[str, set[str]] = {}
        for key, paths in watched.items():
            for path in paths:
                self._add(key, path)

    @property
    def directories(self) -> frozenset[str]:
        """All of them that can be read."""
        found = {directory for directory, _ in self._names} | self._folders.keys()
        return frozenset(one for one in found if os.access(one, os.R_OK | os.X_OK))

    def keys_of(self, path: str) -> set[str]:
        """Whom a change at `path` concerns."""
        directory, name = os.path.split(path)
        return self._folders.get(directory, set()) | self._names.get((directory, name), set())

    def seen(self) -> _Seen:
        """What tells a change of what is there now: node, size and time of all that matters."""
        paths = {os.path.join(*place) for place in self._names}
        for folder in self._folders:
            with contextlib.suppress(OSError):
                paths.update(os.path.join(folder, name) for name in os.listdir(folder))
        found = {}
        for path in paths:
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                # Whatever anybody puts into a directory changes its size and its time.
                is_folder = stat.S_ISDIR(status.st_mode)
                change = (0, 0) if is_folder else (status.st_size, status.st_mtime_ns)
                found[path] = (status.st_ino, *change)
        return found

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Places):
            return NotImplemented
        mine, others = (self._names, self._folders), (other._names, other._folders)
        return mine == others and self.directories == other.directories

    __hash__ = None  # type: ignore[assignment]

    def _add(self, key: str, path: Path) -> None:
        place = "/"
        left = list(Path(os.path.abspath(path)).parts[1:])
        links = 0
        while left:
            name = left.pop(0)
            self._names.setdefault((place, name), set()).add(key)
            whole = os.path.join(place, name)
            try:
                target = os.readlink(whole)
            except (OSError, ValueError):  # no link, not there, or no possible name
                if not os.path.lexists(whole):
                    return
                place = whole
                continue
            links += 1
            if links > _MAX_LINKS:
                return
            target = os.path.normpath(os.path.join(place, target))
            left = [*Path(target).parts[1:], *left]
            place = "/"
        if os.path.isdir(place):
            for directory in _tree(place):
                self._folders.setdefault(directory, set()).add(key)


def _tree(folder: str) -> Iterator[str]:
    """The folder and what lies below it, as far as a snapshot takes it in."""
    for directory, below, _ in itertools.islice(os.walk(folder), MAX_DIRECTORIES):
        below[:] = [name for name in below if name[0] != "." and name != "__pycache__"]
        yield directory


class FileWatch:
    """Owns the thread. To be used in the loop's thread."""

    def __init__(self, loop: Loop, on_change: Callable[[set[str]], None]) -> None:
        """`on_change(keys)` in the loop, as often as anything of theirs may have changed."""
        self._loop = loop
        self._on_change = on_change
        self._lock = threading.Lock()
        self._watched: dict[str, tuple[Path, ...]] = {}
        self._anew = threading.Event()
        """Set when other files are to be watched, or none any more."""
        self._is_closed = False
        self._polls = False
        self._thread: threading.Thread | None = None

    def watch(self, watched: Mapping[str, tuple[Path, ...]]) -> None:
        """From now on these, by key. Each is told of once when that has begun."""
        with self._lock:
            if dict(watched) == self._watched:
                return
            self._watched = dict(watched)
            self._anew.set()
        self._start()

    def _start(self) -> None:
        if self._thread is not None or self._is_closed:
            return
        thread = threading.Thread(target=self._run, name="atp-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # the machine has no processes left for us
            message = "files are not watched yet; that is tried again"
            log.emit(log.WARNING, "watch_failed", message, cause=str(error), retry_in_s=_START_S)
            self._loop.call_later(_START_S, self._start)
            return
        self._thread = thread

    def stop(self) -> None:
        """Nothing is told any more; waits for nothing."""
        self._is_closed = True
        self._anew.set()

    def close(self) -> None:
        """End the thread as well. Safe to call again."""
        self.stop()
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    # -- in the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                self._anew.clear()
                watched = dict(self._watched)
            if self._is_closed:  # asked after `clear`, which may have been that of `stop`
                return
            try:
                (self._poll if self._polls else self._watch)(watched)
            except (FileNotFoundError, PermissionError):
                self._anew.wait(_RETRY_S)
            # watchfiles raises either of the first two for inotify's limits, and UnicodeError for a
            # folder whose name is not UTF-8.
            except (OSError, RuntimeError, UnicodeError) as error:
                self._polls = True
                log.emit(
                    log.WARNING,
                    "watch_polls",
                    "changes cannot be announced, so files are looked at again and again",
                    cause=log.printable(str(error)),
                    tip=_RENAME if isinstance(error, UnicodeError) else _REMEDY,
                )

    def _poll(self, watched: Mapping[str, tuple[Path, ...]]) -> None:
        """Look at the files until others are to be watched."""
        before: dict[str, _Seen] = {}
        pause_s = 0.0
        while not self._anew.wait(pause_s):
            began = time.monotonic()
            seen = {key: Places({key: paths}).seen() for key, paths in watched.items()}
            self._loop.call_from_thread(
                partial(self._tell, {key for key in seen if seen[key] != before.get(key)})
            )
            before = seen
            pause_s = max(_POLL_S, _POLL_SHARE * (time.monotonic() - began))

    def _watch(self, watched: Mapping[str, tuple[Path, ...]]) -> None:
        """Watch until something else is to be watched."""
        import watchfiles

        places = Places(watched)
        is_first = True
        for changes in watchfiles.watch(
            *places.directories,
            watch_filter=None,
            debounce=DEBOUNCE_MS,
            step=STEP_MS,
            stop_event=self._anew,
            rust_timeout=LOOK_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
            recursive=False,
            ignore_permission_denied=False,  # it would hide that there are no watches left
        ):
            keys = {key for _, path in changes for key in places.keys_of(path)}
            # What changed before it was watched was announced by nobody.
            keys |= watched.keys() if is_first else set()
            is_first = False
            if keys:
                self._loop.call_from_thread(partial(self._tell, keys))
                if Places(watched) != places:
                    return

    def _tell(self, keys: set[str]) -> None:
        if keys and not self._is_closed:
            self._on_change(keys)
