"""Bytes from a jail's connection to the host and back, within the policy's limits.

The first bytes are looked at before the host sees them. A TLS hello must name the host that was
asked for: otherwise a name that is allowed would be the way to any other that the same machines
serve. At port 443 nothing but TLS is let through; elsewhere other protocols pass as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from atp_sandbox.egress.bounds import Bounds
from atp_sandbox.egress.denial import Denied
from atp_sandbox.egress.hello import MAX_HELLO_BYTES, NotTls, read_hello
from atp_sandbox.egress.placeholders import Leaving

HTTPS_PORT = 443
_FIRST_CHUNK_BYTES = 16 * 1024
_SMALL_CHUNK_BYTES = 64 * 1024
_LARGE_CHUNK_BYTES = 1024 * 1024
_LARGE_BUFFERS = 64
"""At once: no jail's memory limit counts them. Copying through large ones was as fast as splice(2)
through a pipe, or faster."""
_TURNS = 16
"""Small chunks in a row, of a connection on which more is always ready."""
_TLS_RECORD = b"\x16\x03"
_HELLO_S = 10.0
"""From the first byte of a hello to its end."""
_LINGER_NOT = struct.pack("ii", 1, 0)
"""close(2) then resets the connection: socket(7), SO_LINGER."""

Filter = Callable[[memoryview], None]
"""Looks at bytes on their way out; raises Denied."""


def reset(sock: socket.socket) -> None:
    """Close so that the peer reads a reset: the connection was refused, not finished."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    sock.close()


def check_hello(first: bytes, host: str, port: int) -> bool:
    """Whether enough of `first` is there to let it pass to `host`; Denied if it never may."""
    hello = read_hello(first)
    if hello is None:
        return False
    if isinstance(hello, NotTls):
        if first.startswith(_TLS_RECORD):
            raise Denied("was sent a TLS hello that cannot be read")
        if port == HTTPS_PORT:
            raise Denied("was spoken to at port 443, but not in TLS")
    elif hello.server_name is None:
        raise Denied("was asked for without a TLS server name")
    elif hello.server_name != host:
        raise Denied("was asked for with another TLS server name")
    elif hello.is_encrypted:
        raise Denied("was asked for with a hidden TLS server name")
    return True


async def relay(
    client: socket.socket,
    upstream: socket.socket,
    *,
    host: str,
    port: int,
    bounds: Bounds,
    early: bytes = b"",
    scans: bool = False,
) -> None:
    """Carry bytes both ways until both sides have ended; each end is passed on as it comes.

    `early` was read from the client already. `scans`: placeholders may be about, and are refused.
    Denied and Failed as for any connection; the caller closes both sockets.
    """
    leaving = Leaving() if scans else None

    def look(chunk: memoryview) -> None:
        if leaving is not None and leaving.feed(bytes(chunk)):
            raise Denied("was sent a placeholder")

    async def upwards() -> None:
        first = await _first_bytes(client, host, port, early)
        if first:
            look(memoryview(first))
            bounds.count_sent(len(first))
            await asyncio.get_running_loop().sock_sendall(upstream, first)
            await _pump(client, upstream, bounds.count_sent, look)
        else:
            _shut(upstream)

    await bounds.keep(upwards(), _pump(upstream, client, bounds.count_received, None))


async def _first_bytes(client: socket.socket, host: str, port: int, early: bytes) -> bytes:
    """What the client says first, once it may pass; empty if it says nothing and ends."""
    loop = asyncio.get_running_loop()
    first = early or await loop.sock_recv(client, MAX_HELLO_BYTES)
    if not first or check_hello(first, host, port):
        return first
    try:
        async with asyncio.timeout(_HELLO_S):
            while not check_hello(first, host, port):
                more = await loop.sock_recv(client, MAX_HELLO_BYTES)
                if not more:
                    raise Denied("was sent half a TLS hello")
                first += more
    except TimeoutError:
        raise Denied("was sent half a TLS hello") from None
    return first


class _Buffer:
    """What one way of a connection is read into; grows while it is filled."""

    large_left = _LARGE_BUFFERS
    """Of the whole process."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(_FIRST_CHUNK_BYTES))
        self._is_large = False

    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        _Buffer.large_left += self._is_large

    def grow_if_filled(self, size: int) -> None:
        if size < len(self.view) or self._is_large:
            return
        if size < _SMALL_CHUNK_BYTES:
            self.view = memoryview(bytearray(4 * size))
        elif _Buffer.large_left:
            _Buffer.large_left -= 1
            self._is_large = True
            self.view = memoryview(bytearray(_LARGE_CHUNK_BYTES))


async def _pump(
    source: socket.socket,
    target: socket.socket,
    count: Callable[[int], None],
    look: Filter | None,
) -> None:
    loop = asyncio.get_running_loop()
    with _Buffer() as buffer:
        turns = 0
        while size := await loop.sock_recv_into(source, buffer.view):
            chunk = buffer.view[:size]
            if look is not None:
                look(chunk)
            count(size)
            await loop.sock_sendall(target, chunk)
            turns += 1
            if size == len(buffer.view) or turns % _TURNS == 0:
                # Neither wait suspends while the sockets are ready; others want their turn.
                await asyncio.sleep(0)
                buffer.grow_if_filled(size)
    _shut(target)


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
