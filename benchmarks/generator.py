"""The backend's side of a fast benchmark: registrations by POST, then load over one websocket.

One raw non-blocking socket with batched reads and writes, so that it costs a few microseconds a
call; `benchmarks.faults` wants every kind of broken connection instead and has `wire.py`. Each
answer is compared with what is due.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import queue
import re
import select
import socket
import threading
import time
from collections.abc import Callable

from benchmarks.loads import ANSWER_HEAD, CLOSE, ID_END, PING, PONG, TEXT, Load, frame, unmasked
from benchmarks.measured import Measured

SILENCE_S = 60.0
"""After so long without a byte the peer is taken for broken."""
IDLE_S = 1.0
"""How often a link without load is looked at for pings."""
READ_BYTES = 1 << 20
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class WrongAnswer(Exception):
    """An answer is not the one that was due; nothing measured counts then."""


class PeerGone(Exception):
    """The system under test closed its connection, fell silent, or never came."""


class Generator:
    """Listens; then owns the newest websocket that a peer opened."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._links: queue.SimpleQueue[socket.socket] = queue.SimpleQueue()
        self._socket: socket.socket | None = None
        self._poll = select.epoll()
        self._unread = b""
        self._unsent = bytearray()
        self._last_id = 0
        self._busy = threading.Lock()
        """Held by whoever reads and writes the websocket: a measurement, or the idle look."""
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._idle, daemon=True).start()

    def wait_for_link(self, timeout_s: float, is_alive: Callable[[], bool]) -> None:
        """Until the peer has opened a websocket."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                link = self._links.get(timeout=0.2)
                break
            except queue.Empty:
                if not is_alive() or time.monotonic() > deadline:
                    raise PeerGone("the system under test never connected") from None
        with self._busy:
            self._leave()
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.setblocking(False)
            self._socket = link
            self._poll.register(link, select.EPOLLIN)

    def measure(self, seconds: float, *loads: Load) -> list[Measured]:
        """Keep each load's calls outstanding for so long, then wait for the last answers."""
        with self._busy:
            return self._measure(seconds, loads)

    def ask(self, load: Load) -> bytes:
        """One call, and its whole answer."""
        with self._busy:
            self._request(load, 0, 1, 0.0, {})
            asked = self._last_id
            texts: list[bytes] = []
            while not texts:
                self._flush()
                texts = self._receive()
        if len(texts) != 1 or self._number(texts[0]) != asked:
            raise WrongAnswer(f"not the one answer that was due: {texts[0][:300]!r}")
        return texts[0]

    def look(self) -> None:
        """Answer pings, or a close, while there is nothing to measure; a peer would wait for it."""
        with self._busy:
            try:
                if self._socket is not None and self._poll.poll(0):
                    self._receive()
                if self._unsent:
                    self._flush()
            except PeerGone:
                self._leave()

    def close(self) -> None:
        self._closed.set()
        with self._busy:
            self._leave()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()

    def _measure(self, seconds: float, loads: tuple[Load, ...]) -> list[Measured]:
        pending: dict[int, tuple[int, float]] = {}
        latencies: list[list[float]] = [[] for _ in loads]
        cpu_before = time.thread_time()
        began = now = time.perf_counter()
        ends = began + seconds
        for index, load in enumerate(loads):
            self._request(load, index, load.outstanding, now, pending)
        while pending:
            self._flush()
            texts = self._receive()
            now = time.perf_counter()
            answered = [0] * len(loads)
            for text in texts:
                index, sent = pending.pop(self._number(text), (-1, 0.0))
                if index < 0 or not loads[index].is_answer(text):
                    raise WrongAnswer(f"not the answer that was due: {text[:300]!r}")
                latencies[index].append(now - sent)
                answered[index] += 1
            if now < ends:
                for index, count in enumerate(answered):
                    if count:
                        self._request(loads[index], index, count, now, pending)
        took = time.perf_counter() - began
        cpu = time.thread_time() - cpu_before
        calls = sum(map(len, latencies))
        return [
            Measured(len(each), took, sorted(each), generator_cpu_s=cpu * len(each) / calls)
            for each in latencies
        ]

    def _leave(self) -> None:
        if self._socket is not None:
            self._poll.unregister(self._socket)
            self._socket.close()
            self._socket, self._unread = None, b""
            self._unsent.clear()

    def _request(
        self, load: Load, index: int, count: int, now: float, pending: dict[int, tuple[int, float]]
    ) -> None:
        first = self._last_id + 1
        self._last_id += count
        numbers = range(first, first + count)
        pending.update(dict.fromkeys(numbers, (index, now)))
        self._unsent += b"".join(map(load.request, numbers))

    @staticmethod
    def _number(text: bytes) -> int:
        digits = text[len(ANSWER_HEAD) : ID_END]
        if not text.startswith(ANSWER_HEAD) or not digits.isdigit():
            raise WrongAnswer(f"not an answer: {text[:300]!r}")
        return int(digits)

    def _flush(self) -> None:
        """Write what the kernel takes."""
        if self._socket is None:
            raise PeerGone("the connection is gone")
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent)
            except BlockingIOError:
                return
            except OSError as error:
                raise PeerGone(f"the connection is gone: {error}") from error
            del self._unsent[:sent]

    def _receive(self) -> list[bytes]:
        """The texts that have come; waits for bytes, and writes meanwhile where it must."""
        if self._socket is None:
            raise PeerGone("the connection is gone")
        wanted = select.EPOLLIN | select.EPOLLOUT if self._unsent else select.EPOLLIN
        if wanted != select.EPOLLIN:
            self._poll.modify(self._socket, wanted)
        events = self._poll.poll(SILENCE_S)
        if wanted != select.EPOLLIN:
            self._poll.modify(self._socket, select.EPOLLIN)
        if not events:
            raise PeerGone(f"no answer for {SILENCE_S:g} s")
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return []  # it can only be written to
        except OSError as error:
            raise PeerGone(f"the connection is gone: {error}") from error
        if not data:
            raise PeerGone("the connection was closed")
        return self._texts(self._unread + data if self._unread else data)

    def _texts(self, data: bytes) -> list[bytes]:
        """Take whole frames apart; the rest is kept. Pings are answered."""
        texts = []
        at, end = 0, len(data)
        while end - at >= 2:
            size, start = data[at + 1] & 0x7F, at + 2
            if size >= 126:
                width = 2 if size == 126 else 8
                size, start = int.from_bytes(data[start : start + width], "big"), start + width
            if end - start < size + 4:
                break
            opcode = data[at] & 0x0F
            body = unmasked(data[start + 4 : start + 4 + size], data[start : start + 4])
            if opcode == TEXT:
                texts.append(body)
            elif opcode == PING:
                self._unsent += frame(PONG, body)
            elif opcode == CLOSE:
                self._unsent += frame(CLOSE, body[:2])
                self._flush()
                raise PeerGone(f"the peer closed its websocket: {body[2:200]!r}")
            at = start + 4 + size
        self._unread = data[at:]
        return texts

    def _idle(self) -> None:
        while not self._closed.wait(IDLE_S):
            self.look()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(connection,), daemon=True).start()

    def _welcome(self, connection: socket.socket) -> None:
        """Answer registrations on this connection, and the handshake if there is one."""
        data = b""
        try:
            while True:
                while b"\r\n\r\n" not in data:
                    piece = connection.recv(READ_BYTES)
                    if not piece:
                        connection.close()
                        return
                    data += piece
                head, _, data = data.partition(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    break
                length = re.search(rb"(?i)content-length: *(\d+)", head)
                while length is not None and len(data) < int(length[1]):
                    data += connection.recv(READ_BYTES)
                data = data[int(length[1]) if length is not None else 0 :]
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            connection.sendall(_accepted(head))
        except OSError:
            connection.close()
            return
        self._links.put(connection)


def _accepted(head: bytes) -> bytes:
    """The answer to a websocket handshake."""
    key = re.search(rb"(?i)sec-websocket-key: *(\S+)", head)
    if key is None:
        return b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"
    accept = base64.b64encode(hashlib.sha1(key[1] + _GUID).digest())
    lines = (
        b"HTTP/1.1 101 Switching Protocols",
        b"Upgrade: websocket",
        b"Connection: Upgrade",
        b"Sec-WebSocket-Accept: " + accept,
    )
    return b"\r\n".join(lines) + b"\r\n\r\n"
