"""Every bound that we put on what comes from outside: name, value, unit and reason.

`Limits` holds those an operator may set per toolkit; the constants below are fixed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

MAX_REQUEST_BYTES = 16 * MIB
"""One websocket message from the backend. 8 MB parameters are on record with the published SDK."""
MAX_REQUEST_ID_BYTES = 64 * KIB
"""As JSON: it is kept as long as its call waits, which may be one of hundreds. Usually a UUID."""
MAX_JSON_DEPTH = 200
"""Nesting of parameters and results; CPython's own decoder gives up near 1,000."""
MAX_OUTPUT_CAPTURE_BYTES = 64 * KIB
"""stdout and stderr kept of one call; the rest is read and counted, never stored."""
MAX_SNAPSHOT_BYTES = 256 * MIB
"""A toolkit's own files; more is a data set, and belongs elsewhere."""
MAX_TOOLS = 1_000
"""Tools of one toolkit; the largest published ones have a few dozen."""
MAX_NAME_CHARS = 256
"""A tool's, parameter's or application's name."""
MAX_TEXT_CHARS = 1 * MIB
"""A tool's description or source text."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one toolkit's calls may use. Sizes in bytes, durations in seconds."""

    time_s: float = 30.0
    """From receipt of a request to its answer, waiting in the queue included."""
    cpu_s: float | None = None
    """Processor time of one call, all its threads together; None: as much as its time allows."""
    import_time_s: float = 30.0
    """From the start of a jail to the end of the toolkit's import."""
    memory_bytes: int = 256 * MIB
    """What one call may add to its zygote; also what the import may use."""
    output_bytes: int = 1 * MIB
    """The result, encoded as JSON."""
    scratch_bytes: int = 64 * MIB
    """Files a call may write, held in memory."""
    scratch_files: int = 4_096
    """Files and directories a call may create."""
    processes: int = 64
    """Processes and threads of one jail above its resting number."""
    open_files: int = 256
    """Descriptors of one process (RLIMIT_NOFILE)."""
    concurrency: int = 4
    """Calls of one toolkit that run at the same time."""
    queue: int = 256
    """Calls of one toolkit that wait; more are answered `overloaded`."""
    queue_bytes: int = 64 * MIB
    """Parameters of one toolkit's waiting calls, in bytes of JSON."""


_UNITS = {"": 1, "B": 1, "K": KIB, "M": MIB, "G": GIB}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)(?:i?B)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|)")
_SECONDS = {"ms": 0.001, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def parse_size(text: str) -> int:
    """Bytes of `256M`, `1.5G`, `4096`; powers of 1024. ValueError says what is allowed."""
    found = _SIZE.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no size; write for example 512K, 256M or 1G")
    size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size <= 0:
        raise ValueError(f"{text!r} is no size: it must be more than 0")
    return size


def parse_duration(text: str) -> float:
    """Seconds of `30s`, `500ms`, `2m`, `1h`, `10`. ValueError says what is allowed."""
    found = _DURATION.fullmatch(text.strip())
    if not found:
        raise ValueError(f"{text!r} is no duration; write for example 500ms, 30s or 2m")
    seconds = float(found[1]) * _SECONDS[found[2]]
    if seconds <= 0:
        raise ValueError(f"{text!r} is no duration: it must be more than 0")
    return seconds


def format_size(size_bytes: float) -> str:
    """`256 MiB`, `1.5 KiB`, `12 B`: at most one decimal."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.1f}".removesuffix(".0") + f" {unit}"
        size /= 1024
    return f"{size:.1f}".removesuffix(".0") + " GiB"


def format_duration(seconds: float) -> str:
    """`30 s`, `250 ms`."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f}".removesuffix(".0") + " s"
