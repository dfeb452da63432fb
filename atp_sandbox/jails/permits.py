"""Which of the calls handed to a worker it may still begin.

A worker of lifetime `calls:N` is handed calls ahead, so that it does not wait for us after each. It
begins one only with its permit: the call's id, in a pipe of which both ends are here and the
reading end is there too. So the kernel gives each permit to one side alone. What we take back, the
worker never begins; what we find gone, it has begun. A worker that plays foul with its permits does
so to calls of its own process, which it shares its memory with anyway.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from workers.frames import CALL_ID_BYTES

_READ_BYTES = 64 * CALL_ID_BYTES
"""More than are ever granted at a time."""


class Permits:
    """Owns the pipe; `for_worker` is closed by whoever sends it into the jail."""

    def __init__(self) -> None:
        """OSError if there are no descriptors left."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self.for_worker = os.dup(self._reader)
        except OSError:
            self.close()
            raise

    def grant(self, call_ids: Sequence[bytes]) -> None:
        """Before the calls themselves are sent. Nothing if the pipe is full: none is begun then."""
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"".join(call_ids))

    def take_back(self, call_ids: Sequence[bytes]) -> int:
        """How many of the last of `call_ids`, in the order they were granted in, were not begun."""
        if self._reader < 0:
            return 0
        try:
            found = os.read(self._reader, _READ_BYTES)
        except BlockingIOError:
            return 0
        count = len(found) // CALL_ID_BYTES
        # Anything else was put in by somebody else, and says nothing.
        return count if count and found == b"".join(call_ids[-count:]) else 0

    def close(self) -> None:
        """Safe to call again."""
        if self._reader >= 0:
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1
