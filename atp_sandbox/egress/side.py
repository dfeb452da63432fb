"""One end of a connection where TLS is ended: a stream and its HTTP state machine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import h11

from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.heads import MAX_HEAD_BYTES

READ_BYTES = 64 * 1024


class Gone(Exception):
    """The toolkit ended the connection: nobody is left to answer."""


class Side:
    """One end of TLS and its HTTP state machine; faults come out as whose fault they are."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        role: type[h11.CLIENT] | type[h11.SERVER],
    ) -> None:
        self._reader, self._writer = reader, writer
        self.protocol = h11.Connection(role, max_incomplete_event_size=MAX_HEAD_BYTES)
        self._is_toolkit = role is h11.SERVER
        self._has_ended = False
        self.is_reused = False
        self.has_spoken = False
        """In this exchange."""

    async def next_event(self, count: Callable[[int], None]) -> object:
        """The next h11 event; `count` is told of the bytes that were read for it."""
        while True:
            try:
                event = self.protocol.next_event()
            except h11.RemoteProtocolError:
                raise self._fault() from None
            if event is not h11.NEED_DATA:
                return event
            try:
                data = await self._reader.read(READ_BYTES)
            except OSError:
                data = b""
            self._has_ended = not data
            self.has_spoken = self.has_spoken or bool(data)
            count(len(data))
            self.protocol.receive_data(data)

    async def send(self, event: h11.Event) -> None:
        """Returns when there is room for more."""
        try:
            data = self.protocol.send(event)
        except h11.LocalProtocolError:  # what the other side said cannot be said on
            raise Failed("the answer is not HTTP/1.1") from None
        if data:
            await self.write(data)

    async def write(self, data: bytes) -> None:
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            self._has_ended = True
            raise self._fault() from None

    def _fault(self) -> Exception:
        if self._is_toolkit:
            return Gone() if self._has_ended else Denied("a request that is not proper HTTP/1.1")
        if self._has_ended:
            return Failed("the host ended the connection")
        return Failed("the host's answer is not proper HTTP/1.1")

    @property
    def is_open(self) -> bool:
        """Whether another exchange may begin: nothing that nobody asked for, no end of file."""
        waiting = self.protocol.trailing_data[0]
        return not (waiting or self._reader.at_eof() or self._writer.is_closing())

    def start_next(self) -> bool:
        """Begin another exchange; False if this connection's state does not allow for one."""
        if self.protocol.our_state is h11.DONE and self.protocol.their_state is h11.DONE:
            self.protocol.start_next_cycle()
            self.is_reused, self.has_spoken = True, False
            return True
        return False

    async def discard(self) -> None:
        """Read until the end: closing with bytes unread would take back what was written."""
        while await self._reader.read(READ_BYTES):
            pass

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """At once, and after `close` without effect."""
        # A connection that has ended already is no fault, but is one to asyncio of CPython 3.11.2.
        with contextlib.suppress(AttributeError):
            self._writer.transport.abort()
