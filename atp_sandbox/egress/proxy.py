"""The HTTP proxy of a jail: CONNECT, and plain HTTP by absolute URI. One request a connection.

RFC 9110, sections 7.1 and 9.3.6; RFC 9112. Each request is a new decision, read by h11 and written
anew by h11, so that no second one can hide in it. What is refused says so in its status line, since
that is what clients show.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import h11

from atp_sandbox.egress import messages
from atp_sandbox.egress.bounds import Bounds
from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.gate import Gate, Target
from atp_sandbox.egress.placeholders import Leaving

HTTP_PORT = 80
_MAX_HEAD_BYTES = 32 * 1024
"""Of a request line and its headers; servers take 8 to 16 KiB."""
_HEAD_S = 10.0
_CHUNK_BYTES = 64 * 1024
_MAX_REASON_CHARS = 400
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer "
    b"upgrade host".split()
)

_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
"""What Connection may not name: the body would be without its end."""


class NoTicket(Denied):
    """Nobody of this jail asks."""

    def __init__(self) -> None:
        super().__init__("asks without the proxy's credentials, which stand in HTTPS_PROXY")


@dataclass(slots=True)
class Request:
    """One request to the proxy, as far as it was read."""

    worker: int = messages.UNKNOWN_WORKER
    target: Target | None = None
    asked: tuple[str, int | None] = ("", None)
    """Host and port as they were asked for, once they are known to be such."""
    early: bytes = field(default=b"", repr=False)
    """What came after a CONNECT at once."""
    head: h11.Request | None = field(default=None, repr=False)


class Front:
    """Speaks HTTP with the client of one connection; owns nothing."""

    def __init__(self, gate: Gate, client: socket.socket) -> None:
        self._gate = gate
        self._client = client
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        self.request = Request()
        self.has_answered = False
        """From then on nothing more can be said in HTTP: a tunnel stands, or the host answers."""

    async def read(self) -> Request | None:
        """The request, decided upon; None if none came. Raises Denied, which `refuse` can tell."""
        try:
            async with asyncio.timeout(_HEAD_S):
                head = await self._next()
        except TimeoutError:
            raise Denied("was not asked for anything in time") from None
        except h11.RemoteProtocolError:
            raise Denied("was asked in broken HTTP") from None
        if not isinstance(head, h11.Request):
            return None
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in head.headers}:
            # Two readers could differ in where it ends: RFC 9112, section 6.3.
            raise Denied("was asked in broken HTTP")
        request = self.request
        request.head = head
        request.worker = self._worker_of(head)
        if head.method == b"CONNECT":
            request.target = self._decide(head.target.decode("latin-1"), None)
            _check_host(head, request.target, HTTP_PORT, is_connect=True)
            request.early = self._http.trailing_data[0]
        else:
            request.target = self._decide(_authority_of(head), HTTP_PORT)
            _check_host(head, request.target, HTTP_PORT)
        return request

    async def accept_tunnel(self) -> None:
        """200: from here on the connection is the client's and the host's."""
        answer = h11.Response(status_code=200, headers=[], reason=b"connected")
        await self._send(self._http.send(answer))
        self.has_answered = True

    async def refuse(self, error: Denied | Failed) -> None:
        """Say in the status line what is refused, and why."""
        host, port = self.request.asked
        what = f"{host}:{port} " if host else ""
        if isinstance(error, NoTicket):
            status, text = 407, f"blocked by policy: this client {error.reason}"
        elif isinstance(error, Denied):
            status, text = 403, f"blocked by policy: {what}{error.reason}"
        else:
            status, text = 502, f"egress failed: {what}{error.reason}"
        body = f"{text}\n".encode("ascii", "replace")
        headers = [
            ("Content-Type", "text/plain"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        if status == 407:
            headers.append(("Proxy-Authenticate", 'Basic realm="jail"'))
        reason = text[:_MAX_REASON_CHARS].encode("ascii", "replace")
        answer = h11.Response(status_code=status, headers=headers, reason=reason)
        # The request may have been unreadable, which the state machine holds against us.
        fresh = h11.Connection(h11.SERVER)
        fresh.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        fresh.next_event()
        is_head = self.request.head is not None and self.request.head.method == b"HEAD"
        data = fresh.send(answer) or b""
        if not is_head:
            data += fresh.send(h11.Data(data=body)) or b""
        with contextlib.suppress(OSError):
            await self._send(data)
            self._client.shutdown(socket.SHUT_WR)
            await self._drain()

    async def forward(
        self, dial: Callable[[], Awaitable[socket.socket]], bounds: Bounds, *, scans: bool
    ) -> None:
        """Send the request on and its answer back; then both connections are done with."""
        head = self.request.head
        assert head is not None
        host, port = self.request.asked
        if scans and _holds_placeholder(head):
            raise Denied("was sent a placeholder")
        upstream = await dial()
        try:
            http = h11.Connection(h11.CLIENT)
            ours = _hop_by_hop(head)
            kept = [(bytes(n), bytes(v)) for n, v in head.headers if n not in ours]
            at = host if port == HTTP_PORT else f"{host}:{port}"
            request = h11.Request(
                method=head.method,
                target=_path_of(head),
                headers=[(b"Host", at.encode()), *kept, (b"Connection", b"close")],
            )
            await bounds.keep(
                self._send_request(http, request, upstream, bounds, scans),
                self._send_answer(upstream, bounds),
                until_all=False,
            )
        finally:
            upstream.close()

    # -- within ------------------------------------------------------------------------------------

    def _worker_of(self, head: h11.Request) -> int:
        """Whose connection it is, by Basic credentials; else NoTicket."""
        given = [v for n, v in head.headers if n == b"proxy-authorization"]
        if len(given) == 1:
            scheme, _, encoded = given[0].partition(b" ")
            with contextlib.suppress(binascii.Error, UnicodeDecodeError):
                text = base64.b64decode(encoded.strip(), validate=True).decode("ascii")
                name, _, ticket = text.partition(":")
                worker = self._gate.worker_of(name, ticket)
                if scheme.lower() == b"basic" and worker is not None:
                    return worker or messages.UNKNOWN_WORKER
        raise NoTicket()

    def _decide(self, authority: str, default_port: int | None) -> Target:
        target = self._gate.requested(authority, default_port)
        self.request.asked = (target.host, target.port)
        return target

    async def _next(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            data = await asyncio.get_running_loop().sock_recv(self._client, _CHUNK_BYTES)
            self._http.receive_data(data)
            await asyncio.sleep(0)  # the wait does not suspend while there is more
        return event

    async def _send_request(
        self,
        http: h11.Connection,
        request: h11.Request,
        upstream: socket.socket,
        bounds: Bounds,
        scans: bool,
    ) -> None:
        loop, leaving = asyncio.get_running_loop(), Leaving() if scans else None
        event: object = request
        while True:
            if isinstance(event, h11.Data) and leaving and leaving.feed(bytes(event.data)):
                raise Denied("was sent a placeholder")
            if isinstance(event, (h11.Request, h11.Data, h11.EndOfMessage)):
                if isinstance(event, h11.EndOfMessage):
                    event = h11.EndOfMessage()  # trailers stay here
                data = http.send(event) or b""
                bounds.count_sent(len(data))
                await loop.sock_sendall(upstream, data)
            if not isinstance(event, (h11.Request, h11.Data)):
                return
            try:
                event = await self._next()
            except h11.RemoteProtocolError:
                raise Denied("was asked in broken HTTP") from None

    async def _send_answer(self, upstream: socket.socket, bounds: Bounds) -> None:
        """As it comes: the host was asked to close after it."""
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(upstream, _CHUNK_BYTES):
            bounds.count_received(len(data))
            self.has_answered = True
            await loop.sock_sendall(self._client, data)
            await asyncio.sleep(0)

    async def _send(self, data: bytes | None) -> None:
        await asyncio.get_running_loop().sock_sendall(self._client, data or b"")

    async def _drain(self) -> None:
        """Read what still comes, within bounds: closing with it unread would reset the answer."""
        loop = asyncio.get_running_loop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                for _ in range(64):
                    if not await loop.sock_recv(self._client, _CHUNK_BYTES):
                        return


def _authority_of(head: h11.Request) -> str:
    """Of the absolute form of a target; RFC 9112, section 3.2.2. Denied if it is none."""
    try:
        parts = urlsplit(head.target.decode("ascii"))
    except (UnicodeDecodeError, ValueError):
        raise Denied("was asked for in no absolute URI") from None
    if parts.scheme != "http" or not parts.netloc:
        raise Denied("was asked for in no http:// URI; this is a proxy")
    return parts.netloc


def _path_of(head: h11.Request) -> bytes:
    rest = head.target.split(b"://", 1)[1]
    slash = min((i for i in (rest.find(b"/"), rest.find(b"?")) if i >= 0), default=len(rest))
    path = rest[slash:]
    return path if path.startswith(b"/") else b"/" + path


def _check_host(
    head: h11.Request, target: Target, default_port: int, *, is_connect: bool = False
) -> None:
    """Whoever reads the Host header shall mean the same host as who reads the target."""
    given = [value.decode("latin-1").lower() for name, value in head.headers if name == b"host"]
    allowed = {f"{target.host}:{target.port}"}
    if is_connect or target.port == default_port:
        allowed.add(target.host)
    if any(value not in allowed for value in given):
        raise Denied("was asked for with another Host header")


def _hop_by_hop(head: h11.Request) -> set[bytes]:
    """Headers that are between the client and us: RFC 9110, section 7.6.1."""
    named = [v.lower().split(b",") for n, v in head.headers if n == b"connection"]
    return set(_HOP_BY_HOP) | {one.strip() for row in named for one in row} - _FRAMING


def _holds_placeholder(head: h11.Request) -> bool:
    leaving = Leaving()
    return leaving.feed(b" ".join([head.target, *(n + b" " + v for n, v in head.headers)]))
