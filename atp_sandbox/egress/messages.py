"""What supervisor and egress process say to each other, in the framing of `workers.frames`. PURE.

supervisor → egress     open, close, fill, forget
egress → supervisor     ready, refused, opened, connection
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Final

from workers.frames import BYTES, INT, NONE, STR, FrameError, Message

MAX_ORDER_BYTES = 1024 * 1024
"""A policy of 500 hosts is below 200 KiB."""
MAX_REPORT_BYTES = 4 * 1024
"""A line of a connection is below 1 KiB."""

TO_EGRESS: Final = {
    "open": (INT, STR, BYTES, BYTES, BYTES, BYTES),
    # jail, its toolkit's name, policy as JSON, key of its tickets, certificate and key (PEM) of the
    # authority that it trusts, or nothing; with it a socket for each port
    "close": (INT,),  # jail: end its connections, forget it
    "fill": (INT, STR, STR, BYTES),  # jail, provider, placeholder, the token it stands for
    "forget": (INT, STR),  # jail, placeholder: its call has ended
}
FROM_EGRESS: Final = {
    "ready": (),  # confined, from here on with nothing but sockets
    "refused": (STR, STR),  # step of its confinement, what was refused
    "opened": (INT,),  # jail: it accepts
    "connection": (INT, INT, STR, (NONE, INT), STR, INT, INT, INT, STR, STR),
    # jail, worker (see Who), host, port, address, bytes sent, received, ms, verdict, reason
}

UNKNOWN_WORKER = -1
"""Nobody's ticket, or the import's."""
ANY_WORKER = 0
"""No ticket is asked where the address says what is meant: any worker of the jail."""

MAX_HOST_CHARS, MAX_ADDRESS_CHARS, MAX_REASON_CHARS = 253, 64, 300

ALLOWED, DENIED, FAILED = "allowed", "denied", "failed"
"""Verdicts: let through; against the policy; allowed, but it came to nothing."""
VERDICTS = frozenset({ALLOWED, DENIED, FAILED})


@dataclass(frozen=True, slots=True)
class ConnectionLine:
    """What is told of one connection; its texts are printable ASCII, so that they may be shown."""

    jail: int
    worker: int
    host: str
    port: int | None
    address: str
    sent_bytes: int
    received_bytes: int
    ms: int
    verdict: str
    reason: str


def read_connection(message: Message) -> ConnectionLine:
    """The line of a `connection` message; FrameError if it holds what none can."""
    line = ConnectionLine(*message[1:])
    texts = (
        (line.host, MAX_HOST_CHARS),
        (line.address, MAX_ADDRESS_CHARS),
        (line.reason, MAX_REASON_CHARS),
    )
    if any(
        len(text) > most or not text.isascii() or (text and not text.isprintable())
        for text, most in texts
    ):
        raise FrameError("connection: a text that is none of ours")
    numbers = (line.sent_bytes, line.received_bytes, line.ms)
    if min(numbers) < 0 or (line.port is not None and not 0 < line.port < 65_536):
        raise FrameError("connection: a number that cannot be")
    if line.verdict not in VERDICTS or line.worker < UNKNOWN_WORKER:
        raise FrameError("connection: an unknown verdict or worker")
    return line


def ticket(key: bytes, worker: int) -> str:
    """By which connections of worker number `worker` are known: 32 hex digits."""
    return hashlib.blake2b(worker.to_bytes(8, "big"), digest_size=16, key=key).hexdigest()


def worker_of(key: bytes, name: str, given: str) -> int | None:
    """The worker called `name` (`worker-7`) if it shows its ticket, `given`; None: nobody.

    0 is the import.
    """
    kind, _, number = name.partition("-")
    if kind != "worker" or not number.isascii() or not number.isdigit() or len(number) > 18:
        return None
    expected = ticket(key, int(number))
    return int(number) if hmac.compare_digest(expected.encode(), given.encode()) else None
