"""What a process of a jail prints: read without end, kept up to a bound, never a reason to kill."""

from __future__ import annotations

import os

from atp_sandbox.limits import MAX_OUTPUT_CAPTURE_BYTES
from atp_sandbox.log import printable
from atp_sandbox.loop import READ, Loop

_CHUNK_BYTES = 64 * 1024
_FAST_BYTES = 16 * 1024 * 1024
"""Read as fast as it comes; whoever prints more is slowed down, not stopped."""
_SLOW_PAUSE_S = 0.004
"""Between two chunks from then on: some 16 MB a second, at hardly any cost to us."""


class OutputPipe:
    """Owns the reading end of a pipe; `writer` is closed by whoever sends it into the jail."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._fd, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._kept = bytearray()
        self._dropped_bytes = 0
        self._seen_bytes = 0
        self._is_paused = False
        loop.watch(self._fd, READ, self._on_ready)

    def take(self) -> str:
        """What was printed since the last `take`, readable and with the cut marked; maybe empty."""
        self._on_ready(READ)
        if not self._kept and not self._dropped_bytes:
            return ""
        text = self._kept.decode("utf-8", "backslashreplace")
        if self._dropped_bytes:
            text += f"\n[{self._dropped_bytes} more bytes were printed and not kept]"
        self._kept.clear()
        self._dropped_bytes = 0
        return printable(text, keep_newlines=True)

    def close(self) -> None:
        """Drop the pipe; safe to call again."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_ready(self, _events: int) -> None:
        if self._fd < 0 or self._is_paused:
            return
        data = self._read()
        while data and self._seen_bytes <= _FAST_BYTES:
            data = self._read()
        if data and self._seen_bytes > _FAST_BYTES:
            self._is_paused = True
            self._loop.unwatch(self._fd)
            self._loop.call_later(_SLOW_PAUSE_S, self._resume)

    def _read(self) -> int:
        """How many bytes were there; 0 if none, or no more ever."""
        try:
            data = os.read(self._fd, _CHUNK_BYTES)
        except BlockingIOError:
            return 0
        if not data:
            self.close()
            return 0
        room = MAX_OUTPUT_CAPTURE_BYTES - len(self._kept)
        self._kept += data[:room]
        self._dropped_bytes += max(0, len(data) - room)
        self._seen_bytes += len(data)
        return len(data)

    def _resume(self) -> None:
        self._is_paused = False
        if self._fd >= 0:
            self._loop.watch(self._fd, READ, self._on_ready)
