"""A websocket server whose every byte the test writes by hand, and reads when it likes."""

from __future__ import annotations

import base64
import hashlib
import queue
import socket
import ssl
import struct
import threading
from contextlib import suppress

from websocket import ABNF

PATIENCE_S = 30.0


class Peer:
    """One accepted TCP connection of a scripted server, spoken to by hand."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(PATIENCE_S)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            byte = sock.recv(1)
            if not byte:
                raise ConnectionError("no request")
            head += byte
        self.request, *lines = head.decode().split("\r\n")[:-2]
        self.headers: list[tuple[str, str]] = []
        for line in lines:
            name, _, value = line.partition(": ")
            self.headers.append((name, value))

    def accept(self, and_then: bytes = b"") -> None:
        key = dict(self.headers)["Sec-WebSocket-Key"]
        digest = hashlib.sha1((key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        answer = (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {base64.b64encode(digest).decode()}\r\n\r\n"
        )
        self.sock.sendall(answer.encode() + and_then)

    def reject(self, status: int, headers: str = "", phrase: str = "X") -> None:
        answer = f"HTTP/1.1 {status} {phrase}\r\ncontent-length: 0\r\n{headers}\r\n"
        self.sock.sendall(answer.encode())
        self.sock.close()

    def frame(self) -> tuple[int, bytes] | None:
        """The next frame; None at the end of the stream."""
        try:
            head = self._exactly(2)
            assert head[1] & 0x80, "a client's frame must be masked"
            size = head[1] & 0x7F
            if size > 125:
                size = int.from_bytes(self._exactly(2 if size == 126 else 8), "big")
            mask = self._exactly(4)
            data = self._exactly(size)
        except (ConnectionError, TimeoutError):
            return None
        return head[0], ABNF.mask(mask, data)

    def frames(self) -> list[tuple[int, bytes]]:
        """All frames up to the end of the stream."""
        return list(iter(self.frame, None))

    def send(self, text: str) -> None:
        """One text message."""
        data = text.encode()
        size = struct.pack(">BBQ", 0x81, 127, len(data))
        self.sock.sendall((size if len(data) > 125 else bytes((0x81, len(data)))) + data)

    def abort(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise ConnectionError("end of stream")
            data += piece
        return data


class ScriptedServer:
    """Hands each connection to `peers`, in order, once its request has been read."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        scheme = "https" if tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._listener.getsockname()[1]}"
        self.peers: queue.Queue[Peer] = queue.Queue()
        self._all: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def next(self) -> Peer:
        return self.peers.get(timeout=PATIENCE_S)

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)
        for sock in self._all:
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with suppress(OSError):
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_side=True)
                self._all.append(sock)
                self.peers.put(Peer(sock))
