"""What ends a connection that the policy does not allow, or that came to nothing."""

from __future__ import annotations


class Denied(Exception):
    """The policy refuses; `reason` is half a sentence that holds nothing of what was sent."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Failed(Exception):
    """Allowed, but the host could not be reached; `reason` as above."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
