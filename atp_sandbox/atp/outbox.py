"""Answers on their way to one backend: waiting, then written, then confirmed.

PURE: time is an argument. ATP has no acknowledgement, but websockets have pings: whoever answers
one that was written after a text has read past that text (RFC 6455, section 5.5.3). What no pong
has confirmed when a connection ends is written again over the next, byte for byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from atp_sandbox.atp.record import Record, Stage
from atp_sandbox.limits import MIB

MAX_OUTBOX_BYTES = 32 * MIB
"""Texts that wait or are unconfirmed, together: 32 results of the default largest size."""
MAX_OUTBOX_TEXTS = 65_536
"""Their number: what 20 s without a pong, after which a connection is given up, can bring."""
MAX_OUTBOX_AGE_S = 3_600.0
"""An answer that found no way for so long has nobody who waits for it."""


@dataclass(slots=True, eq=False)
class Message:
    """One text; `record` is None for what answers no call of ours, such as a rejection."""

    text: str = field(repr=False)
    record: Record | None
    since: float


class Outbox:
    """Texts are ASCII, so that their length is their size in bytes."""

    def __init__(self, on_settled: Callable[[Record], None]) -> None:
        """`on_settled` is told of each call whose answer is confirmed or given up."""
        self._on_settled = on_settled
        self._waiting: deque[Message] = deque()
        self._written: deque[Message] = deque()
        self._confirmed = 0
        """Texts of the present connection that the peer has read past."""
        self.size_bytes = 0
        """Of all that waits or is unconfirmed."""
        self.waiting_bytes = 0
        self.given_up = 0
        """Texts that were dropped unconfirmed, for their age or for want of room."""

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def unconfirmed(self) -> int:
        """Texts that were taken to be written and not confirmed."""
        return len(self._written)

    def has_room_for(self, size_bytes: int) -> bool:
        """Whether a text can be taken in; those that were written at least once make room."""
        return self.waiting_bytes + size_bytes <= MAX_OUTBOX_BYTES

    def add(self, text: str, record: Record | None, now: float) -> None:
        if record is not None:
            record.is_waiting = True
        self._waiting.append(Message(text, record, now))
        self.size_bytes += len(text)
        self.waiting_bytes += len(text)
        while self._written and (
            self.size_bytes > MAX_OUTBOX_BYTES
            or len(self._waiting) + len(self._written) > MAX_OUTBOX_TEXTS
        ):
            # It was written once; what is given up is only the proof that it was read.
            self._confirmed += 1
            self.given_up += 1
            self._settle(self._written.popleft())

    def take(self, max_bytes: int, now: float) -> list[str]:
        """The oldest texts, of together at most `max_bytes`; one at least, however long."""
        taken: list[str] = []
        left = max_bytes
        while self._waiting and (not taken or len(self._waiting[0].text) <= left):
            message = self._waiting.popleft()
            self.waiting_bytes -= len(message.text)
            if message.record is not None:
                message.record.is_waiting = False
            if now - message.since > MAX_OUTBOX_AGE_S:
                self.given_up += 1
                self._settle(message)
                continue
            left -= len(message.text)
            self._written.append(message)
            taken.append(message.text)
        return taken

    def confirm(self, count: int) -> None:
        """The peer has read the first `count` texts of this connection."""
        while self._confirmed < count and self._written:
            self._confirmed += 1
            self._settle(self._written.popleft())

    def connection_ended(self) -> None:
        """What is unconfirmed waits again, in order and before all others, one copy each."""
        self._confirmed = 0
        if not self._written:
            return
        due: dict[int, Message] = {}
        for message in self._written:
            if message.record is None or message.record.stage is not Stage.CONFIRMED:
                due.setdefault(id(message.record or message), message)
        for message in self._waiting:
            # Not in place of what was written: behind later ones it might never be confirmed.
            due.setdefault(id(message.record or message), message)
        self._written.clear()
        self._waiting = deque(due.values())
        self.size_bytes = self.waiting_bytes = sum(len(message.text) for message in self._waiting)
        for message in self._waiting:
            if message.record is not None:
                message.record.is_waiting = True

    def _settle(self, message: Message) -> None:
        self.size_bytes -= len(message.text)
        record = message.record
        if record is not None and record.stage is Stage.ANSWERED:
            record.stage = Stage.CONFIRMED
            self._on_settled(record)
