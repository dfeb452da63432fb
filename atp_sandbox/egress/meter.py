"""What a connection moved, for limits and for the log. PURE."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Meter:
    """Counted while a connection lives; whoever relays adds, whoever logs reads."""

    sent_bytes: int = 0
    """From the toolkit towards the host."""
    received_bytes: int = 0
    """From the host towards the toolkit."""
