"""Servers on this machine's loopback that stand in for the hosts of an egress policy.

Each serves every connection in a thread of its own; none needs a name server or a route.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE_S = 40.0
STREAM_BYTES = 64 * 1024 * 1024
_BLOCK = bytes(range(256)) * 256
_SSL_REQUEST, _GSS_REQUEST = 80877103, 80877104
Talk = Callable[[socket.socket], None]


def stream_digest() -> str:
    """Of what `send_stream` sends."""
    digest = hashlib.sha256()
    for _ in range(STREAM_BYTES // len(_BLOCK)):
        digest.update(_BLOCK)
    return digest.hexdigest()


class StandIn:
    """Listens on a free port of `address`; `talk` has each connection, which is closed after it."""

    def __init__(self, talk: Talk, address: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._talk = talk
        self._listener = socket.create_server((address, 0), family=family, backlog=128)
        self._open: set[socket.socket] = set()
        self.port: int = self._listener.getsockname()[1]
        self.place = f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"
        self.accepted = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        sock.settimeout(PATIENCE_S)
        # A client that was refused, or refuses us, is the tests' matter and not the server's.
        with sock, contextlib.suppress(OSError, EOFError, threading.BrokenBarrierError):
            self._talk(sock)
        self._open.discard(sock)


def in_tls(context: ssl.SSLContext, talk: Talk) -> Talk:
    """`talk`, within TLS."""

    def talk_within(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as inner:
            talk(inner)

    return talk_within


def refused_port() -> tuple[socket.socket, int]:
    """A port that is taken but refuses connections, and the socket that holds it."""
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    return holder, holder.getsockname()[1]


# -- protocols -------------------------------------------------------------------------------------


def talk_http(sock: socket.socket) -> None:
    """Answers one request with its method, path and Host header."""
    head = _read_until(sock, b"\r\n\r\n").decode("latin-1").split("\r\n")
    method, path, _ = head[0].split(" ")
    hosts = [line[5:].strip() for line in head if line.lower().startswith("host:")]
    body = f"{method} {path} {' '.join(hosts)}".encode()
    start = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
    sock.sendall(start.encode() + body)


def talk_smtp(context: ssl.SSLContext) -> Talk:
    """Greets first; takes one message, after STARTTLS alone."""

    def talk(sock: socket.socket) -> None:
        with contextlib.ExitStack() as inner:
            converse(sock, inner)

    def converse(sock: socket.socket, inner: contextlib.ExitStack) -> None:
        is_private = False
        sock.sendall(b"220 stand-in ESMTP\r\n")
        while True:
            line = _read_until(sock, b"\r\n")
            match line[:4].upper():
                case b"EHLO":
                    sock.sendall(b"250-stand-in\r\n250 STARTTLS\r\n")
                case b"STAR":
                    sock.sendall(b"220 go on\r\n")
                    sock = inner.enter_context(context.wrap_socket(sock, server_side=True))
                    is_private = True
                case b"MAIL" if not is_private:
                    sock.sendall(b"530 STARTTLS first\r\n")
                case b"DATA":
                    sock.sendall(b"354 go on\r\n")
                    _read_until(sock, b"\r\n.\r\n")
                    sock.sendall(b"250 taken\r\n")
                case b"QUIT":
                    sock.sendall(b"221 bye\r\n")
                    return
                case _:
                    sock.sendall(b"250 ok\r\n")

    return talk


def talk_postgres(context: ssl.SSLContext) -> Talk:
    """Whatever is asked, the answer is one row with `1`; PostgreSQL's protocol 3.0, chapter 53."""
    columns = b"\0\1" + b"one\0" + struct.pack("!ihihih", 0, 0, 23, 4, -1, 0)
    answers = {
        b"Q": [(b"T", columns), (b"D", b"\0\1\0\0\0\x011"), (b"C", b"SELECT 1\0"), (b"Z", b"I")],
        b"P": [(b"1", b"")],
        b"B": [(b"2", b"")],
        b"D": [(b"T", columns)],
        b"E": [(b"D", b"\0\1\0\0\0\x011"), (b"C", b"SELECT 1\0")],
        b"S": [(b"Z", b"I")],
    }

    def talk(sock: socket.socket) -> None:
        with contextlib.ExitStack() as inner:
            converse(sock, inner)

    def converse(sock: socket.socket, inner: contextlib.ExitStack) -> None:
        while True:
            (size,) = struct.unpack("!i", _read(sock, 4))
            (code,) = struct.unpack("!i", _read(sock, size - 4)[:4])
            if code == _SSL_REQUEST:
                sock.sendall(b"S")
                sock = inner.enter_context(context.wrap_socket(sock, server_side=True))
            elif code == _GSS_REQUEST:
                sock.sendall(b"N")
            else:
                break
        kind = b"TLS" if isinstance(sock, ssl.SSLSocket) else b"plain"
        status = [(b"server_version", b"16.0"), (b"client_encoding", b"UTF8"), (b"kind", kind)]
        parameters = [(b"S", name + b"\0" + value + b"\0") for name, value in status]
        _send_messages(sock, [(b"R", struct.pack("!i", 0)), *parameters, (b"Z", b"I")])
        while (letter := _read(sock, 1)) != b"X":
            (size,) = struct.unpack("!i", _read(sock, 4))
            _read(sock, size - 4)
            _send_messages(sock, answers.get(letter, []))

    return talk


def _send_messages(sock: socket.socket, messages: list[tuple[bytes, bytes]]) -> None:
    framed = [kind + struct.pack("!i", len(body) + 4) + body for kind, body in messages]
    sock.sendall(b"".join(framed))


@contextlib.contextmanager
def grpc_server(key: bytes | None = None, chain: bytes | None = None) -> Iterator[int]:
    """The port of `/standin.Echo/Say`, which gives back what it got; in TLS if there is a key."""
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    def say(request: bytes, _context: Any) -> bytes:
        return request

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_unary_rpc_method_handler(say)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("standin.Echo", {"Say": handler}),)
    )
    if key is None or chain is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        credentials = grpc.ssl_server_credentials([(key, chain)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@contextlib.contextmanager
def websocket_server(context: ssl.SSLContext) -> Iterator[int]:
    """The port of a server that gives back each message, in TLS."""
    from websockets.sync.server import ServerConnection, serve

    def talk(connection: ServerConnection) -> None:
        for message in connection:
            connection.send(message)

    with serve(talk, "127.0.0.1", 0, ssl=context, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server.socket.getsockname()[1]
        finally:
            server.shutdown()
            thread.join(PATIENCE_S)


# -- streams ---------------------------------------------------------------------------------------


def talk_echo(sock: socket.socket) -> None:
    """Gives back what comes, as it comes."""
    while data := sock.recv(65536):
        sock.sendall(data)


def talk_digest(sock: socket.socket) -> None:
    """Says nothing until the client's end; then how much came, and its SHA-256."""
    digest, size = hashlib.sha256(), 0
    while data := sock.recv(1 << 20):
        digest.update(data)
        size += len(data)
    sock.sendall(f"{size} {digest.hexdigest()}".encode())


def talk_stream(sock: socket.socket) -> None:
    """Waits for `!`, or for an HTTP request, as whose answer they count; then STREAM_BYTES."""
    if _read(sock, 1) != b"!":
        _read_until(sock, b"\r\n\r\n")
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(STREAM_BYTES // len(_BLOCK)):
        sock.sendall(_BLOCK)


class EndsFirst:
    """Ends its own writing at once, and goes on reading; `heard` is what came after that."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []

    def talk(self, sock: socket.socket) -> None:
        sock.sendall(b"that was all from here")
        sock.shutdown(socket.SHUT_WR)
        parts = []
        while data := sock.recv(65536):
            parts.append(data)
        self.heard.append(b"".join(parts))


def talk_slowly(sock: socket.socket) -> None:
    """One byte at a time."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in b"dribble, " * 6:
        sock.sendall(bytes([byte]))
        threading.Event().wait(0.01)


def talk_not(sock: socket.socket) -> None:
    """Closes at once."""


class Meeting:
    """Answers `all here` once that many are connected, and each has said something."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)

    def talk(self, sock: socket.socket) -> None:
        _read(sock, 1)
        self._barrier.wait()
        sock.sendall(b"all here")


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def _read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        data += _read(sock, 1)
    return data
