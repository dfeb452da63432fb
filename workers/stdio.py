"""Standard streams of a zygote and of a worker: nothing to read, one pipe to write to."""

from __future__ import annotations

import io
import os
import sys


def attach(output_fd: int) -> None:
    """Make `output_fd` standard output and error of this process, below Python as well; closes it.

    Text is written line by line, so that what a tool printed before it crashed is not lost.
    """
    for standard in (1, 2):
        os.dup2(output_fd, standard)
    if output_fd > 2:
        os.close(output_fd)


def open_streams() -> None:
    """Fresh `sys.stdin`, `sys.stdout` and `sys.stderr` over descriptors 0, 1 and 2, in UTF-8."""
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = sys.__stdin__ = _text(0, "r")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _text(1, "w")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _text(2, "w")  # type: ignore[misc]


def flush() -> None:
    """Write out what Python still holds; a stream that the toolkit broke is its own loss."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except Exception:
            continue


def _text(fd: int, mode: str) -> io.TextIOWrapper:
    raw = io.FileIO(fd, mode, closefd=False)
    buffered = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffered, encoding="utf-8", errors="backslashreplace", line_buffering=mode == "w"
    )
