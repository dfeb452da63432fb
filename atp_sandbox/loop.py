"""The supervisor's one event loop: descriptors, timers, signals, calls from other threads.

Much smaller than asyncio's because the hot path crosses it several times a call: no handles, no
contexts, no futures. Everything that owns a descriptor registers it here and nothing else selects.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable

READ = select.EPOLLIN
WRITE = select.EPOLLOUT

_ENDED = select.EPOLLHUP | select.EPOLLERR

Callback = Callable[[], None]
ReadyCallback = Callable[[int], None]


class Timer:
    """A call to come; `cancel()` may be called any number of times."""

    __slots__ = ("callback", "when")

    def __init__(self, when: float, callback: Callback) -> None:
        self.when = when
        self.callback: Callback | None = callback

    def cancel(self) -> None:
        self.callback = None


class Loop:
    """Runs callbacks in one thread until `stop()`; only `call_from_thread` may be used elsewhere.

    An exception in a callback ends `run()`: the callers catch at their own edges.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()  # `selectors` on top would take 3 µs an event
        self._watched: dict[int, ReadyCallback] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = itertools.count()
        self._soon: deque[Callback] = deque()
        self._last: list[Callback] = []
        self._running = False
        self._signal_callbacks: dict[int, Callback] = {}
        self._previous_handlers: dict[int, object] = {}
        self._previous_wakeup_fd = -1
        self._is_woken = False
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self.watch(self._wake_reader.fileno(), READ, self._on_wake)

        self.turn_at = self.now()
        """When the present turn began: by then, what is read in it had come."""

    now = staticmethod(time.monotonic)

    def watch(self, fd: int, events: int, callback: ReadyCallback) -> None:
        """Call `callback(events)` whenever `fd` is ready; again to change what is watched."""
        if fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._watched[fd] = callback

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; to be called before it is closed. Unknown descriptors are ignored."""
        if self._watched.pop(fd, None) is not None:
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def call_at(self, when: float, callback: Callback) -> Timer:
        """Run `callback` once `now() >= when`."""
        timer = Timer(when, callback)
        heapq.heappush(self._timers, (when, next(self._sequence), timer))
        return timer

    def call_later(self, delay_s: float, callback: Callback) -> Timer:
        return self.call_at(self.now() + delay_s, callback)

    def call_soon(self, callback: Callback) -> None:
        """Run `callback` after the events at hand: the place to decide on what they gathered."""
        self._soon.append(callback)

    def call_last(self, callback: Callback) -> None:
        """Run `callback` at the end of this turn: the place to write what was decided in it."""
        self._last.append(callback)

    def call_from_thread(self, callback: Callback) -> None:
        """As `call_soon`, from any thread."""
        self._soon.append(callback)
        if not self._is_woken:  # one byte is enough; many would leave no room for a signal's
            self._is_woken = True
            with contextlib.suppress(OSError):
                self._wake_writer.send(b"\0")

    def on_signal(self, number: int, callback: Callback) -> None:
        """Run `callback` in the loop when signal `number` arrives; main thread only."""
        if not self._signal_callbacks:
            self._previous_wakeup_fd = signal.set_wakeup_fd(
                self._wake_writer.fileno(), warn_on_full_buffer=False
            )
        self._signal_callbacks[number] = callback
        self._previous_handlers.setdefault(number, signal.getsignal(number))
        signal.signal(number, lambda *_: None)

    def run(self) -> None:
        """Serve until `stop()`."""
        self._running = True
        while self._running:
            self.run_once()

    def stop(self) -> None:
        self._running = False

    def run_until(self, condition: Callable[[], bool], timeout_s: float) -> bool:
        """Serve until `condition()` holds; False if it does not within `timeout_s`."""
        deadline = self.now() + timeout_s
        while not condition():
            left = deadline - self.now()
            if left <= 0:
                return False
            self.run_once(left)
        return True

    def run_once(self, longest_s: float | None = None) -> None:
        """One wait and everything that it brought."""
        watched = self._watched
        ready = self._epoll.poll(self._wait_s(longest_s))
        self.turn_at = self.now()
        for fd, events, callback in [(fd, events, watched.get(fd)) for fd, events in ready]:
            # What came before it in this round may have closed or replaced it.
            if callback is not None and watched.get(fd) is callback:
                if events & _ENDED:
                    events |= READ | WRITE  # either finds out
                callback(events)
        if self._timers:
            self._run_timers()
        for _ in range(len(self._soon)):
            self._soon.popleft()()
        if self._last:
            due, self._last = self._last, []
            for callback_at_end in due:
                callback_at_end()

    def close(self) -> None:
        """Give back descriptors and signal handlers."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._signal_callbacks:
            signal.set_wakeup_fd(self._previous_wakeup_fd)
        self._signal_callbacks.clear()
        self._previous_handlers.clear()
        self._epoll.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def _wait_s(self, longest_s: float | None) -> float | None:
        if self._soon or self._last:
            return 0
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        if not self._timers:
            return longest_s
        wait = max(0.0, self._timers[0][0] - self.now())
        return wait if longest_s is None else min(wait, longest_s)

    def _run_timers(self) -> None:
        now = self.now()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            if timer.callback is not None:
                callback, timer.callback = timer.callback, None
                callback()

    def _on_wake(self, _events: int) -> None:
        self._is_woken = False
        with contextlib.suppress(BlockingIOError):
            for number in self._wake_reader.recv(4096):
                callback = self._signal_callbacks.get(number)
                if callback is not None:
                    callback()
