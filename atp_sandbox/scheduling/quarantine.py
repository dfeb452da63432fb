"""When a toolkit that crashes again and again is out of service, and when it is tried. PURE.

A circuit breaker, one a toolkit: closed (it serves), open (calls are refused until a moment),
trying (one call at a time may show whether it works again). What only fails is no crash.
"""

from __future__ import annotations

from collections import deque
from enum import Enum, auto

from atp_sandbox.outcome import Failure, Kind

CRASHES = 5
WINDOW_S = 60.0
"""So many crashes within so long, and it is out of service."""
PERSISTS_S = 5.0
"""Of workers: a burst of calls that crash is over before anybody is helped by refusing others."""
FIRST_S = 1.0
LONGEST_S = 60.0
"""Out of service at first, and at most: each try that fails doubles it."""
HEALTHY_S = 60.0
"""In service for so long, it begins with the shortest again."""
TRYING_S = 1.0
"""When to ask again while another call is the one that tries."""


class Phase(Enum):
    CLOSED = auto()
    OPEN = auto()
    TRYING = auto()


class Quarantine:
    """Fed with what happened; asked before each call. Each event says if the phase changed."""

    def __init__(self) -> None:
        self.phase = Phase.CLOSED
        self.until = 0.0
        """When it is tried again, while open."""
        self.crashes = 0
        """How many led to the present quarantine."""
        self._of_jails: deque[float] = deque(maxlen=CRASHES)
        self._of_workers: deque[float] = deque(maxlen=CRASHES)
        """Of every worker: since one that did not crash."""
        self._began_at: float | None = None
        """The first of those."""
        self._next_s = FIRST_S
        self._closed_at = 0.0
        self._is_trying = False

    def jail_crashed(self, now: float) -> bool:
        """What all its workers come from ended by itself."""
        self._of_jails.append(now)
        return self._crashed(self._of_jails, now)

    def worker_crashed(self, now: float) -> bool:
        """A call ended with its worker."""
        self._is_trying = False
        self._of_workers.append(now)
        if self._began_at is None:
            self._began_at = now
        if self.phase is Phase.CLOSED and now - self._began_at < PERSISTS_S:
            return False
        return self._crashed(self._of_workers, now)

    def worker_survived(self, now: float) -> bool:
        """A call ended in any other way."""
        self._is_trying = False
        self._of_workers.clear()
        self._began_at = None
        if self.phase is not Phase.TRYING:
            return False
        self.phase, self._closed_at = Phase.CLOSED, now
        self._of_jails.clear()
        return True

    def call_vanished(self) -> None:
        """A call that was let through never ran: it has shown nothing."""
        self._is_trying = False

    def refusal(self, toolkit: str, now: float) -> Failure | None:
        """None if a call may be let through; in quarantine that one is the one that tries."""
        if self.phase is Phase.OPEN and self.until <= now:
            self.phase = Phase.TRYING
        if self.phase is Phase.CLOSED:
            return None
        if self.phase is Phase.TRYING and not self._is_trying:
            self._is_trying = True
            return None
        wait_s = self.until - now if self.phase is Phase.OPEN else TRYING_S
        return Failure(
            Kind.UNAVAILABLE,
            f"The toolkit {toolkit} is out of service: it crashed {self.crashes} times in "
            f"{WINDOW_S:g} s. It is tried again in {max(0.1, wait_s):.1f} s.",
            retry_after_s=round(max(0.1, wait_s), 1),
        )

    def _crashed(self, crashes: deque[float], now: float) -> bool:
        if self.phase is Phase.OPEN:
            return False  # calls that were at work when it opened
        is_many = len(crashes) == CRASHES and now - crashes[0] <= WINDOW_S
        if self.phase is Phase.CLOSED:
            if not is_many:
                return False
            if now - self._closed_at >= HEALTHY_S:
                self._next_s = FIRST_S
            self.crashes = 0
        self.crashes += CRASHES if self.phase is Phase.CLOSED else 1
        self.phase, self.until = Phase.OPEN, now + self._next_s
        self._next_s = min(LONGEST_S, 2 * self._next_s)
        self._is_trying = False
        return True
