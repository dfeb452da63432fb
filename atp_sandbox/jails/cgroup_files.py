"""Files of cgroups: each read, each write, and each refusal with the file's name and the errno.

Trusted side only. Whatever the kernel does not take becomes a `CgroupError`.
"""

from __future__ import annotations

import errno
import os
import threading

from atp_sandbox.errors import IsolationError

_READ_BYTES = 64 * 1024
"""More than any file that we read holds, save a list of 9,000 processes; that one is read on."""


class CgroupError(IsolationError):
    """The kernel refused something on a file of a cgroup; `errno` says what, `path` where.

    `value` is what was to be written, empty for anything but a write.
    """

    def __init__(self, action: str, path: str, error: OSError, *, value: str = "") -> None:
        name = errno.errorcode.get(error.errno or 0, str(error.errno))
        super().__init__(
            "cgroup",
            f"cannot {action} {path}",
            cause=f"{name}: {error.strerror}",
            tip="Run `doctor`: it says whether limits can be put on groups here, and how.",
        )
        self.path = path
        self.value = value
        self.errno = error.errno


class KernelFile:
    """A file of a cgroup, kept open: a read asks the kernel anew and takes 1 µs, not 9. Owns it.

    It may be written in one thread and closed in another, which then waits for the write: a number
    that was given to another file meanwhile is never written to.
    """

    __slots__ = ("_fd", "_lock", "path")

    def __init__(self, path: str, flags: int = os.O_RDONLY) -> None:
        """CgroupError if it cannot be opened."""
        self.path = path
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC)
        except OSError as error:
            raise CgroupError("open", path, error) from error

    def read(self) -> bytes:
        """What the kernel says now."""
        try:
            text = os.pread(self._fd, _READ_BYTES, 0)
            while len(text) % _READ_BYTES == 0 and text:
                more = os.pread(self._fd, _READ_BYTES, len(text))
                if not more:
                    break
                text += more
        except OSError as error:
            raise CgroupError("read", self.path, error) from error
        return text

    def write(self, value: bytes) -> None:
        """One write(2), which the kernel takes whole or refuses."""
        try:
            with self._lock:
                os.write(self._fd, value)
        except OSError as error:
            shown = value.decode("ascii")
            action = f"write {shown!r} to"
            raise CgroupError(action, self.path, error, value=shown) from error

    def close(self) -> None:
        """Safe to call again."""
        with self._lock:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def write_value(path: str, value: int | str) -> None:
    """Open, write, close; CgroupError names file, value and errno."""
    file = KernelFile(path, os.O_WRONLY)
    try:
        file.write(str(value).encode("ascii"))
    finally:
        file.close()


def read_value(path: str) -> str:
    """Open, read, close."""
    file = KernelFile(path)
    try:
        return file.read().decode("ascii").strip()
    finally:
        file.close()


def field_of(text: bytes, name: bytes) -> int:
    """The number behind `name` in a flat keyed file; 0 where this kernel does not count it."""
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name:
            return int(value)
    return 0


def forbid_swap(path: str, value: int) -> None:
    """Bound swap through the file `path`. Without it a limit on memory is none while swap is on."""
    if os.path.exists(path):
        write_value(path, value)
    elif _swap_is_on():
        missing = FileNotFoundError(errno.ENOENT, "swap is on and not accounted (swapaccount=1)")
        raise CgroupError(f"write {str(value)!r} to", path, missing, value=str(value))


def _swap_is_on() -> bool:
    with open("/proc/swaps", encoding="ascii", errors="replace") as file:
        return len(file.readlines()) > 1
