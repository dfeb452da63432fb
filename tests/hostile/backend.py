"""A backend that records everything it is sent, and a network that leads nowhere.

The backend is an asyncio server in a thread of its own, HTTP/1.1 and RFC 6455 by hand, so that a
test can also send what a well-behaved server never would. `Cell` is a network namespace: the
supervisor and every listening socket live in it, so that not even a sandbox that fails reaches a
real network. `StandIn` and `DnsSink` are what an egress process finds there: the hosts that its
policies name, and the only resolver.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import fcntl
import hashlib
import itertools
import json
import os
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import trustme

T = TypeVar("T")

METADATA = "169.254.169.254"
PUBLIC = "45.67.89.1"
"""Of no special block; in a cell it is the cell's own."""
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CLONE_NEWNET, _CLONE_NEWNS = 0x40000000, 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_SIOCSIFADDR, _SIOCSIFFLAGS, _IFF_UP_RUNNING = 0x8916, 0x8914, 0x41
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


class Cell:
    """A thread in a network namespace of its own; processes that it starts inherit the namespace.

    Where that is not permitted (no root), it is the machine's own, and `is_private` is false.
    """

    def __init__(self, resolver: Path | None = None) -> None:
        """`resolver`: a file that its processes see as /etc/resolv.conf, if it is private."""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cell")
        self._resolver = resolver
        self.is_private: bool = self.run(self._enter)
        self.has_resolver = self.is_private and resolver is not None

    def run(self, function: Callable[[], T]) -> T:
        return self._thread.submit(function).result(120)

    def close(self) -> None:
        self._thread.shutdown()

    def _enter(self) -> bool:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(_CLONE_NEWNET) != 0:
            return False
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            up = struct.pack("16sH22x", b"lo", _IFF_UP_RUNNING)
            fcntl.ioctl(control, _SIOCSIFFLAGS, up)
            for name, address in ((b"lo:1", METADATA), (b"lo:2", PUBLIC)):
                packed = socket.inet_aton(address)
                request = struct.pack("16sHH4s16x", name, socket.AF_INET, 0, packed)
                fcntl.ioctl(control, _SIOCSIFADDR, request)
        if self._resolver is not None:
            place = os.path.realpath("/etc/resolv.conf").encode()
            steps = (
                libc.unshare(_CLONE_NEWNS),
                libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None),
                libc.mount(
                    os.fsencode(self._resolver), place, None, ctypes.c_ulong(_MS_BIND), None
                ),
            )
            assert steps == (0, 0, 0), f"a resolver for the cell: {os.strerror(ctypes.get_errno())}"
        return True


class DnsSink:
    """The cell's only resolver, over UDP and TCP: knows no name, and keeps every question."""

    ADDRESS = "127.0.0.1"

    def __init__(self, cell: Cell) -> None:
        self.questions: list[str] = []
        self._datagrams, self._listener = cell.run(self._open)
        for work in (self._answer_datagrams, self._answer_streams):
            threading.Thread(target=work, name="dns", daemon=True).start()

    def close(self) -> None:
        for sock in (self._datagrams, self._listener):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _open(self) -> tuple[socket.socket, socket.socket]:
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind((self.ADDRESS, 53))
        return datagrams, socket.create_server((self.ADDRESS, 53))

    def _answer_datagrams(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                question, asker = self._datagrams.recvfrom(4096)
                if question:
                    self._datagrams.sendto(self._answer(question), asker)

    def _answer_streams(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                stream, _ = self._listener.accept()
                with stream, contextlib.suppress(OSError):
                    stream.settimeout(2)
                    question = stream.recv(4096)[2:]
                    answer = self._answer(question)
                    stream.sendall(struct.pack(">H", len(answer)) + answer)

    def _answer(self, question: bytes) -> bytes:
        """NXDOMAIN: RFC 1035, section 4.1.1."""
        labels, position = [], 12
        while 0 < (size := question[position] if position < len(question) else 0) < 64:
            labels.append(question[position + 1 : position + 1 + size].decode("latin-1"))
            position += 1 + size
        self.questions.append(".".join(labels).lower() or "?")
        end = position + 5
        return question[:2] + b"\x81\x83\0\1\0\0\0\0\0\0" + question[12:end]


@dataclass(slots=True)
class Arrival:
    """What one connection brought a stand-in."""

    place: str
    """Which of its sockets."""
    is_tls: bool = False
    raw: bytes = b""
    """Its beginning; of TLS, what was in it."""
    received_bytes: int = 0


class StandIn:
    """The web server behind every allowed name: `http`, `https` and, in a cell, `public`.

    Answers each connection's first request, and keeps whatever came, before and after. Where TLS
    is expected it also answers plain text, as lenient servers do. `/sink` takes and says nothing.
    """

    KEPT_BYTES = 64 * 1024
    UNPACKED_MIB = 5 * 1024

    def __init__(self, cell: Cell, names: list[str]) -> None:
        self.redirects: list[str] = []
        """Where `/redirect-private` leads, one after the other; the last one stays."""
        self.arrivals: list[Arrival] = []
        self._open = 0
        self._changed = threading.Condition()
        authority = trustme.CA()
        self.authority_pem = authority.cert_pem.bytes().decode()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(self._context)
        self._bomb = _gzip_bomb(self.UNPACKED_MIB)
        self._listeners = cell.run(lambda: self._listen(cell.is_private))
        self.ports: dict[str, int] = {
            place: listener.getsockname()[1] for place, listener in self._listeners.items()
        }
        for place, listener in self._listeners.items():
            threading.Thread(target=self._accept, args=(place, listener), daemon=True).start()

    def close(self) -> None:
        for listener in self._listeners.values():
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def wait_quiet(self, timeout_s: float) -> bool:
        """Whether no connection is open, so that `arrivals` are complete."""
        with self._changed:
            return self._changed.wait_for(lambda: self._open == 0, timeout_s)

    def _listen(self, with_public: bool) -> dict[str, socket.socket]:
        opened = {p: socket.create_server(("127.0.0.1", 0)) for p in ("http", "https")}
        if with_public:
            opened["public"] = socket.create_server((PUBLIC, 80))
        return opened

    def _accept(self, place: str, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listener.accept()
                arrival = Arrival(place)
                with self._changed:
                    self._open += 1
                    self.arrivals.append(arrival)
                threading.Thread(target=self._serve, args=(sock, arrival), daemon=True).start()

    def _serve(self, sock: socket.socket, arrival: Arrival) -> None:
        try:
            with contextlib.suppress(OSError):
                sock.settimeout(30)
                if arrival.place == "https" and sock.recv(1, socket.MSG_PEEK) == b"\x16":
                    arrival.is_tls = True
                    sock = self._context.wrap_socket(sock, server_side=True)
                self._converse(sock, arrival)
        finally:
            sock.close()
            with self._changed:
                self._open -= 1
                self._changed.notify_all()

    def _converse(self, sock: socket.socket, arrival: Arrival) -> None:
        is_answered = False
        while data := sock.recv(256 * 1024):
            arrival.received_bytes += len(data)
            arrival.raw += data[: max(0, self.KEPT_BYTES - len(arrival.raw))]
            is_whole = b"\r\n\r\n" in arrival.raw or not arrival.raw[:5].isalpha()
            line = arrival.raw.split(b"\r\n", 1)[0]
            if is_answered or b" /sink " in line or not (is_whole or arrival.place == "https"):
                continue
            is_answered = True
            with contextlib.suppress(OSError):
                sock.sendall(self._answer(line, arrival.raw))
                if not arrival.is_tls:
                    sock.shutdown(socket.SHUT_WR)
                else:
                    sock.unwrap()

    def _answer(self, line: bytes, raw: bytes) -> bytes:
        target = line.partition(b" ")[2].partition(b" ")[0].partition(b"?")[0]
        status, more, body = b"200 OK", b"", b"ok"
        match target:
            case b"/redirect-private":
                place = self.redirects.pop(0) if len(self.redirects) > 1 else self.redirects[0]
                status, more, body = b"302 Found", b"Location: %b\r\n" % place.encode(), b""
            case b"/whoami" | b"/echo":
                hosts = [h for h in raw.split(b"\r\n") if h.lower().startswith(b"host:")]
                body = b"\n".join(hosts)
            case b"/gzip-bomb":
                more, body = b"Content-Encoding: gzip\r\n", self._bomb
            case b"/ws" if b"\r\nupgrade: websocket" in raw.lower():
                return b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"
            case b"/ws":
                status = b"426 Upgrade Required"
        return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (
            status,
            more,
            len(body),
            body,
        )


def _gzip_bomb(unpacked_mib: int) -> bytes:
    """A few megabytes that unpack to so many; its end, which nobody reaches, is left out."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + block * (unpacked_mib // 16)


class Honeypots:
    """Sockets that nobody has any business with; `visits` names each that was touched anyway."""

    def __init__(self, cell: Cell, folder: str) -> None:
        self.visits: list[str] = []
        self.sink = DnsSink(cell) if cell.has_resolver else None
        self._questions = 0
        self.path = os.path.join(folder, "honey.sock")
        self.abstract = f"hostile-honey-{os.getpid()}-{time.monotonic_ns()}"
        self.sockets: dict[str, socket.socket] = cell.run(lambda: self._open(cell.is_private))
        self.port: int = self.sockets["127.0.0.1"].getsockname()[1]
        self.dns: str = "127.0.0.1#{}".format(self.sockets["dns"].getsockname()[1])
        if self.sink is not None:
            self.dns = f"{DnsSink.ADDRESS}#53"

    def _open(self, with_metadata: bool) -> dict[str, socket.socket]:
        opened = {}
        for host in ("127.0.0.1", "::1", "0.0.0.0"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with contextlib.suppress(OSError):
                opened[host] = socket.create_server((host, 0), family=family)
        if with_metadata:
            for host, port in itertools.product((METADATA, "127.0.0.1"), (80, 443)):
                opened[f"{host}:{port}"] = socket.create_server((host, port))
        for name, address in (("path", self.path), ("abstract", "\0" + self.abstract)):
            opened[name] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            opened[name].bind(address)
            opened[name].listen()
        os.chmod(self.path, 0o777)
        opened["dns"] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        opened["dns"].bind(("127.0.0.1", 0))
        for one in opened.values():
            one.setblocking(False)
        return opened

    def look(self) -> list[str]:
        """All visits so far, as (which socket) texts."""
        for name, listener in self.sockets.items():
            while True:
                try:
                    if name == "dns":
                        listener.recv(4096)
                    else:
                        listener.accept()[0].close()
                except OSError:
                    break
                self.visits.append(name)
        if self.sink is not None:
            asked = self.sink.questions[self._questions :]
            self._questions += len(asked)
            self.visits += [f"dns: {name}" for name in asked]
        return list(self.visits)

    def close(self) -> None:
        for one in self.sockets.values():
            one.close()
        if self.sink is not None:
            self.sink.close()


@dataclass(slots=True)
class Reply:
    at: float
    raw: bytes
    connection: int

    @property
    def result(self) -> Any:
        return json.loads(self.raw)["result"]


@dataclass(slots=True)
class Sample:
    """One call of a bystander. `done` is None while it waits."""

    tool: str
    request_id: str
    sent: float
    done: float | None = None
    fault: str = ""

    @property
    def seconds(self) -> float:
        return (self.done or time.monotonic()) - self.sent


@dataclass(slots=True)
class Connection:
    """The server's end of one websocket. Used in the backend's loop only."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    opened_at: float
    is_open: bool = True
    is_mute: bool = False
    """Neither reads on nor answers pings: a network that swallows everything."""
    pings: dict[bytes, float] = field(default_factory=dict)
    close_code: int | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)

    def mute(self, is_mute: bool) -> None:
        """Stop reading, down to the kernel's buffers, and answering; or go on."""
        self.is_mute = is_mute
        with contextlib.suppress(RuntimeError):
            if is_mute:
                self.writer.transport.pause_reading()  # type: ignore[attr-defined]
            else:
                self.writer.transport.resume_reading()  # type: ignore[attr-defined]
                self.wake.set()

    def send(self, opcode: int, payload: bytes, *, first: int | None = None) -> None:
        """One frame; `first` replaces the first byte (FIN, reserved bits, opcode)."""
        if not self.is_open:
            return
        head = bytes([0x80 | opcode if first is None else first])
        size = len(payload)
        if size < 126:
            head += bytes([size])
        elif size < 65_536:
            head += b"\x7e" + struct.pack(">H", size)
        else:
            head += b"\x7f" + struct.pack(">Q", size)
        self.writer.write(head + payload)


class Backend:
    """Accepts links, sends requests, keeps every answer. Public methods are for other threads."""

    PING_S = 0.05
    CALL_S = 0.1

    def __init__(self, cell: Cell) -> None:
        self._listener = cell.run(lambda: socket.create_server(("127.0.0.1", 0), backlog=512))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.connections: list[Connection] = []
        self.attempts: list[float] = []
        """Moments of websocket handshakes."""
        self.registered: list[str] = []
        """Names, one for each registration that was received."""
        self.replies: dict[str, list[Reply]] = defaultdict(list)
        """By the JSON text of the request id."""
        self.odd_frames: list[bytes] = []
        """What came over a websocket and is no `tool_response`."""
        self.sent_ids: set[str] = set()
        self.round_trips: list[tuple[float, float, float]] = []
        """(when, seconds, how late this loop itself was meanwhile)."""
        self.samples: list[Sample] = []
        self.bystanders: dict[str, dict[str, Any]] = {}
        """Tool name → params; called ten times a second while `is_watching`."""
        self.is_watching = False
        self.close_at_once = False
        self.refuse_handshake = False
        self._waiting: dict[str, Sample] = {}
        self._arrived = threading.Condition()
        self._lateness = 0.0
        self._numbers = itertools.count(1)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="backend", daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(20)

    # -- from other threads ------------------------------------------------------------------------

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(20)
        self._listener.close()

    def in_loop(self, function: Callable[[], T]) -> T:
        """Run `function` in the backend's loop and give what it returns."""

        async def run() -> T:
            return function()

        return self.await_in_loop(run())

    def await_in_loop(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    @property
    def link(self) -> Connection | None:
        """The newest open websocket."""
        return next((c for c in reversed(self.connections) if c.is_open), None)

    def new_id(self, prefix: str = "r") -> str:
        return f"{prefix}-{next(self._numbers)}-{os.urandom(4).hex()}"

    def request(
        self, tool: str, params: Any, token: Any = None, request_id: Any = None, **extra: Any
    ) -> Any:
        """Send one tool request; gives its id."""
        if request_id is None:
            request_id = self.new_id()
        payload = {"request_id": request_id, "tool_name": tool, "params": params, **extra}
        if token is not None:
            payload["auth_token"] = token
        message = {"message_type": "atp_tool_request", "payload": payload}
        self.sent_ids.add(json.dumps(request_id))
        self.send_text(json.dumps(message))
        return request_id

    def send_text(self, text: str) -> None:
        self.send_raw(TEXT, text.encode())

    def send_raw(self, opcode: int, payload: bytes, *, first: int | None = None) -> None:
        def send() -> None:
            link = self.link
            assert link is not None, "there is no link"
            link.send(opcode, payload, first=first)

        self.in_loop(send)

    def replies_to(self, request_id: Any) -> list[Reply]:
        return self.replies.get(json.dumps(request_id), [])

    def lose_link(self, code: int | None = None) -> None:
        """End the newest link: with a close frame, or without a word."""

        def lose() -> None:
            link = self.link
            if link is None:
                return
            if code is not None:
                link.send(CLOSE, struct.pack(">H", code))
            else:
                link.writer.transport.abort()
            link.is_open = False

        self.in_loop(lose)

    def mute(self, is_mute: bool) -> None:
        link = self.link
        if link is not None:
            self.in_loop(lambda: link.mute(is_mute))

    def wait_reply(self, request_id: Any, timeout_s: float) -> Reply | None:
        """The first answer to that id."""
        key = json.dumps(request_id)
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self.replies.get(key)), timeout_s)
            found = self.replies.get(key)
            return found[0] if found else None

    def wait_for(self, condition: Callable[[], object], timeout_s: float) -> bool:
        """Whether `condition()` came true; looked at often, and whenever something arrives."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with self._arrived:
                self._arrived.wait(min(left, 0.01))
        return True

    def pause_bystanders(self, timeout_s: float = 5.0) -> list[Sample]:
        """Stop them and wait until none is under way; those that never came are returned."""
        self.is_watching = False
        self.wait_for(lambda: not self._waiting, timeout_s)
        return list(self._waiting.values())

    def forget_waiting(self) -> None:
        self.in_loop(self._waiting.clear)

    # -- the loop ----------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._started.set()
        try:
            self._loop.run_forever()
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self._loop.close()

    async def _start(self) -> None:
        await asyncio.start_server(self._on_client, sock=self._listener, limit=2**26)
        for work in (self._ping(), self._call_bystanders()):
            self._spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ping(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(self.PING_S)
            self._lateness = max(self._lateness * 0.5, time.monotonic() - before - self.PING_S)
            link = self.link
            if link is not None and not link.is_mute:
                mark = os.urandom(8)
                link.pings[mark] = time.monotonic()
                link.send(PING, mark)

    async def _call_bystanders(self) -> None:
        while True:
            await asyncio.sleep(self.CALL_S)
            link = self.link
            if not self.is_watching or link is None:
                continue
            for tool, params in list(self.bystanders.items()):
                request_id = self.new_id("b")
                key = json.dumps(request_id)
                self.sent_ids.add(key)
                sample = Sample(tool, request_id, time.monotonic())
                self.samples.append(sample)
                self._waiting[key] = sample
                payload = {"request_id": request_id, "tool_name": tool, "params": params}
                link.send(
                    TEXT,
                    json.dumps({"message_type": "atp_tool_request", "payload": payload}).encode(),
                )

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin1").split("\r\n")
                headers = {
                    name.lower(): value.strip()
                    for name, _, value in (line.partition(":") for line in head[1:])
                }
                if headers.get("upgrade", "").lower() == "websocket":
                    await self._on_upgrade(reader, writer, headers)
                    return
                body = await reader.readexactly(int(headers.get("content-length") or 0))
                answer = self._http(head[0].split(" ")[1], body)
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                    b"Content-Length: %d\r\n\r\n%b" % (len(answer), answer)
                )
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError, OSError):
            pass
        finally:
            with contextlib.suppress(Exception):
                writer.close()

    def _http(self, target: str, body: bytes) -> bytes:
        if target.endswith("register_tool"):
            with contextlib.suppress(ValueError):
                self.registered.append(json.loads(body).get("function_id", ""))
            return b'{"exchange_token": "exchanged"}'
        if target.endswith("hash"):
            return b'{"up_to_date": false}'
        return b"{}"

    async def _on_upgrade(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, headers: dict[str, str]
    ) -> None:
        self.attempts.append(time.monotonic())
        if self.refuse_handshake:
            writer.write(b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n")
            return
        key = headers["sec-websocket-key"].encode()
        accept = base64.b64encode(hashlib.sha1(key + _GUID).digest())
        writer.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: %b\r\n\r\n" % accept
        )
        link = Connection(len(self.connections), reader, writer, time.monotonic())
        self.connections.append(link)
        if self.close_at_once:
            link.send(CLOSE, struct.pack(">H", 1000))
            link.is_open = False
            return
        try:
            await self._receive(link)
        except (asyncio.IncompleteReadError, ConnectionError, OSError):
            pass
        finally:
            link.is_open = False
            self._notify()

    async def _receive(self, link: Connection) -> None:
        while True:
            while link.is_mute:
                link.wake.clear()
                await link.wake.wait()
            first, length = await link.reader.readexactly(2)
            size = length & 0x7F
            if size == 126:
                size = int.from_bytes(await link.reader.readexactly(2), "big")
            elif size == 127:
                size = int.from_bytes(await link.reader.readexactly(8), "big")
            mask = await link.reader.readexactly(4) if length & 0x80 else b"\0\0\0\0"
            payload = _unmask(await link.reader.readexactly(size), mask)
            opcode = first & 0x0F
            if opcode == PING:
                link.send(PONG, payload)
            elif opcode == PONG:
                sent = link.pings.pop(payload, None)
                if sent is not None:
                    now = time.monotonic()
                    self.round_trips.append((sent, now - sent, self._lateness))
            elif opcode == CLOSE:
                link.close_code = int.from_bytes(payload[:2], "big") if payload else None
                link.send(CLOSE, payload[:2])
                return
            else:
                self._on_frame(link, payload)

    def _on_frame(self, link: Connection, payload: bytes) -> None:
        now = time.monotonic()
        try:
            message = json.loads(payload)
            key = json.dumps(message["request_id"])
            assert message["type"] == "tool_response"
            assert set(message) == {"type", "request_id", "result"}
        except (ValueError, LookupError, TypeError, AssertionError, RecursionError):
            self.odd_frames.append(payload)
            self._notify()
            return
        sample = self._waiting.pop(key, None)
        if sample is not None:
            sample.done = now
            result = message["result"]
            if isinstance(result, dict) and "error_type" in result:
                sample.fault = f"{result['error_type']}: {str(result.get('error'))[:120]}"
        self.replies[key].append(Reply(now, payload, link.number))
        self._notify()

    def _notify(self) -> None:
        with self._arrived:
            self._arrived.notify_all()


def _unmask(data: bytes, mask: bytes) -> bytes:
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
