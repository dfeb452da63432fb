"""Our end of a pipe into a jail: frames in with the sender's credentials, frames out unblocked.

Each received chunk carries the process id of whoever wrote it (SO_PASSCRED, unix(7)): the kernel
does not join data of different senders. A violation of the grammar, a foreign sender or the end of
the stream is reported once, and nothing is read afterwards.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

from atp_sandbox.loop import READ, WRITE, Loop
from workers.frames import Decoder, FrameError, Message

_UCRED = struct.Struct("3i")
_ANCILLARY_BYTES = socket.CMSG_SPACE(_UCRED.size)
_CHUNK_BYTES = 256 * 1024
_received = memoryview(bytearray(_CHUNK_BYTES))
"""What was read last, for all channels: they are read one after the other, in the loop's thread. A
buffer for each read would be mapped and unmapped by the C library each time."""

MessageCallback = Callable[[Message, int], None]
ClosedCallback = Callable[[FrameError | None], None]


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """(ours, theirs): a stream pair on whose first end every chunk comes with credentials."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return ours, theirs


class Channel:
    """Owns one socket. `on_message(message, sender_pid)`, then at most one `on_closed(reason)`.

    No reason is an orderly end of stream; otherwise it is the rule that was broken.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        decoder: Decoder,
        on_message: MessageCallback,
        on_closed: ClosedCallback,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()
        self._decoder = decoder
        self._on_message = on_message
        self._on_closed = on_closed
        self._outgoing: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._is_full = False
        self._takes_no_more = False
        self.peer_pid: int | None = None
        """Once set, data from any other process is a violation."""
        loop.watch(self._fd, READ, self._on_ready)

    @property
    def is_closed(self) -> bool:
        return self._fd < 0

    def send(self, frame: bytes, descriptors: Sequence[int] = ()) -> None:
        """Queue `frame`; `descriptors` go along and are closed here once they are on their way."""
        if self.is_closed or self._takes_no_more:
            _close_all(descriptors)
            return
        self._outgoing.append((memoryview(frame), descriptors))
        if len(self._outgoing) == 1:
            self._flush()

    def read_now(self) -> None:
        """Take in what has already arrived, without waiting for the loop to say so."""
        if not self.is_closed:
            self._receive()

    def close(self) -> None:
        """Drop the socket; safe to call again. No callback follows."""
        if self.is_closed:
            return
        self._loop.unwatch(self._fd)
        self._fd = -1
        self._sock.close()
        self._drop_outgoing()
        # They know their owner, who knows us: a circle that would wait for the garbage collector.
        self._on_message, self._on_closed = _ignore, _ignore

    def _on_ready(self, events: int) -> None:
        if events & WRITE and not self.is_closed:
            self._flush()
        if events & READ and not self.is_closed:
            self._receive()

    def _receive(self) -> None:
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into([_received], _ANCILLARY_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self._end(None)  # it ended, and had not read all that it was sent
            return
        except OSError as error:
            self._end(FrameError(f"reading failed: {error.strerror}"))
            return
        if not size:
            self._end(None)
            return
        sender = _sender(ancillary)
        if flags & socket.MSG_CTRUNC or sender is None:
            # Descriptors from inside are never taken: there was no room for them above.
            self._end(FrameError("a descriptor or no credentials came with its data"))
            return
        if self.peer_pid is not None and sender != self.peer_pid:
            self._end(FrameError("another process wrote to its channel"))
            return
        violation: FrameError | None = None
        try:
            messages = self._decoder.feed(bytes(_received[:size]))
        except FrameError as error:
            messages, violation = error.messages, error
        for message in messages:
            if self.is_closed:
                return
            self._on_message(message, sender)
        if violation is not None and not self.is_closed:
            self._end(violation)

    def _flush(self) -> None:
        while self._outgoing:
            view, descriptors = self._outgoing[0]
            try:
                if descriptors:
                    rights = array.array("i", descriptors)
                    sent = self._sock.sendmsg(
                        [view], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
                    )
                    _close_all(descriptors)
                    descriptors = ()
                else:
                    sent = self._sock.send(view)
            except BlockingIOError:
                sent = 0
            except OSError:
                # The peer is gone, and reading will say so; or it would get the rest without its
                # beginning, so it gets nothing any more.
                self._takes_no_more = True
                self._drop_outgoing()
                break
            if sent < len(view):
                self._outgoing[0] = (view[sent:], descriptors)
                if not self._is_full:
                    self._is_full = True
                    self._loop.watch(self._fd, READ | WRITE, self._on_ready)
                return
            self._outgoing.popleft()
        if self._is_full:
            self._is_full = False
            self._loop.watch(self._fd, READ, self._on_ready)

    def _drop_outgoing(self) -> None:
        for _, descriptors in self._outgoing:
            _close_all(descriptors)
        self._outgoing.clear()

    def _end(self, reason: FrameError | None) -> None:
        on_closed = self._on_closed
        self.close()
        on_closed(reason)


def _ignore(*_: object) -> None: ...


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
            pid: int = _UCRED.unpack(payload[: _UCRED.size])[0]
            return pid
    return None


def _close_all(descriptors: Sequence[int]) -> None:
    for fd in descriptors:
        with contextlib.suppress(OSError):
            os.close(fd)
