"""Moves processes into groups in a thread of its own, so that the event loop never waits for it.

A write to `cgroup.procs` waits for an RCU grace period unless another move came just before: 5 µs
in a tight loop, but 11 ms (18 at most) for one at a time, in either version, on an idle Linux 6.18.
Whoever needs an answer within a millisecond has the move made ahead of need, as the pool does its
forks: a worker is ready when it is forked *and* moved.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from queue import SimpleQueue

from atp_sandbox.jails.cgroup_files import CgroupError

Add = Callable[[int], None]
Then = Callable[[Exception | None], None]


class Mover:
    """One for a supervisor; owns the thread."""

    def __init__(self, call_from_thread: Callable[[Callable[[], None]], None]) -> None:
        """`call_from_thread`: as `Loop.call_from_thread`; each `then` is called through it."""
        self._call_from_thread = call_from_thread
        self._asked: SimpleQueue[tuple[int, Add, Then] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="cgroup-mover", daemon=True)
        self._thread.start()

    def move(self, pid: int, add: Add, then: Then) -> None:
        """Have `add(pid)` done, `add` being the `adder()` of a group; moves are made in turn.

        `then(None)` follows in the loop, or `then(error)`: ProcessLookupError if the process is
        gone, CgroupError if it is to be ended.
        """
        self._asked.put((pid, add, then))

    def close(self) -> None:
        """Make the moves that were asked for and end the thread. Safe to call again."""
        if self._thread.is_alive():
            self._asked.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            pid, add, then = asked
            error: Exception | None = None
            try:
                add(pid)
            except (CgroupError, ProcessLookupError) as caught:
                error = caught
            self._call_from_thread(functools.partial(then, error))
