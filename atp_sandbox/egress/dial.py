"""From a name that is allowed to a connected socket: resolve once, judge, dial what was judged."""

from __future__ import annotations

import asyncio
import encodings.idna  # noqa: F401  # getaddrinfo needs it, and later no file can be read
import itertools
import os
import socket
from collections.abc import Iterable
from typing import Protocol

from atp_sandbox.egress.denial import Failed
from atp_sandbox.egress.gate import Gate, Target

_RESOLVE_S = 10.0
_DIAL_S = 10.0
"""For all addresses together."""
_MAX_ADDRESSES = 16


class Resolver(Protocol):
    """Numeric addresses of a host, in the order to try them, and the port to dial there."""

    async def resolve(self, host: str, port: int) -> tuple[list[str], int]:
        """OSError if it has none."""
        ...


class SystemResolver:
    """The machine's own: getaddrinfo(3), in a thread."""

    async def resolve(self, host: str, port: int) -> tuple[list[str], int]:
        loop = asyncio.get_running_loop()
        rows = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [str(row[4][0]) for row in rows], port


class Rerouted:
    """Some hosts by a table, for tests and trials: their answers come in turn, one a call."""

    def __init__(
        self, table: Iterable[tuple[str, int, list[str], int]], otherwise: Resolver
    ) -> None:
        self._table = {(host, port): (itertools.cycle(a), to) for host, port, a, to in table}
        self._otherwise = otherwise

    async def resolve(self, host: str, port: int) -> tuple[list[str], int]:
        found = self._table.get((host, port))
        if found is None:
            return await self._otherwise.resolve(host, port)
        return [next(found[0])], found[1]


async def dial(gate: Gate, target: Target, resolver: Resolver) -> socket.socket:
    """A connected socket; its peer is an address that was judged. Raises Denied or Failed."""
    try:
        async with asyncio.timeout(_RESOLVE_S):
            addresses, port = await _resolve(gate, target, resolver)
    except TimeoutError:
        raise Failed("could not be resolved in time") from None
    except (OSError, UnicodeError):
        raise Failed("could not be resolved") from None
    allowed = gate.judge(target, addresses[:_MAX_ADDRESSES])
    try:
        async with asyncio.timeout(_DIAL_S):
            return await _dial_any(allowed, port)
    except TimeoutError:
        raise Failed("did not answer in time") from None


async def _resolve(gate: Gate, target: Target, resolver: Resolver) -> tuple[list[str], int]:
    """A look-up that nobody waits for any more still counts until its thread is done with it."""
    await gate.resolving.acquire()
    looking = asyncio.ensure_future(resolver.resolve(target.host, target.port))

    def done(future: asyncio.Future[tuple[list[str], int]]) -> None:
        gate.resolving.release()
        if not future.cancelled():
            future.exception()  # seen, whether or not somebody still waits

    looking.add_done_callback(done)
    return await asyncio.shield(looking)


async def _dial_any(addresses: list[str], port: int) -> socket.socket:
    reason = ""
    for address in addresses:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, (address, port))
            return sock
        except OSError as error:
            sock.close()
            # Not its own text: asyncio puts the address into it.
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
        except BaseException:
            sock.close()
            raise
    raise Failed(f"could not be reached: {reason}")
