"""The websocket to the backend: connects, keeps alive, reconnects for ever. A thin shell.

Supervisor side. The loop's thread owns each established socket; only connecting, TLS and the HTTP
handshake (`websocket-client`'s) run in a thread of their own, because they block. The API key is
part of the URL: whatever leaves this module as text has been through `redact`.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import socket
import ssl
import threading
import time
import unicodedata
import urllib.parse
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import websocket

from atp_sandbox import log
from atp_sandbox.atp import websocket as codec
from atp_sandbox.errors import UsageError
from atp_sandbox.limits import KIB, MAX_REQUEST_BYTES, MIB
from atp_sandbox.loop import READ, WRITE, Loop, Timer

CHUNK_BYTES = 256 * KIB
"""Read at once, encoded at once, and offered to the kernel at once."""
TURN_BYTES = 1 * MIB
"""Written before the loop's other work gets its turn."""
MAX_PONGS_WAITING = 64
"""Pings of a server that does not read their answers; older ones need none (RFC 6455, 5.5.3)."""
MAX_RETRY_AFTER_S = 300.0
"""A `Retry-After` of more is not waited for in full."""
_MAX_REASON_CHARS = 200

_PATHS = {"0.1": "/ws/v1/atp/", "0.2": "/ws/v1/atp/toolkit-client/"}


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where the backend is and as whom to connect; UsageError if that cannot be.

    `generation` is the SDK's: `0.1` (0.1.0 and 0.1.1) or `0.2` (all later ones).
    """

    base_url: str
    api_key: str = field(repr=False)
    generation: str = "0.2"

    def __post_init__(self) -> None:
        if not self.api_key:
            raise UsageError("the API key is empty", tip="set the key of this toolkit")
        if _has_control(self.api_key):
            raise UsageError(
                "the API key holds control characters", tip="copy the key again, without line ends"
            )
        example = "write for example https://api.chat-atp.com"
        if _has_control(self.base_url) or re.search(r"[\s?#]", self.base_url):
            raise UsageError(
                "the base URL holds white space, control characters, '?' or '#'", tip=example
            )
        try:
            parts = urllib.parse.urlsplit(self.base_url)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # ValueError where it is no number
        except ValueError as error:
            raise UsageError("the base URL is not valid", cause=str(error), tip=example) from None
        if not is_usable:
            raise UsageError("the base URL needs http:// or https:// and a host", tip=example)
        if self.generation not in _PATHS:
            raise UsageError("no such generation of the websocket path", tip="write 0.1 or 0.2")

    def url(self) -> str:
        """The websocket's URL, with the key in it as it is."""
        return self._url_with(self.api_key)

    @property
    def redacted(self) -> str:
        """The URL for logs."""
        shown = re.sub(r"//[^/]*@", "//***@", self._url_with("***"))
        return shown.replace(self.api_key, "***")

    def _url_with(self, key: str) -> str:
        scheme, rest = self.base_url.rstrip("/").split(":", 1)
        ws_scheme = "wss" if scheme.lower() == "https" else "ws"
        return f"{ws_scheme}:{rest}{_PATHS[self.generation]}{key}/"


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def redact(text: str, api_key: str) -> str:
    """`text` without the key, in each of the spellings that libraries give it."""
    quoted = {urllib.parse.quote(api_key, safe=safe) for safe in ("", "/")}
    spellings = {api_key, *quoted, urllib.parse.quote_plus(api_key), json.dumps(api_key)[1:-1]}
    spellings |= {repr(api_key)[1:-1]}
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, "***")
    return text


def parse_retry_after(value: str | None, *, wall_now: float | None = None) -> float | None:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3), at most `MAX_RETRY_AFTER_S`."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    left = moment - (time.time() if wall_now is None else wall_now)
    return min(max(left, 0.0), MAX_RETRY_AFTER_S)


@dataclass(frozen=True, slots=True)
class LinkTimings:
    """All durations of a link, in seconds; other than the defaults only in tests."""

    handshake_s: float = 10.0
    """For each network operation of the handshake; twice that for all of it."""
    first_ping_s: float = 60.0
    ping_interval_s: float = 30.0
    pong_deadline_s: float = 20.0
    close_wait_s: float = 1.0
    """For the peer's half of a close handshake."""
    backoff_first_s: float = 0.5
    backoff_cap_s: float = 30.0
    stable_after_s: float = 10.0
    """A connection that stayed up so long was a good one: the back-off starts anew."""


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
    unsent: tuple[str, ...] = field(default=(), repr=False)
    """Texts given to `send` that the kernel did not take whole, in order."""


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


@dataclass(frozen=True, slots=True)
class _Rejection:
    status: int
    reason: str
    retry_after_s: float | None


class _Handshake:
    """One attempt to connect, in a daemon thread.

    `on_done` is called in the loop, unless abandoned, with the connected socket, the backend's
    rejection or a sentence that says what failed.
    """

    def __init__(
        self,
        loop: Loop,
        address: LinkAddress,
        timeout_s: float,
        on_done: Callable[[socket.socket | _Rejection | str], None],
    ) -> None:
        self._loop, self._address, self._timeout_s = loop, address, timeout_s
        self._on_done = on_done
        self._client = websocket.WebSocket(enable_multithread=False)
        self._lock = threading.Lock()
        self._abandoned = False
        self._result: socket.socket | _Rejection | str = ""
        self._overdue = loop.call_later(2 * timeout_s, self._give_up)
        threading.Thread(target=self._run, name="atp-link-handshake", daemon=True).start()

    def abandon(self) -> None:
        """Let go of it, whatever it has reached. Safe to call again."""
        self._overdue.cancel()
        with self._lock:
            self._abandoned = True
            if isinstance(self._result, socket.socket):
                self._result.close()
            elif isinstance(self._client.sock, socket.socket):
                with suppress(OSError):  # wakes the thread, which then closes it
                    self._client.sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        result = self._connect()
        with self._lock:
            if self._abandoned:
                if isinstance(result, socket.socket):
                    result.close()
                return
            self._result = result
        self._loop.call_from_thread(self._deliver)

    def _connect(self) -> socket.socket | _Rejection | str:
        client = self._client
        try:
            url = self._address.url()
            client.connect(url, timeout=self._timeout_s, redirect_limit=0)  # type: ignore[no-untyped-call]
            assert client.sock is not None
            return client.sock
        except websocket.WebSocketBadStatusException as error:
            headers = error.resp_headers or {}
            retry_after_s = parse_retry_after(headers.get("retry-after"))
            return _Rejection(error.status_code, self._safe(error.status_message), retry_after_s)
        except Exception as error:  # the thread's outer door: each fault is a failed attempt
            if client.status is not None and 300 <= client.status < 400:
                return _Rejection(client.status, "redirects are not followed", None)
            return self._safe(_describe(error))

    def _safe(self, text: str | None) -> str:
        return redact(text or "", self._address.api_key)[:_MAX_REASON_CHARS]

    def _give_up(self) -> None:
        self.abandon()
        self._on_done("the handshake did not end in time")

    def _deliver(self) -> None:
        if not self._abandoned:
            self._overdue.cancel()
            self._on_done(self._result)


def _describe(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"


class _Connection:
    """One established websocket. Owns the socket; reports its end once through `on_end`."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        timings: LinkTimings,
        on_message: Callable[[bytes], None],
        on_end: Callable[[str, tuple[str, ...]], None],
    ) -> None:
        self._loop, self._socket, self._timings = loop, sock, timings
        self._on_message, self._on_end = on_message, on_end
        sock.setblocking(False)
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._fd = sock.fileno()
        self._is_open = True
        self._is_closing = False
        self._is_ended = False
        self._is_reported = False
        self._decoder = codec.Decoder(MAX_REQUEST_BYTES)
        self._read_buffer = memoryview(bytearray(CHUNK_BYTES))
        self._watched = 0
        self._flush_is_due = False
        self._is_blocked = False
        self._write_needs_read = self._read_needs_write = False  # TLS may want either for both
        self._waiting: deque[str] = deque()
        self._waiting_bytes = 0
        self._writing: deque[tuple[int, str]] = deque()
        """Texts in the buffer, each with the offset where its frame ends."""
        self._buffer = memoryview(b"")
        self._position = 0
        self._pongs: deque[bytes] = deque(maxlen=MAX_PONGS_WAITING)
        self._ping_is_due = self._ping_in_buffer = False
        self._close_code: int | None = None
        self._progress_at = loop.now()
        self._ping_written_at: float | None = None
        self._pong_timer: Timer | None = None
        self._end_timer: Timer | None = None
        self._ping_timer = loop.call_later(timings.first_ping_s, self._ping)
        self._watch(READ)
        # With TLS the first frames may be decrypted already; no descriptor tells of those.
        loop.call_soon(lambda: self._on_ready(READ))

    @property
    def unsent_bytes(self) -> int:
        return self._waiting_bytes + len(self._buffer) - self._position

    def send(self, text: str) -> None:
        if not text.isascii():
            text.encode()  # UnicodeEncodeError here and not at the flush
        self._waiting.append(text)
        self._waiting_bytes += len(text)
        self._flush_soon()

    def close(self, code: int) -> None:
        """Begin our close handshake: what was sent, then the close frame, then a short wait."""
        self._is_closing = True
        self._close_code = code
        self._ping_timer.cancel()
        self._end_timer = self._loop.call_later(
            self._timings.close_wait_s, lambda: self._lose("closed")
        )
        self._flush()

    # --- reading

    def _on_ready(self, events: int) -> None:
        if self._is_open and (events & READ or self._read_needs_write):
            self._read()
        if self._is_open and (events & WRITE or self._write_needs_read):
            self._flush()

    def _read(self) -> None:
        self._read_needs_write = False
        size, is_eof = 0, False
        try:
            while size < CHUNK_BYTES and not is_eof:
                received = self._socket.recv_into(self._read_buffer[size:])
                size += received
                is_eof = not received
                if not self._is_tls:
                    break  # level-triggered: the rest is announced again
        except (BlockingIOError, ssl.SSLWantReadError):
            pass
        except ssl.SSLWantWriteError:
            self._read_needs_write = True
            self._watch(READ | WRITE)
        except OSError as error:
            self._lose(_describe(error))
            return
        if size and not self._is_reported:
            self._take(bytes(self._read_buffer[:size]))
        if is_eof:
            self._lose("the server ended the connection")
        elif self._is_open and size == CHUNK_BYTES and self._is_tls:
            self._loop.call_soon(lambda: self._on_ready(READ))

    def _take(self, data: bytes) -> None:
        fault: codec.ProtocolError | None = None
        try:
            events = self._decoder.feed(data)
        except codec.ProtocolError as error:
            fault, events = error, error.events
        for event in events:
            match event:
                case codec.Message():
                    if not self._is_closing:
                        self._on_message(event.data)
                case codec.Ping() if not self._is_closing:
                    self._pongs.append(event.data)
                    self._flush_soon()
                case codec.Pong():
                    self._forget_ping()
                case codec.Close():
                    self._answer_close(event)
            if not self._is_open:
                return
        if fault is not None:
            self._end(fault.close_code, f"protocol error of the server: {fault.message}")

    def _answer_close(self, event: codec.Close) -> None:
        if self._is_closing:
            self._lose("closed")
        else:
            code = "without a code" if event.code is None else f"with code {event.code}"
            reason = f": {event.reason}" if event.reason else ""
            self._end(codec.NORMAL_CLOSURE, f"the server closed {code}{reason}")

    # --- writing

    def _flush_soon(self) -> None:
        if not self._flush_is_due and not self._is_blocked:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = self._write_needs_read = False
        if not self._is_open:
            return
        self._is_blocked = True
        written = 0
        try:
            while written < TURN_BYTES:
                if self._position == len(self._buffer) and not self._fill():
                    self._is_blocked = False
                    self._watch(READ | WRITE if self._read_needs_write else READ)
                    return
                # Never a shorter piece than before at the same place: OpenSSL would refuse it.
                sent = self._socket.send(self._buffer[self._position :][:CHUNK_BYTES])
                written += sent
                self._position += sent
                self._progress_at = self._loop.now()
                if self._position == len(self._buffer):
                    self._writing.clear()
                    if self._ping_in_buffer:
                        self._ping_in_buffer = False
                        self._ping_written_at = self._progress_at
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLWantReadError:
            self._write_needs_read = True
            return
        except OSError as error:
            self._lose(_describe(error))
            return
        self._watch(READ | WRITE)

    def _fill(self) -> bool:
        """Encode the next frames, about a chunk of them; False if there are none."""
        texts: list[str] = []
        size = 0
        while self._waiting and size < CHUNK_BYTES and not self._is_ended:
            texts.append(self._waiting.popleft())
            size += len(texts[-1])
        self._waiting_bytes -= size
        masks = os.urandom(4 * (len(self._pongs) + len(texts) + 2))
        frames: list[bytes] = []

        def mask() -> bytes:
            return masks[4 * len(frames) : 4 * len(frames) + 4]

        while self._pongs:
            frames.append(codec.encode_pong(self._pongs.popleft(), mask()))
        if self._ping_is_due:
            self._ping_is_due, self._ping_in_buffer = False, True
            frames.append(codec.encode_ping(b"", mask()))
        end = sum(map(len, frames))
        for text in texts:
            frames.append(codec.encode_text(text, mask()))
            end += len(frames[-1])
            self._writing.append((end, text))
        if self._close_code is not None and (self._is_ended or not self._waiting):
            frames.append(codec.encode_close(self._close_code, "", mask()))
            self._close_code = None
        self._buffer = memoryview(frames[0] if len(frames) == 1 else b"".join(frames))
        self._position = 0
        return bool(frames)

    def _watch(self, events: int) -> None:
        if events != self._watched:
            self._watched = events
            self._loop.watch(self._fd, events, self._on_ready)

    # --- keeping alive

    def _ping(self) -> None:
        self._ping_timer = self._loop.call_later(self._timings.ping_interval_s, self._ping)
        if self._pong_timer is None:
            self._ping_is_due = True
            self._ping_written_at = None
            self._progress_at = self._loop.now()
            self._pong_timer = self._loop.call_later(
                self._timings.pong_deadline_s, self._on_pong_deadline
            )
            self._flush_soon()

    def _forget_ping(self) -> None:
        if self._pong_timer is not None:
            self._pong_timer.cancel()
            self._pong_timer = None

    def _on_pong_deadline(self) -> None:
        # A long answer on a slow line may hold the ping back: then only a standstill counts.
        since = self._progress_at if self._ping_written_at is None else self._ping_written_at
        deadline = since + self._timings.pong_deadline_s
        if deadline > self._loop.now():
            self._pong_timer = self._loop.call_at(deadline, self._on_pong_deadline)
        else:
            self._lose(f"no pong within {self._timings.pong_deadline_s:g} s")

    # --- ending

    def _end(self, code: int, reason: str) -> None:
        """Answer with a close frame, report, and wait a little for the peer to hang up."""
        if self._is_closing:
            self._lose("closed")
            return
        self._is_closing = self._is_ended = True
        self._close_code = code
        self._flush()
        if self._is_open and self._position < len(self._buffer):
            self._lose(reason)  # it does not read: the close frame would never arrive
            return
        self._report(reason)
        if self._is_open:
            self._end_timer = self._loop.call_later(
                self._timings.close_wait_s, lambda: self._lose(reason)
            )

    def drop(self) -> None:
        """Close the socket now."""
        self._lose("dropped")

    def _lose(self, reason: str) -> None:
        if self._is_open:
            self._is_open = False
            self._loop.unwatch(self._fd)
            self._socket.close()
            self._ping_timer.cancel()
            self._forget_ping()
            if self._end_timer is not None:
                self._end_timer.cancel()
        self._report(reason)

    def _report(self, reason: str) -> None:
        if self._is_reported:
            return
        self._is_reported = True
        self._ping_timer.cancel()
        self._forget_ping()
        unsent = [text for end, text in self._writing if end > self._position]
        unsent += self._waiting
        self._waiting.clear()
        self._waiting_bytes = 0
        self._on_end(reason, tuple(unsent))


class Link:
    """The connection to one backend as one toolkit; to be used in the loop's thread only.

    What is to be sent while there is no connection stays with the owner: `send` needs
    `connected`, and `Disconnected.unsent` gives back what did not get out. Registering again
    after a reconnect is nobody's task.
    """

    def __init__(
        self,
        loop: Loop,
        address: LinkAddress,
        *,
        on_message: Callable[[bytes], None],
        on_state: Callable[[LinkEvent], None],
        timings: LinkTimings | None = None,
        jitter: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._loop, self._address = loop, address
        self._on_message, self._on_state = on_message, on_state
        self._timings = timings or LinkTimings()
        self._jitter = jitter
        self._handshake: _Handshake | None = None
        self._connection: _Connection | None = None
        self._lingering: _Connection | None = None
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
            self._on_end("closed", ())
        else:
            self._connection.close(code)

    def _connect(self) -> None:
        self._retry_timer = None
        url = self._address.redacted
        log.emit(log.INFO, "link_connecting", "connecting to the backend", url=url)
        self._handshake = _Handshake(
            self._loop, self._address, self._timings.handshake_s, self._on_handshake_done
        )
        self._on_state(Connecting())

    def _on_handshake_done(self, result: socket.socket | _Rejection | str) -> None:
        self._handshake = None
        if isinstance(result, _Rejection):
            self._on_rejected(result)
        elif isinstance(result, str):
            self._on_end(result, ())
        else:
            self._drop_lingering()
            self._was_ever_connected = True
            self._connected_at = self._loop.now()
            self._connection = _Connection(
                self._loop, result, self._timings, self._on_message, self._on_end
            )
            url = self._address.redacted
            log.emit(log.INFO, "link_connected", "connected to the backend", url=url)
            self._on_state(Connected())

    def _on_rejected(self, rejection: _Rejection) -> None:
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

    def _on_end(self, reason: str, unsent: tuple[str, ...]) -> None:
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
            unsent=len(unsent),
        )
        self._on_state(Disconnected(reason, retry_in_s, unsent))

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
