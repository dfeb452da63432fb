"""The backend's side of the wire for the benchmarks: registrations by POST, then one websocket.

Over the sans-IO protocol of `websockets`, so that a benchmark has each byte in its hands and can
end, stall or silence a connection in every way that a network can.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Mapping
from http import HTTPStatus
from typing import Protocol

from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import State
from websockets.server import ServerProtocol

MAX_HEAD_BYTES = 1 << 26
"""Of registrations with the tools' source; also what is read ahead of a slow consumer."""
READ_BYTES = 1 << 20


class Link:
    """One websocket that a toolkit opened. Everything is written without waiting."""

    def __init__(self, writer: asyncio.StreamWriter, protocol: ServerProtocol) -> None:
        self.number = 0
        """Counted from 1, over all links of a backend."""
        self._writer = writer
        self._protocol = protocol
        self._is_silent = False
        self.is_open = True

    @property
    def can_send(self) -> bool:
        return self.is_open and self._protocol.state is State.OPEN

    @property
    def unsent_bytes(self) -> int:
        return self._writer.transport.get_write_buffer_size()

    def send_text(self, data: bytes) -> None:
        self._protocol.send_text(data)
        self.flush()

    def send_ping(self, payload: bytes) -> None:
        self._protocol.send_ping(payload)
        self.flush()

    def send_half(self, data: bytes) -> None:
        """The first half of a text message, after which nothing else makes sense."""
        if not self.can_send:
            return
        self._protocol.send_text(data)
        whole = b"".join(self._protocol.data_to_send())
        self._writer.write(whole[: len(whole) // 2])

    def close(self, code: int) -> None:
        """Begin the close handshake."""
        if self.can_send:
            self._protocol.send_close(code, "on purpose")
            self.flush()

    def cut(self) -> None:
        """End the TCP connection with a FIN, in the middle of whatever it is."""
        if self.is_open:
            self._socket().shutdown(socket.SHUT_RDWR)

    def reset(self) -> None:
        """End it with a RST; what the kernel holds in either direction is gone."""
        if self.is_open:
            lingers_not = struct.pack("ii", 1, 0)
            self._socket().setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, lingers_not)
            self._writer.transport.abort()

    def stop_reading(self) -> None:
        self._transport().pause_reading()

    def silence(self) -> None:
        """Read on, but write nothing any more: no pong either."""
        self._is_silent = True

    def flush(self) -> None:
        """Write what the protocol has to say."""
        for piece in self._protocol.data_to_send():
            if piece and not self._is_silent and self.is_open:
                self._writer.write(piece)

    def _transport(self) -> asyncio.Transport:
        transport = self._writer.transport
        assert isinstance(transport, asyncio.Transport)
        return transport

    def _socket(self) -> socket.socket:
        sock: socket.socket = self._writer.get_extra_info("socket")
        return sock


class LinkOwner(Protocol):
    """What the benchmark is told of links."""

    def link_opened(self, link: Link) -> None: ...
    def link_closed(self, link: Link) -> None: ...
    def text_received(self, link: Link, data: bytes) -> None: ...
    def pong_received(self, link: Link, payload: bytes) -> None: ...


class Backend:
    """Accepts whoever comes; `link` is the newest open one."""

    def __init__(self, owner: LinkOwner) -> None:
        self._owner = owner
        self._server: asyncio.Server | None = None
        self.connected = asyncio.Event()
        """Whether there is a link."""
        self.link: Link | None = None
        self.links = 0
        """Opened so far."""
        self.refusals = 0
        """Handshakes that are still to be answered with 503."""
        self.url = ""

    async def start(self, receive_buffer_bytes: int = 0) -> None:
        """`receive_buffer_bytes`: of the kernel, for each connection; 0 leaves it to the kernel."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        if receive_buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._server = await asyncio.start_server(self._handle, sock=listener, limit=MAX_HEAD_BYTES)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def forget_link(self) -> None:
        """Whoever opened it has ended; what he wrote before is still received."""
        if self.link is not None:
            self._leave(self.link)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self.link is not None:
            self.link.reset()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            while head.startswith(b"POST "):
                length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
                head = await reader.readuntil(b"\r\n\r\n")
            await self._serve(head, reader, writer)
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()

    async def _serve(
        self, data: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        protocol = ServerProtocol(max_size=None)
        link = Link(writer, protocol)
        try:
            while data:
                protocol.receive_data(data)
                for event in protocol.events_received():
                    if isinstance(event, Request):
                        if not self._accepts(protocol, event):
                            link.flush()
                            return
                        link.flush()
                        self._join(link)
                    elif isinstance(event, Frame):
                        self._on_frame(link, event)
                link.flush()
                if protocol.close_expected():
                    return
                data = await reader.read(READ_BYTES)
        finally:
            link.is_open = False
            self._leave(link)

    def _accepts(self, protocol: ServerProtocol, request: Request) -> bool:
        if self.refusals:
            self.refusals -= 1
            protocol.send_response(protocol.reject(HTTPStatus.SERVICE_UNAVAILABLE, "later\n"))
            return False
        protocol.send_response(protocol.accept(request))
        return True

    def _join(self, link: Link) -> None:
        if self.link is not None:
            self._leave(self.link)  # whoever comes again has given the old one up
        self.links += 1
        link.number = self.links
        self.link = link
        self.connected.set()
        self._owner.link_opened(link)

    def _on_frame(self, link: Link, frame: Frame) -> None:
        if frame.opcode is Opcode.TEXT:
            self._owner.text_received(link, bytes(frame.data))
        elif frame.opcode is Opcode.PONG:
            self._owner.pong_received(link, bytes(frame.data))

    def _leave(self, link: Link) -> None:
        if self.link is link:
            self.link = None
            self.connected.clear()
            self._owner.link_closed(link)


def request_text(request_id: object, tool: str, params: Mapping[str, object]) -> bytes:
    """A tool request as it goes over the wire."""
    payload = {"request_id": request_id, "tool_name": tool, "params": params}
    return json.dumps({"message_type": "atp_tool_request", "payload": payload}).encode()
