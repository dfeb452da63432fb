"""What a process of a jail prints: read without end, kept up to a bound, never a reason to kill."""

from __future__ import annotations

import os

from atp_sandbox.limits import MAX_OUTPUT_CAPTURE_BYTES
from atp_sandbox.log import printable
from atp_sandbox.loop import READ, Loop

_CHUNK_BYTES = 64 * 1024
_READS_PER_WAKE = 4
"""A tool that prints without pause gets a quarter megabyte a turn, and the loop goes on."""


class OutputPipe:
    """Owns the reading end of a pipe; `writer` is for the jail and closed by whoever sends it on."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._fd, self.writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._fd, False)
        self._kept = bytearray()
        self._dropped_bytes = 0
        loop.watch(self._fd, READ, self._on_ready)

    def take(self) -> str:
        """What was printed since the last `take`, readable and with the cut marked; maybe empty."""
        self._on_ready(READ)
        text = self._kept.decode("utf-8", "backslashreplace")
        if self._dropped_bytes:
            text += f"\n[{self._dropped_bytes} more bytes were printed and not kept]"
        self._kept.clear()
        self._dropped_bytes = 0
        return printable(text, keep_newlines=True) if text else ""

    def close(self) -> None:
        """Drop the pipe; safe to call again."""
        if self._fd >= 0:
            self._loop.unwatch(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _on_ready(self, _events: int) -> None:
        if self._fd < 0:
            return
        for _ in range(_READS_PER_WAKE):
            try:
                data = os.read(self._fd, _CHUNK_BYTES)
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            room = MAX_OUTPUT_CAPTURE_BYTES - len(self._kept)
            self._kept += data[:room]
            self._dropped_bytes += max(0, len(data) - room)
