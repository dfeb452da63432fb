"""The state directory: where it is, that nobody else can write it, and one lock per link.

Trusted side only; no jail sees any of it but single snapshots, read-only.

    <state>/snapshots   toolkits as they were taken, see `jails.snapshot`
    <state>/journals    one per link, see `journal`
    <state>/locks       one file per link, and the secret that their names are made with
    <state>/run         sockets and other leftovers of a running process
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import pwd
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from atp_sandbox.errors import SandboxError, UsageError

SNAPSHOTS, JOURNALS, LOCKS, RUN = "snapshots", "journals", "locks", "run"
SUBDIRECTORIES = (SNAPSHOTS, JOURNALS, LOCKS, RUN)

_SCRATCH = "scratch-"
_PROCESS_TOKEN = secrets.token_hex(4)
"""Tells what is ours from what a dead process of our number left."""
_SECRET_NAME = "secret"
_SECRET_BYTES = 32
_MAX_PID_BYTES = 20


def default_state_dir(environ: Mapping[str, str], euid: int) -> Path:
    """Where state goes if the operator names no directory; an absolute path, maybe not there yet.

    In this order: `STATE_DIRECTORY` (systemd.exec(5); the first, if there are several), for root
    `/var/lib/atp-sandbox`, `XDG_STATE_HOME/atp-sandbox`, `~/.local/state/atp-sandbox`. A relative
    value is ignored, as the XDG Base Directory Specification asks. UsageError if nothing is left.
    """
    from_systemd = environ.get("STATE_DIRECTORY", "").split(":")[0]
    if os.path.isabs(from_systemd):
        return Path(from_systemd)
    if euid == 0:
        return Path("/var/lib/atp-sandbox")
    state_home = environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state_home):
        return Path(state_home, "atp-sandbox")
    home = environ.get("HOME", "") or _home_of(euid)
    if os.path.isabs(home):
        return Path(home, ".local", "state", "atp-sandbox")
    raise UsageError(
        "there is no place for the state directory",
        cause=f"user {euid} has no home directory, and XDG_STATE_HOME is not an absolute path",
        tip="set XDG_STATE_HOME to a directory that only this user can write",
    )


def _home_of(euid: int) -> str:
    try:
        return pwd.getpwuid(euid).pw_dir
    except KeyError:
        return ""


def prepare(state_dir: Path) -> None:
    """Make `state_dir` and what belongs in it (mode 0700), or check what is there.

    Safe to call again. UsageError if a directory cannot be made, belongs to another user, or can
    be written by group or others: then its content may be anybody's.
    """
    state_dir = state_dir.absolute()
    for missing in reversed([p for p in state_dir.parents if not p.exists()]):
        _make(missing)
    # The directory itself may be a link: systemd's DynamicUser= makes one to /var/lib/private.
    _make(state_dir)
    _check(state_dir, follow_symlinks=True)
    for name in SUBDIRECTORIES:
        _make(state_dir / name)
        _check(state_dir / name, follow_symlinks=False)


def let_others_pass(state_dir: Path) -> None:
    """Let every user reach a snapshot whose name he knows, but list nothing.

    For a root supervisor whose jails have no root directory of their own: they read theirs as an
    unprivileged user. Locks and sockets stay closed.
    """
    for directory in (state_dir, state_dir / SNAPSHOTS):
        directory.chmod(0o711)


def scratch_prefix(parent: Path) -> str:
    """How the paths of all plain scratch directories of this process begin."""
    return str(parent / f"{_SCRATCH}{os.getpid()}-{_PROCESS_TOKEN}-")


def scratch_directory(parent: Path) -> Path:
    """A name in `parent` for the plain scratch of one jail, which makes it."""
    return Path(scratch_prefix(parent) + secrets.token_hex(8))


def remove_stale_scratch(parent: Path) -> None:
    """Remove what jails of dead supervisors left: their wardens have emptied it. Never looks in."""
    for path in parent.glob(f"{_SCRATCH}*"):
        pid = path.name.removeprefix(_SCRATCH).partition("-")[0]
        if pid.isdigit() and not Path("/proc", pid).exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise UsageError(
            f"cannot make the state directory {directory}",
            cause=_reason(error),
            tip="name a directory that this user can write",
        ) from error


def _check(directory: Path, *, follow_symlinks: bool) -> None:
    try:
        status = os.stat(directory, follow_symlinks=follow_symlinks)
    except OSError as error:
        raise UsageError(
            f"cannot use the state directory {directory}", cause=_reason(error)
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(
            f"{directory} is not a directory",
            tip="move it away, or name another state directory",
        )
    if status.st_uid != os.geteuid():
        raise UsageError(
            f"the state directory {directory} belongs to another user",
            cause=f"its owner is uid {status.st_uid}, this process is uid {os.geteuid()}",
            tip=f"run as that user, name another directory, or: chown {os.geteuid()} {directory}",
        )
    if status.st_mode & 0o022:
        raise UsageError(
            f"other users can write the state directory {directory}",
            cause=f"its mode is {stat.S_IMODE(status.st_mode):04o}",
            tip=f"if nobody else has put anything there: chmod go-w {directory}",
        )


class LinkLock:
    """At most one process serves one link, that is, one address with one key.

    Owns one descriptor from `acquire` to `close`. The lock is flock(2): the kernel drops it when
    its holder dies, so nothing stale needs to be cleaned up. The file's name is a digest keyed
    with a random secret of this state directory, and gives the key away to nobody.
    """

    def __init__(self, state_dir: Path, base_url: str, api_key: str) -> None:
        """`state_dir` is one that `prepare` has checked. Touches no file yet."""
        self._locks = state_dir / LOCKS
        self._link = _link_bytes(base_url, api_key)
        self._fd: int | None = None
        self.name = ""
        """Of the link; tells its key to nobody. Known once the lock was acquired."""
        self.secret = b""
        """For digests of this link's requests, the same in every process. Likewise."""

    def __repr__(self) -> str:
        return f"<LinkLock {'held' if self._fd is not None else 'free'}>"

    def acquire(self) -> None:
        """Take the lock without waiting; safe to call while held.

        SandboxError if another process has it, or if the file system cannot lock; then nothing is
        held.
        """
        if self._fd is not None:
            return
        key = _secret(self._locks)
        self.name = hashlib.blake2b(self._link, key=key, digest_size=32).hexdigest()
        self.secret = hashlib.blake2b(self._link, key=key, person=b"requests").digest()
        try:
            fd = os.open(
                self._locks / self.name,
                os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
                0o600,
            )
        except OSError as error:
            raise SandboxError(
                f"cannot open a lock in {self._locks}", cause=_reason(error)
            ) from error
        try:
            _lock(fd)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode("ascii"), 0)
        except OSError as error:
            os.close(fd)
            raise SandboxError(f"cannot lock in {self._locks}", cause=_reason(error)) from error
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def close(self) -> None:
        """Give the lock back; safe to call again, or without ever having had it.

        The file stays: removing it would let two processes lock two files of the same name.
        """
        fd, self._fd = self._fd, None
        if fd is None:
            return
        try:
            os.ftruncate(fd, 0)
            # A child that was forked meanwhile may share the descriptor: unlock, not just close.
            fcntl.flock(fd, fcntl.LOCK_UN)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_link_served(state_dir: Path, name: str) -> bool:
    """Whether some process holds the lock of the link that is called `name`."""
    try:
        fd = os.open(state_dir / LOCKS / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        pid = os.pread(fd, _MAX_PID_BYTES, 0)
        raise SandboxError(
            "another atp-sandbox serves this link",
            cause=f"process {int(pid)} holds its lock" if pid.isdigit() else "its lock is held",
            tip="stop that one first, or use another API key",
        ) from error


def _link_bytes(base_url: str, api_key: str) -> bytes:
    """One spelling per link: scheme and host in lower case, no slash at the end."""
    try:
        parts = urlsplit(base_url)
        address = parts._replace(scheme=parts.scheme.lower(), netloc=parts.netloc.lower()).geturl()
    except ValueError:
        address = base_url
    encoded = address.rstrip("/").encode("utf-8", "surrogatepass")
    return b"%d:%b%b" % (len(encoded), encoded, api_key.encode("utf-8", "surrogatepass"))


def _secret(locks: Path) -> bytes:
    """The random bytes that lock names are keyed with, made on first use; always complete."""
    path = locks / _SECRET_NAME
    try:
        if not path.exists():
            _make_secret(path)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(fd)
            secret = os.read(fd, _SECRET_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
        finally:
            os.close(fd)
    except OSError as error:
        raise SandboxError(f"cannot use the file {path}", cause=_reason(error)) from error
    private = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    if not private or len(secret) != _SECRET_BYTES:
        raise SandboxError(
            f"{path} is not as it was made",
            cause=f"it should hold {_SECRET_BYTES} bytes, with this user as owner and mode 0600",
            tip="stop every atp-sandbox that uses this state directory, then remove the file",
        )
    return secret


def _make_secret(path: Path) -> None:
    # Written under another name and linked: whoever comes second finds a whole file or none.
    draft = path.with_name(f".{secrets.token_hex(8)}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, secrets.token_bytes(_SECRET_BYTES))
        os.fsync(fd)
        os.link(draft, path, follow_symlinks=False)
    except FileExistsError:
        pass
    finally:
        os.close(fd)
        os.unlink(draft)


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "unknown error")
    return f"{name}: {error.strerror}"
