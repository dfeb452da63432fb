"""Which requests of one link run, which were asked twice, and which answers still have to go out.

PURE: time is an argument. ATP has no acknowledgement and names a call only by its `request_id`;
a backend that lost a connection may ask again, and a tool with side effects must not run twice.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.limits import MIB

MAX_RECENT_ANSWERS = 4_096
"""Answers kept for asking again: at 100 calls a second, those of the last 40 s."""
MAX_RECENT_BYTES = 32 * MIB
"""Their texts together: 32 results of the default largest size."""
MAX_RECENT_AGE_S = 600.0
"""Longer than any reasonable wait of a caller; an id seen again later is taken for a new call."""
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
    """Asked again after its answer went out; the session has put `text` into the outbox."""

    text: str = field(repr=False)


class Session:
    """One link's calls and outbox. It outlives connections, but not the process.

    Texts are ASCII, so that their length is their size in bytes.
    """

    def __init__(self, secret: bytes) -> None:
        """`secret`: 16 random bytes."""
        self._secret = secret
        self._next_key = 1
        self._running: dict[bytes, int] = {}
        self._identities: dict[int, bytes] = {}
        self._recent: OrderedDict[bytes, tuple[float, str]] = OrderedDict()
        self._recent_bytes = 0
        self._outbox: deque[str] = deque()
        self._outbox_bytes = 0

    @property
    def in_flight(self) -> int:
        """Calls started and not answered."""
        return len(self._running)

    @property
    def pending(self) -> int:
        """Texts in the outbox."""
        return len(self._outbox)

    @property
    def pending_bytes(self) -> int:
        return self._outbox_bytes

    def receive(self, request: ToolRequest, now: float) -> Start | Running | Resend:
        """Whether `request` is a new call. The same id with other content is."""
        self._forget_old(now)
        identity = self._identity(request)
        if identity in self._running:
            return Running()
        recent = self._recent.get(identity)
        if recent is None:
            key = self._next_key
            self._next_key += 1
            self._running[identity] = key
            self._identities[key] = identity
            return Start(key)
        text = recent[1]
        if any(text is waiting for waiting in self._outbox):
            return Running()
        self.enqueue(text)
        return Resend(text)

    def answered(self, key: int, text: str, now: float) -> None:
        """The call `key` ended: `text` goes to the outbox. KeyError if it is not in flight."""
        identity = self._identities.pop(key)
        del self._running[identity]
        self.enqueue(text)
        if len(text) <= MAX_RECENT_BYTES:
            self._recent[identity] = (now, text)
            self._recent_bytes += len(text)
            self._forget_old(now)

    def enqueue(self, text: str) -> None:
        """Put a text that answers no call of ours, such as a rejection, into the outbox."""
        self._outbox.append(text)
        self._outbox_bytes += len(text)

    def take(self, max_bytes: int) -> list[str]:
        """The oldest texts, of together at most `max_bytes`; one at least, however long."""
        taken: list[str] = []
        left = max_bytes
        while self._outbox and (not taken or len(self._outbox[0]) <= left):
            text = self._outbox.popleft()
            left -= len(text)
            self._outbox_bytes -= len(text)
            taken.append(text)
        return taken

    def restore(self, texts: Iterable[str]) -> None:
        """Put texts that were taken but not written back, in order, before all others."""
        unwritten = list(texts)
        self._outbox.extendleft(reversed(unwritten))
        self._outbox_bytes += sum(map(len, unwritten))

    def _identity(self, request: ToolRequest) -> bytes:
        digest = hashlib.blake2b(key=self._secret, digest_size=_DIGEST_BYTES)
        # Lengths first: no two different requests may give the same bytes.
        sizes = (len(request.request_id_json), len(request.tool), len(request.params_json))
        head = f"{sizes}{request.request_id_json}{request.tool}"
        digest.update(head.encode("utf-8", "surrogatepass"))
        digest.update(request.params_json.encode("ascii"))
        digest.update((request.auth_token_json or "").encode("ascii"))
        return digest.digest()

    def _forget_old(self, now: float) -> None:
        while self._recent:
            answered_at, text = next(iter(self._recent.values()))
            if (
                now - answered_at <= MAX_RECENT_AGE_S
                and len(self._recent) <= MAX_RECENT_ANSWERS
                and self._recent_bytes <= MAX_RECENT_BYTES
            ):
                return
            self._recent.popitem(last=False)
            self._recent_bytes -= len(text)
