"""How many lines may be told in how much time: a token bucket. PURE, time is an argument."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Budget:
    """`at_once` from the start, then `a_second`; times a number of shares (`widen`)."""

    at_once: float
    a_second: float
    dropped: int = 0
    """Refused since somebody last set it to 0."""
    _left: float = field(init=False)
    _at: float = 0.0
    _shares: int = 1

    def __post_init__(self) -> None:
        self._left = self.at_once

    def widen(self, shares: int) -> None:
        """So many, from now on; never fewer than before."""
        if shares > self._shares:
            self._left += (shares - self._shares) * self.at_once
            self._shares = shares

    def take(self, now: float) -> bool:
        """Whether one more may be told."""
        grown = self._left + (now - self._at) * self.a_second * self._shares
        self._left, self._at = min(self.at_once * self._shares, grown), now
        if self._left < 1:
            self.dropped += 1
            return False
        self._left -= 1
        return True
