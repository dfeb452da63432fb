"""One established websocket: read and written without blocking, in the loop's thread."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from atp_sandbox.atp import websocket as codec
from atp_sandbox.atp.handshake import describe
from atp_sandbox.limits import KIB, MAX_REQUEST_BYTES, MIB
from atp_sandbox.loop import READ, WRITE, Loop, Timer

READ_BYTES = 64 * KIB
"""Read at once: some hundreds of small requests, which others have to wait for."""
CHUNK_BYTES = 256 * KIB
"""Encoded at once, and offered to the kernel at once."""
TURN_BYTES = 1 * MIB
"""Written before the loop's other work gets its turn."""
MAX_PONGS_WAITING = 64
"""Pings of a server that does not read their answers; older ones need none (RFC 6455, 5.5.3)."""


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


class Connection:
    """One established websocket. Owns the socket; reports its end once through `on_end`."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        timings: LinkTimings,
        on_message: Callable[[bytes], None],
        on_read: Callable[[int], None],
        on_end: Callable[[str], None],
    ) -> None:
        """`on_read(count)`: the peer has read past the first `count` texts of this connection."""
        self._loop, self._socket, self._timings = loop, sock, timings
        self._on_message, self._on_read, self._on_end = on_message, on_read, on_end
        sock.setblocking(False)
        self._is_tls = isinstance(sock, ssl.SSLSocket)
        self._fd = sock.fileno()
        self._is_open = True
        self._is_closing = False
        self._is_ended = False
        self._is_reported = False
        self._decoder = codec.Decoder(MAX_REQUEST_BYTES)
        self._read_buffer = memoryview(bytearray(READ_BYTES))
        self._watched = 0
        self._flush_is_due = False
        self._is_blocked = False
        self._write_needs_read = self._read_needs_write = False  # TLS may want either for both
        self._waiting: deque[str | bytes] = deque()
        """Texts, and payloads of our pings in their place among them."""
        self._waiting_bytes = 0
        self._texts = 0
        """Given to `send` so far."""
        self._texts_read = 0
        """Those that the peer has read past, as far as we know."""
        self._buffer = memoryview(b"")
        self._position = 0
        self._pings_read: deque[bytes] = deque(maxlen=MAX_PONGS_WAITING)
        self._pongs: deque[bytes] = deque(maxlen=MAX_PONGS_WAITING)
        self._ping: bytes | None = None
        """Payload of the ping whose pong is awaited: the number of texts before it. Empty if all
        of them were confirmed: then it proves nothing but life, as any pong would."""
        self._ping_in_buffer = False
        self._is_paused = False
        self._close_code: int | None = None
        self._progress_at = loop.now()
        self._ping_written_at: float | None = None
        self._pong_timer: Timer | None = None
        self._end_timer: Timer | None = None
        self._ping_timer = loop.call_later(timings.first_ping_s, self._keep_alive)
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
        self._texts += 1
        self._waiting_bytes += len(text)
        self._flush_soon()

    def ping(self) -> None:
        """Ask how far the peer has read: `on_read` follows, unless an earlier ping is still out."""
        if self._ping is not None:
            return
        self._ping = b"" if self._texts == self._texts_read else b"%d" % self._texts
        self._waiting.append(self._ping)
        self._ping_written_at = None
        self._progress_at = self._loop.now()
        self._pong_timer = self._loop.call_later(
            self._timings.pong_deadline_s, self._on_pong_deadline
        )
        self._flush_soon()

    def pause_reading(self, is_paused: bool) -> None:
        """Take nothing more from a peer that takes nothing from us; pongs wait too."""
        if is_paused is not self._is_paused and self._is_open:
            self._is_paused = is_paused
            self._progress_at = self._loop.now()
            self._watch(READ | WRITE if self._is_blocked else READ)
            self._loop.call_soon(lambda: self._on_ready(READ))  # as at the beginning, for TLS

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
        may_read = not self._is_paused and (events & READ or self._read_needs_write)
        if self._is_open and may_read:
            self._read()
        if self._is_open and (events & WRITE or self._write_needs_read):
            self._flush()

    def _read(self) -> None:
        self._read_needs_write = False
        size, is_eof = 0, False
        try:
            while size < READ_BYTES and not is_eof:
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
            self._lose(describe(error))
            return
        if size and not self._is_reported:
            self._take(bytes(self._read_buffer[:size]))
        if is_eof:
            self._lose("the server ended the connection")
        elif self._is_open and size == READ_BYTES and self._is_tls:
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
                    self._pings_read.append(event.data)
                case codec.Pong():
                    self._take_pong(event.data)
                case codec.Close():
                    self._answer_close(event)
            if not self._is_open:
                return
        if self._pings_read:
            # A pong says that we have what came before it: so let that be written down first.
            self._loop.call_soon(self._answer_pings)
        if fault is not None:
            self._end(fault.close_code, f"protocol error of the server: {fault.message}")

    def _answer_pings(self) -> None:
        if not self._is_closing:
            self._pongs.extend(self._pings_read)
            self._flush_soon()
        self._pings_read.clear()

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
            self._loop.call_last(self._flush)

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
                if self._position == len(self._buffer) and self._ping_in_buffer:
                    self._ping_in_buffer = False
                    self._ping_written_at = self._progress_at
        except (BlockingIOError, ssl.SSLWantWriteError):
            pass
        except ssl.SSLWantReadError:
            self._write_needs_read = True
            return
        except OSError as error:
            self._lose(describe(error))
            return
        self._watch(READ | WRITE)

    def _fill(self) -> bool:
        """Encode the next frames, about a chunk of them; False if there are none."""
        due: list[str | bytes] = []
        size = 0
        while self._waiting and size < CHUNK_BYTES and not self._is_ended:
            due.append(self._waiting.popleft())
            if isinstance(due[-1], str):
                size += len(due[-1])
        self._waiting_bytes -= size
        masks = os.urandom(4 * (len(self._pongs) + len(due) + 1))
        frames: list[bytes] = []

        def mask() -> bytes:
            return masks[4 * len(frames) : 4 * len(frames) + 4]

        while self._pongs:
            frames.append(codec.encode_pong(self._pongs.popleft(), mask()))
        for item in due:
            if isinstance(item, str):
                frames.append(codec.encode_text(item, mask()))
            else:
                frames.append(codec.encode_ping(item, mask()))
                self._ping_in_buffer = True
        if self._close_code is not None and (self._is_ended or not self._waiting):
            frames.append(codec.encode_close(self._close_code, "", mask()))
            self._close_code = None
        self._buffer = memoryview(frames[0] if len(frames) == 1 else b"".join(frames))
        self._position = 0
        return bool(frames)

    def _watch(self, events: int) -> None:
        if self._is_paused and not self._write_needs_read:
            events &= ~READ
        if events != self._watched:
            self._watched = events
            if events:
                self._loop.watch(self._fd, events, self._on_ready)
            else:
                self._loop.unwatch(self._fd)

    # --- keeping alive

    def _keep_alive(self) -> None:
        self._ping_timer = self._loop.call_later(self._timings.ping_interval_s, self._keep_alive)
        self.ping()

    def _take_pong(self, payload: bytes) -> None:
        # Acknowledge it now: a peer that does not set TCP_NODELAY holds its next request back
        # until we do, which tcp(7) lets us put off for 40 ms where we have nothing to send.
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if payload == self._ping:
            self._forget_ping()
            self._texts_read = int(payload or self._texts_read)
            self._on_read(self._texts_read)
        elif self._ping_written_at is not None:
            self._ping_written_at = self._loop.now()  # unasked for, but a sign of life

    def _forget_ping(self) -> None:
        self._ping = None
        if self._pong_timer is not None:
            self._pong_timer.cancel()
            self._pong_timer = None

    def _on_pong_deadline(self) -> None:
        # A long answer on a slow line may hold the ping back, and we the pong: then only a
        # standstill counts.
        since = self._progress_at
        if self._ping_written_at is not None and not self._is_paused:
            since = self._ping_written_at
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
        self._waiting.clear()
        self._waiting_bytes = 0
        self._on_end(reason)
