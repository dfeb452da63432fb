"""One thread for what may wait for a disk while calls are served: its jobs are done in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

from atp_sandbox.errors import SandboxError

T = TypeVar("T")

CLOSE_S = 0.5
"""For the job at hand when all is to end; a file system that hangs may keep the thread for ever."""


class Background:
    """Owns the thread, which is started with the first job."""

    def __init__(self, call_from_thread: Callable[[Callable[[], None]], None]) -> None:
        """`call_from_thread`: as `Loop.call_from_thread`."""
        self._call_from_thread = call_from_thread
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def run(self, job: Callable[[], T], then: Callable[[T | SandboxError], None]) -> None:
        """Have `job()` done in the thread; `then` follows in the loop, with what it gave or raised.

        Whatever it raises comes as a SandboxError.
        """
        if self._is_closed:
            return
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="atp-background", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the machine has no processes left for us
                failure = SandboxError("There is no thread for it.", cause=str(error))
                self._call_from_thread(partial(then, failure))
                return
            self._thread = thread

        def work() -> None:
            outcome: T | SandboxError
            try:
                outcome = job()
            except SandboxError as error:
                outcome = error
            except Exception as error:  # the thread's outer door: the next job is to be done
                outcome = SandboxError("an internal error; please report it", cause=repr(error))
            self._call_from_thread(partial(then, outcome))

        self._jobs.put(work)

    def close(self) -> None:
        """Take no more jobs and end the thread, if it can. Safe to call again."""
        self._is_closed = True
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None and not self._is_closed:
            work()
