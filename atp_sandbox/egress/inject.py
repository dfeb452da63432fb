"""One connection to a host that a secret is bound to: TLS ends here, the token is put in, and out.

Egress process only; asyncio as a shell around two h11 state machines, one a side. Every head is
parsed and written anew and every body framed anew, so that nothing malformed, ambiguous or hidden
in framing reaches the host. Nothing that either side sent is ever part of an exception.

Requests: HTTP/1.0 and 1.1 with exactly one Host, which is the host; a path as target; hop-by-hop
headers and trailers are dropped; no CONNECT, no TRACE, no upgrade. A placeholder becomes its token
in the values of headers and ends the connection wherever else it stands.

Answers pass unchanged but for framing, and end the connection where they hold a token that this
connection has used, or could have. For that to be seen the host is asked for no compression and for
no part of a file (a token cut in two over two answers), and a compressed answer is refused. Not
seen is a token that the host changed by other means than those of `placeholders.Returning`, or
shows again when its call has ended: bind a secret to a host that does not tell what it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import h11

from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.heads import end_to_end, forwarded, has_body, is_plain
from atp_sandbox.egress.meter import Meter
from atp_sandbox.egress.placeholders import Leaving, Returning
from atp_sandbox.egress.side import READ_BYTES, Gone, Side

TLS_TIMEOUT_S = 15.0
LINGER_S = 2.0
"""How long a client that still sends may take to read why it was refused; and to end TLS."""

_REPEATABLE = frozenset((b"GET", b"HEAD", b"OPTIONS"))
_BODYLESS = frozenset((204, 304))

Dial = Callable[[], Awaitable[socket.socket]]
Secrets = Callable[[], Mapping[bytes, bytes]]
OnRefusal = Callable[[Denied | Failed], None]


@dataclass(frozen=True, slots=True)
class InjectLimits:
    """The bounds of one connection."""

    idle_s: float
    """Without a byte moved in either direction, and for the head of a request to be whole."""
    max_bytes: int
    """Both ways together."""


class _TimedOut(Failed):
    """Answered 504."""


class _Stale(Exception):
    """The host ended a kept connection before it saw the request."""


async def serve_injected(
    client: socket.socket,
    *,
    host: str,
    port: int,
    server_context: ssl.SSLContext,
    upstream_context: ssl.SSLContext,
    dial: Dial,
    secrets: Secrets,
    limits: InjectLimits,
    meter: Meter,
    on_refusal: OnRefusal = lambda _: None,
) -> None:
    """Serve `client`, which is owned and closed here, until either side ends.

    `server_context` is the `Issuer`'s for `host` and refuses other names; `upstream_context`
    verifies certificates and names, else ValueError. `dial` gives a connected socket, owned here,
    to an address that was judged; its Denied, Failed and OSError end this. `secrets` gives the
    token of each placeholder that is alive, and is asked at each request. `meter` is added to.

    Denied and Failed are raised after the toolkit was told in an answer, 403, 502 or 504 with the
    reason in its status line; without one if there already was an answer. `on_refusal` is called
    before that. Cancelling is safe.
    """
    if not upstream_context.check_hostname:  # which implies CERT_REQUIRED
        client.close()
        raise ValueError("the host's certificate would not be verified")
    reader, writer = await _accept_tls(client, server_context, limits)
    side = Side(reader, writer, h11.SERVER)
    relay = _Relay(side, host, port, upstream_context, dial, secrets, limits, meter, on_refusal)
    await relay.serve()


async def _accept_tls(
    client: socket.socket, context: ssl.SSLContext, limits: InjectLimits
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=READ_BYTES)
    protocol = asyncio.StreamReaderProtocol(reader)
    try:
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            client,
            ssl=context,
            ssl_handshake_timeout=min(limits.idle_s, TLS_TIMEOUT_S),
            ssl_shutdown_timeout=LINGER_S,
        )
    except ssl.SSLError as error:
        if error.reason == "CALLBACK_FAILED":  # the one of `Issuer.context`
            raise Denied("TLS for another host's name") from None
        raise Failed("the toolkit did not accept TLS with this run's authority") from None
    except OSError:
        raise Failed("the toolkit did not begin TLS") from None
    return reader, asyncio.StreamWriter(transport, protocol, reader, loop)


class _Relay:
    """The exchanges of one connection, one after the other."""

    def __init__(
        self,
        client: Side,
        host: str,
        port: int,
        upstream_context: ssl.SSLContext,
        dial: Dial,
        secrets: Secrets,
        limits: InjectLimits,
        meter: Meter,
        on_refusal: OnRefusal,
    ) -> None:
        self._client = client
        self._on_refusal = on_refusal
        self._host, self._port = host, port
        self._upstream_context, self._dial, self._secrets = upstream_context, dial, secrets
        self._limits, self._meter = limits, meter
        self._left_bytes = limits.max_bytes
        self._upstream: Side | None = None
        self._tokens: set[bytes] = set()
        self._method = b""
        self._is_busy = False
        self._body_is_read = False
        self._has_answered = False

    async def serve(self) -> None:
        try:
            await self._serve_all()
        except Gone:
            return
        except (Denied, Failed) as fault:
            self._drop_upstream()
            self._on_refusal(fault)
            await self._refuse(fault)
            raise
        finally:
            self._drop_upstream()
            self._client.abort()

    async def _serve_all(self) -> None:
        try:
            async with asyncio.timeout(self._limits.idle_s) as self._timer:
                while await self._serve_one():
                    pass
                self._drop_upstream()
                if not self._body_is_read:
                    await self._linger()
                await self._client.close()
        except TimeoutError:
            if self._is_busy or self._client.protocol.trailing_data[0]:
                raise _TimedOut(f"no byte moved in {self._limits.idle_s:g} s") from None

    async def _serve_one(self) -> bool:
        """One exchange; False if there is to be no further one."""
        self._method, self._body_is_read, self._has_answered = b"", False, False
        request = await self._client.next_event(self._count_sent_quietly)
        if not isinstance(request, h11.Request):
            self._body_is_read = True
            return False
        self._touch()
        self._is_busy = True
        self._method = request.method
        if not has_body(request.headers):  # then its end waits for nothing
            await self._client.next_event(self._count_sent)
            self._body_is_read = True
        secrets = self._secrets()
        head = forwarded(request, self._host, self._port, secrets)
        self._tokens |= set(secrets.values())
        await self._exchange(head)
        if self._upstream is not None and not self._upstream.start_next():
            self._drop_upstream()
        self._is_busy = False
        return self._client.start_next()

    async def _exchange(self, head: h11.Request) -> None:
        while True:
            if self._upstream is not None and not self._upstream.is_open:
                self._drop_upstream()
            if self._upstream is None:
                self._upstream = await self._connect()
            try:
                return await self._pass(self._upstream, head)
            except _Stale:
                self._drop_upstream()  # and a fresh one is not

    async def _pass(self, upstream: Side, head: h11.Request) -> None:
        """The request up and the answer down at once, as the host may answer before the end."""
        upload = asyncio.create_task(self._upload(upstream, head))
        download = asyncio.create_task(self._download(upstream))
        try:
            await asyncio.wait((upload, download), return_when=asyncio.FIRST_COMPLETED)
            if upload.done():
                upload.result()
            await download
        finally:
            upload.cancel()
            download.cancel()
            await asyncio.gather(upload, download, return_exceptions=True)

    async def _upload(self, upstream: Side, head: h11.Request) -> None:
        leaving = Leaving()
        # A host that takes no more may have answered: what comes of it the download tells.
        with contextlib.suppress(Failed):
            await upstream.send(head)
            while not self._body_is_read:
                event = await self._client.next_event(self._count_sent)
                if isinstance(event, h11.Data):
                    if leaving.feed(bytes(event.data)):
                        raise Denied("a placeholder in the body of a request")
                    await upstream.send(h11.Data(data=bytes(event.data)))
                else:
                    self._body_is_read = True
            await upstream.send(h11.EndOfMessage())

    async def _download(self, upstream: Side) -> None:
        returning = Returning(self._tokens)
        while True:
            event = await self._next_of_answer(upstream)
            if isinstance(event, h11.InformationalResponse):
                await self._send_continue(event.status_code)
            elif isinstance(event, h11.Response):
                answer = self._answer(event, returning)
                self._has_answered = True
                await self._client.send(answer)
            elif isinstance(event, h11.Data):
                if data := returning.feed(bytes(event.data)):
                    await self._client.send(h11.Data(data=data))
            else:
                if data := returning.finish():
                    await self._client.send(h11.Data(data=data))
                return await self._client.send(h11.EndOfMessage())
            self._touch()

    async def _next_of_answer(self, upstream: Side) -> object:
        try:
            event = await upstream.next_event(self._count_received)
            if isinstance(event, h11.ConnectionClosed):
                raise Failed("the host ended the connection")
        except Failed:
            may_repeat = self._body_is_read and self._method in _REPEATABLE
            if upstream.is_reused and not upstream.has_spoken and may_repeat:
                raise _Stale from None
            raise
        return event

    async def _send_continue(self, status: int) -> None:
        # 102 and 103 are dropped: some clients take them for the answer.
        if status == 100 and self._client.protocol.their_http_version == b"1.1":
            await self._client.send(h11.InformationalResponse(status_code=100, headers=[]))

    def _answer(self, response: h11.Response, returning: Returning) -> h11.Response:
        headers = end_to_end(response.headers.raw_items(), response.headers)
        returning.check(b"\n".join((response.reason, *(part for pair in headers for part in pair))))
        has_body = self._method != b"HEAD" and response.status_code not in _BODYLESS
        if has_body and not is_plain(response.headers):
            raise Denied("an answer that is compressed, though none was asked for")
        if not self._body_is_read:
            headers.append((b"Connection", b"close"))  # the rest of the request will not be read
        return h11.Response(
            status_code=response.status_code, reason=response.reason, headers=headers
        )

    async def _connect(self) -> Side:
        try:
            dialled = await self._dial()
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "no reason given")
            raise Failed(f"the host cannot be reached: {name}") from None
        try:
            reader, writer = await asyncio.open_connection(
                sock=dialled,
                ssl=self._upstream_context,
                server_hostname=self._host,
                ssl_handshake_timeout=TLS_TIMEOUT_S,
                ssl_shutdown_timeout=LINGER_S,
                limit=READ_BYTES,
            )
        except ssl.SSLCertVerificationError as error:
            raise Failed(f"the host's certificate: {error.verify_message}") from None
        except ConnectionAbortedError:  # asyncio's for a handshake that takes too long
            raise _TimedOut(f"no TLS with the host in {TLS_TIMEOUT_S:g} s") from None
        except OSError:
            raise Failed("no TLS with the host") from None
        self._touch()
        return Side(reader, writer, h11.CLIENT)

    async def _refuse(self, fault: Denied | Failed) -> None:
        """Tell the toolkit, if nothing was told yet, and close in order."""
        if self._has_answered:
            return
        status = b"403 blocked by policy:" if isinstance(fault, Denied) else b"502"
        status = b"504" if isinstance(fault, _TimedOut) else status
        reason = fault.reason.encode("ascii", "replace").replace(b"\r", b"?").replace(b"\n", b"?")
        body = b"" if self._method == b"HEAD" else reason + b"\n"
        head = b"HTTP/1.1 %b %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n"
        head += b"Connection: close\r\n\r\n"
        with contextlib.suppress(Gone, Denied, TimeoutError):
            async with asyncio.timeout(LINGER_S):
                await self._client.write(head % (status, reason, len(body)) + body)
                if not self._body_is_read:
                    await self._linger()
                await self._client.close()

    async def _linger(self) -> None:
        with contextlib.suppress(OSError):  # TimeoutError too
            async with asyncio.timeout(LINGER_S):
                await self._client.discard()

    def _drop_upstream(self) -> None:
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None

    def _touch(self) -> None:
        self._timer.reschedule(asyncio.get_running_loop().time() + self._limits.idle_s)

    def _count_sent_quietly(self, size: int) -> None:
        """Without `_touch`: a head that comes byte by byte is not to hold the connection."""
        self._meter.sent_bytes += size
        self._spend(size)

    def _count_sent(self, size: int) -> None:
        self._count_sent_quietly(size)
        self._touch()

    def _count_received(self, size: int) -> None:
        self._meter.received_bytes += size
        self._spend(size)
        self._touch()

    def _spend(self, size: int) -> None:
        self._left_bytes -= size
        if self._left_bytes < 0:
            raise Denied(f"more than {self._limits.max_bytes} bytes on one connection")
