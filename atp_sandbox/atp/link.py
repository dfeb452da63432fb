"""The websocket to the backend: connects, keeps alive, reconnects for ever. A thin shell.

Supervisor side. Only connecting, TLS and the HTTP handshake run in a thread (`handshake`); an
established socket belongs to the loop (`connection`).
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from dataclasses import dataclass

from atp_sandbox import log
from atp_sandbox.atp import websocket as codec
from atp_sandbox.atp.address import LinkAddress, redact
from atp_sandbox.atp.connection import Connection, LinkTimings
from atp_sandbox.atp.handshake import Handshake, Rejection
from atp_sandbox.loop import Loop, Timer


@dataclass(frozen=True, slots=True)
class Connecting:
    """An attempt begins."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The handshake succeeded; `send` may be called."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A connection ended or could not be made. `retry_in_s` is None after `close` only."""

    reason: str
    retry_in_s: float | None


@dataclass(frozen=True, slots=True)
class Refused:
    """The handshake was answered with another HTTP status than 101.

    `first`: a 401 or 403 before any connection succeeded; the link has given up.
    """

    status: int
    reason: str
    first: bool
    retry_in_s: float | None


LinkEvent = Connecting | Connected | Disconnected | Refused


class Link:
    """The connection to one backend as one toolkit; to be used in the loop's thread only.

    What is to be sent while there is no connection stays with the owner: `send` needs `connected`.
    So does what was sent, until `on_read` tells that the peer has read past it. Registering again
    after a reconnect is nobody's task.
    """

    def __init__(
        self,
        loop: Loop,
        address: LinkAddress,
        *,
        on_message: Callable[[bytes], None],
        on_state: Callable[[LinkEvent], None],
        on_read: Callable[[int], None] = lambda count: None,
        timings: LinkTimings | None = None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._loop, self._address = loop, address
        self._on_message, self._on_state, self._on_read = on_message, on_state, on_read
        self._timings = timings or LinkTimings()
        self._jitter = jitter
        self._handshake: Handshake | None = None
        self._connection: Connection | None = None
        self._lingering: Connection | None = None
        """The one before, while it waits for the peer to hang up."""
        self._retry_timer: Timer | None = None
        self._connected_at = 0.0
        self._was_ever_connected = False
        self._failures = 0
        self._is_closing = False
        self._is_closed = False

    @property
    def connected(self) -> bool:
        return self._connection is not None and not self._is_closing

    @property
    def closed(self) -> bool:
        """Ended for good: after `close`, or after a first 401 or 403."""
        return self._is_closed

    @property
    def unsent_bytes(self) -> int:
        """Bytes given to `send` that the kernel has not taken yet."""
        return 0 if self._connection is None else self._connection.unsent_bytes

    def start(self) -> None:
        """Begin to connect; returns at once. To be called once."""
        self._connect()

    def send(self, text: str) -> None:
        """Queue one text message; never blocks. RuntimeError without a connection."""
        if self._connection is None or self._is_closing:
            raise RuntimeError("the link is not connected")
        self._connection.send(text)

    def ping(self) -> None:
        """Ask how far the peer has read; `on_read` tells, by the texts of this connection."""
        if self._connection is not None:
            self._connection.ping()

    def pause_reading(self, is_paused: bool) -> None:
        """Take no more messages from this connection, or go on."""
        if self._connection is not None:
            self._connection.pause_reading(is_paused)

    def close(self, code: int = codec.NORMAL_CLOSURE) -> None:
        """End for good: what is queued, a close frame, at most a second's wait. Safe to repeat.

        Ends with one `Disconnected`, at once where there is no connection. Messages that arrive
        meanwhile are not delivered.
        """
        if self._is_closing or self._is_closed:
            return
        self._is_closing = True
        self._drop_lingering()
        if self._retry_timer is not None:
            self._retry_timer.cancel()
        if self._handshake is not None:
            self._handshake.abandon()
            self._handshake = None
        if self._connection is None:
            self._on_end("closed")
        else:
            self._connection.close(code)

    def _connect(self) -> None:
        self._retry_timer = None
        url = self._address.redacted
        log.emit(log.INFO, "link_connecting", "connecting to the backend", url=url)
        self._handshake = Handshake(
            self._loop, self._address, self._timings.handshake_s, self._on_handshake_done
        )
        self._on_state(Connecting())

    def _on_handshake_done(self, result: socket.socket | Rejection | str) -> None:
        self._handshake = None
        if isinstance(result, Rejection):
            self._on_rejected(result)
        elif isinstance(result, str):
            self._on_end(result)
        else:
            self._drop_lingering()
            self._was_ever_connected = True
            self._connected_at = self._loop.now()
            self._connection = Connection(
                self._loop,
                result,
                self._timings,
                self._on_message,
                self._on_read,
                self._on_end,
            )
            url = self._address.redacted
            log.emit(log.INFO, "link_connected", "connected to the backend", url=url)
            self._on_state(Connected())

    def _on_rejected(self, rejection: Rejection) -> None:
        is_denied = rejection.status in (401, 403)
        is_first = is_denied and not self._was_ever_connected
        retry_in_s: float | None = None
        if is_first:
            self._is_closed = True
        else:
            # Refused after it once worked: a key was withdrawn or a deployment is broken.
            is_hopeless = self._was_ever_connected and (is_denied or rejection.status == 404)
            at_least_s = rejection.retry_after_s if rejection.status in (429, 503) else None
            retry_in_s = self._retry(is_hopeless, at_least_s or 0.0)
        log.emit(
            log.ERROR if is_denied else log.WARNING,
            "link_refused",
            "the backend refused the connection",
            url=self._address.redacted,
            status=rejection.status,
            reason=rejection.reason,
            retry_in_s=retry_in_s,
        )
        self._on_state(Refused(rejection.status, rejection.reason, is_first, retry_in_s))

    def _on_end(self, reason: str) -> None:
        reason = redact(reason, self._address.api_key)
        was_up = self._connection is not None
        self._lingering, self._connection = self._connection, None
        retry_in_s: float | None = None
        if self._is_closing:
            self._is_closed = True
        else:
            if was_up and self._loop.now() - self._connected_at >= self._timings.stable_after_s:
                self._failures = 0
            retry_in_s = self._retry()
        log.emit(
            log.INFO if self._is_closing else log.WARNING,
            "link_lost",
            "the connection to the backend ended" if was_up else "no connection to the backend",
            url=self._address.redacted,
            reason=reason,
            retry_in_s=retry_in_s,
        )
        self._on_state(Disconnected(reason, retry_in_s))

    def _drop_lingering(self) -> None:
        if self._lingering is not None:
            self._lingering.drop()
            self._lingering = None

    def _retry(self, at_the_cap: bool = False, at_least_s: float = 0.0) -> float:
        """Connect again after the next back-off; gives its length."""
        longest_s = self._timings.backoff_cap_s
        if not at_the_cap:
            doubled_s = self._timings.backoff_first_s * 2.0 ** min(self._failures, 32)
            longest_s = min(longest_s, doubled_s)
        self._failures += 1
        # From the upper half: a run of tiny draws would climb to the cap while it hammers.
        delay_s = max(self._jitter(longest_s / 2, longest_s), at_least_s)
        self._retry_timer = self._loop.call_later(delay_s, self._connect)
        return delay_s
