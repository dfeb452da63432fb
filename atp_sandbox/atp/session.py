"""Which requests of one link run, which were asked twice, and which answers still have to go out.

PURE: time is an argument. ATP has no acknowledgement and names a call only by its `request_id`;
a backend that lost a connection may ask again, and a tool with side effects must not run twice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.atp.outbox import MAX_OUTBOX_AGE_S, Outbox
from atp_sandbox.atp.record import Record, Stage
from atp_sandbox.limits import MIB

MAX_REMEMBERED = 32_768
"""Answered requests that are known again; a hundred bytes or two each."""
MAX_REMEMBERED_AGE_S = 600.0
"""Longer than any reasonable wait of a caller; an id seen again later is taken for a new call."""
MAX_KEPT_ANSWERS = 4_096
"""Confirmed answers kept for asking again: at 100 calls a second, those of the last 40 s."""
MAX_KEPT_BYTES = 32 * MIB
"""Their texts together."""
MAX_UNWRITTEN = 256
"""Confirmations that wait for something else to be written."""
_LOOK_S = 1.0
_DIGEST_BYTES = 16
"""Keyed, so that nobody outside can aim at a collision."""


@dataclass(frozen=True, slots=True)
class Start:
    """A new call; `key` names it until `Session.answered`."""

    key: int


@dataclass(frozen=True, slots=True)
class Running:
    """Asked again while its one answer is still to be made or to be written: nothing to do."""


@dataclass(frozen=True, slots=True)
class Resend:
    """Asked again after its answer went out: the session has put it into the outbox once more."""


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Asked again so late that its answer is kept no longer; it must not run all the same."""


class Session:
    """One link's calls and outbox. It outlives connections and, by the journal, the process."""

    def __init__(self, secret: bytes) -> None:
        """`secret`: random bytes, at most 64, the same in every process that serves this link."""
        self._keyed = hashlib.blake2b(key=secret, digest_size=_DIGEST_BYTES)
        self._next_key = 1
        self._running: dict[bytes, Record] = {}
        self._by_key: dict[int, Record] = {}
        """Those that run."""
        self._answered: OrderedDict[bytes, Record] = OrderedDict()
        self._kept: OrderedDict[bytes, Record] = OrderedDict()
        """Those of the answered that are confirmed and have their text still."""
        self._kept_bytes = 0
        self.outbox = Outbox(self._settled)
        self._changed: dict[int, Record] = {}
        self._confirmed: dict[int, Record] = {}
        self._forgotten: list[int] = []
        self._look_at = 0.0
        """When to look for what is too old to be remembered."""

    @property
    def in_flight(self) -> int:
        """Calls started and not answered."""
        return len(self._running)

    # -- a call's way ------------------------------------------------------------------------------

    def receive(self, request: ToolRequest, now: float) -> Start | Running | Resend | Forgotten:
        """Whether `request` is a new call. The same id with other content is."""
        self._forget_old(now)
        identity = self._identity(request)
        if identity in self._running:
            return Running()
        record = self._answered.get(identity)
        if record is None:
            record = Record(
                self._next_key, identity, request.request_id_json, request.tool, Stage.ACCEPTED, now
            )
            self._next_key += 1
            self._running[identity] = self._by_key[record.key] = record
            self._changed[record.key] = record
            return Start(record.key)
        if record.is_waiting:
            return Running()
        if record.text is None:
            return Forgotten()
        self.outbox.add(record.text, record, now)
        return Resend()

    def started(self, key: int) -> None:
        """The call is about to be given to a worker. KeyError if it is not in flight."""
        record = self._by_key[key]
        record.stage = Stage.STARTED
        self._changed[key] = record

    def answered(self, key: int, text: str, now: float) -> None:
        """The call `key` ended: `text` goes to the outbox. KeyError if it is not in flight."""
        record = self._by_key.pop(key)
        del self._running[record.identity]
        record.stage, record.since, record.text = Stage.ANSWERED, now, text
        record.request_id_json = record.tool = ""
        self._answered[record.identity] = record
        self._changed[key] = record
        self.outbox.add(text, record, now)
        self._forget_old(now)

    def reject(self, text: str, now: float) -> None:
        """Put a text that answers no call of ours, such as a rejection, into the outbox."""
        self.outbox.add(text, None, now)

    def confirm(self, count: int) -> None:
        """The peer has read past the first `count` texts of this connection."""
        self.outbox.confirm(count)

    # -- what the journal needs --------------------------------------------------------------------

    @property
    def has_changes(self) -> bool:
        """Whether anything changed that is to be written down before it has consequences.

        That an answer was confirmed has none: a successor that does not know it sends the answer
        again. So it is written with what comes next.
        """
        return bool(self._changed or self._forgotten) or len(self._confirmed) >= MAX_UNWRITTEN

    def take_changes(self) -> tuple[list[Record], list[int]]:
        """What changed since the last time, and the keys of what was forgotten meanwhile."""
        changed, forgotten = [*self._confirmed.values(), *self._changed.values()], self._forgotten
        self._changed, self._confirmed, self._forgotten = {}, {}, []
        return changed, forgotten

    def records(self) -> list[Record]:
        """All that is known."""
        return [*self._answered.values(), *self._running.values()]

    def restore(self, record: Record, text: str | None, now: float) -> None:
        """Take over what a predecessor knew; `text` is what is still to be sent for it, if any.

        In the order of their keys, and before anything is received.
        """
        self._next_key = max(self._next_key, record.key + 1)
        record.since = min(record.since, now)  # the clock starts anew when the machine does
        age_s = now - record.since
        if age_s > (MAX_REMEMBERED_AGE_S if text is None else MAX_OUTBOX_AGE_S):
            self._forgotten.append(record.key)
            return
        self._answered[record.identity] = record
        record.request_id_json = record.tool = ""
        if text is None:
            record.stage = Stage.CONFIRMED
            return
        if record.stage is not Stage.ANSWERED:
            record.stage, record.since = Stage.ANSWERED, now
            self._changed[record.key] = record
        record.text = text
        self.outbox.add(text, record, record.since)

    # -- within ------------------------------------------------------------------------------------

    def _identity(self, request: ToolRequest) -> bytes:
        request_id, tool, params = request.request_id_json, request.tool, request.params_json
        # Lengths first: no two different requests may give the same bytes.
        sizes = f"({len(request_id)}, {len(tool)}, {len(params)})"
        whole = f"{sizes}{request_id}{tool}{params}{request.auth_token_json or ''}"
        digest = self._keyed.copy()
        digest.update(whole.encode("utf-8", "surrogatepass"))
        return digest.digest()

    def _settled(self, record: Record) -> None:
        """Its text is kept for whoever asks again, as long as there is room."""
        assert record.text is not None
        self._changed.pop(record.key, None)
        self._confirmed[record.key] = record
        self._kept[record.identity] = record
        self._kept_bytes += len(record.text)
        while len(self._kept) > MAX_KEPT_ANSWERS or self._kept_bytes > MAX_KEPT_BYTES:
            self._drop_text(next(iter(self._kept.values())))

    def _drop_text(self, record: Record) -> None:
        if self._kept.pop(record.identity, None) is not None:
            assert record.text is not None
            self._kept_bytes -= len(record.text)
        record.text = None

    def _forget_old(self, now: float) -> None:
        if now < self._look_at and len(self._answered) <= MAX_REMEMBERED:
            return
        self._look_at = now + _LOOK_S
        while self._answered:
            record = next(iter(self._answered.values()))
            is_recent = now - record.since <= MAX_REMEMBERED_AGE_S
            if record.stage is Stage.ANSWERED or (
                is_recent and len(self._answered) <= MAX_REMEMBERED
            ):
                return
            del self._answered[record.identity]
            self._drop_text(record)
            self._forgotten.append(record.key)
            self._changed.pop(record.key, None)
            self._confirmed.pop(record.key, None)
