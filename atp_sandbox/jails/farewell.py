"""Wardens that have been told to end: watched until they have, so that nobody waits for one.

With a PID namespace SIGKILL ends a warden and all of its jail at once, but the kernel still needs
milliseconds for it; without one a warden first ends what came of it and removes its scratch, which
a hostile tool can make large.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

from atp_sandbox.jails.processes import ProcessHandle
from atp_sandbox.loop import READ, Loop, Timer

PATIENCE_S = 10.0
"""For an orderly end; then it is killed."""


class Farewells:
    """Owns the handles of processes that are ending, all of them children of this process."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._ending: dict[ProcessHandle, tuple[Timer, Callable[[int], None]]] = {}

    def add(self, handle: ProcessHandle, then: Callable[[int], None]) -> None:
        """Take over `handle`, reap its process once it has ended, and give `then` its status."""
        timer = self._loop.call_later(PATIENCE_S, handle.kill)
        self._ending[handle] = (timer, then)
        self._loop.watch(handle.fileno(), READ, lambda _events: self._conclude(handle))

    def close(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for all of them; kill those that take longer. Safe to call again."""
        deadline = time.monotonic() + min(patience_s, PATIENCE_S)
        for handle in list(self._ending):
            if not _has_ended(handle, deadline - time.monotonic()):
                handle.kill()
            self._conclude(handle)

    def _conclude(self, handle: ProcessHandle) -> None:
        timer, then = self._ending.pop(handle)
        timer.cancel()
        self._loop.unwatch(handle.fileno())
        _, status = os.waitpid(handle.pid, 0)
        handle.close()
        then(status)


def _has_ended(handle: ProcessHandle, patience_s: float) -> bool:
    """Whether it ends in time. With poll(2): the number of the descriptor may be any."""
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    return bool(poll.poll(1_000 * max(0.0, patience_s)))
