"""What is remembered of one request, in memory and in the journal. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Stage(IntEnum):
    """How far a call has come. The numbers stand in the journal."""

    ACCEPTED = 0
    STARTED = 1
    """It was given to a worker: from here on it may have run."""
    ANSWERED = 2
    CONFIRMED = 3
    """The peer has read past its answer, or it was given up."""


@dataclass(slots=True, eq=False)
class Record:
    """One call. Neither parameters nor tokens; `text` is its answer, as long as that is kept."""

    key: int
    """Its place in the order of arrival; never used again, also not by a successor."""
    identity: bytes
    """Keyed digest of request id, tool, parameters and token."""
    request_id_json: str
    """Empty once it is answered, as `tool` is: only an answer needs them, and they may be long."""
    tool: str
    stage: Stage
    since: float
    """When it came, or was answered: seconds of CLOCK_MONOTONIC, which outlives processes."""
    text: str | None = field(default=None, repr=False)
    is_waiting: bool = False
    """Whether its answer is in the outbox and not yet written."""
