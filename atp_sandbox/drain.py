"""How a supervisor that was asked to stop comes to its end, in time whatever others do. PURE.

    asked ── running calls finish ──► grace is over: those left are interrupted
      └── idle ── answers leave ──► links are closed ── they say good-bye ──► the end

Each arrow has a bound, so that the process is gone `LAST_S` after the grace at the latest: a tool
that ignores everything, a backend that does not read or is away cannot hold it up.
"""

from __future__ import annotations

from enum import Enum, auto

SEND_GRACE_S = 5.0
"""For answers to leave after the last call ended, if the grace is not over before."""
SEND_LAST_S = 0.5
"""The same after the grace: answers to calls that were interrupted, at a backend that reads."""
GOODBYE_S = 0.5
"""For links to say good-bye."""
LAST_S = 2.0
"""From the end of the grace to the end of the process. What the two above leave of it is for jails
to end in order, and for the processes of ours."""


class Step(Enum):
    """What the supervisor is to do now; each but `WAIT` comes once."""

    WAIT = auto()
    INTERRUPT = auto()
    CLOSE_LINKS = auto()
    LEAVE = auto()


class Drain:
    """One drain, from the request to stop on."""

    def __init__(self, now: float, grace_s: float) -> None:
        self._grace_until = now + grace_s
        self._idle_since: float | None = None
        self._was_interrupted = False
        self._closed_at: float | None = None

    def patience_s(self, now: float) -> float:
        """What is left, at the end, for jails to end in order."""
        return max(0.0, self._grace_until + LAST_S - GOODBYE_S - now)

    def step(self, now: float, *, is_idle: bool, is_settled: bool) -> Step:
        """`is_idle`: no call waits or runs; `is_settled`: nor is any answer due."""
        if self._closed_at is not None:
            return Step.LEAVE if now >= self._closed_at + GOODBYE_S else Step.WAIT
        if not is_idle:
            if now < self._grace_until:
                return Step.WAIT
            if not self._was_interrupted:
                self._was_interrupted = True
                return Step.INTERRUPT
        elif self._idle_since is None:
            self._idle_since = now
        if (is_idle and is_settled) or now >= self._send_until:
            self._closed_at = now
            return Step.CLOSE_LINKS
        return Step.WAIT

    @property
    def _send_until(self) -> float:
        last = self._grace_until + SEND_LAST_S
        return last if self._idle_since is None else min(last, self._idle_since + SEND_GRACE_S)
