"""The pipe between supervisor and jail: framing, and the one place that lists its messages.

PURE: bytes in, messages out; no I/O, no clock. Used on both sides of the wall. A frame is a length
(4 bytes, big-endian) and that many bytes of msgpack: one array whose first element names the
message. Values are None, bool, int, str, bytes and arrays of int, as the message's row in the
tables below has them; any other is refused by its first byte, before anything is made of it. A
frame longer than the reader allows is a violation too. After one the stream is unusable and its
peer ends.

    supervisor → warden     slot, measure
    warden → supervisor     forked, up, failed, slot_ready, measured, exited
    supervisor → zygote     go, fork, become
    zygote → supervisor     refused, locked, discovered, broken, stopped, fork_failed
    supervisor → worker     call
    worker → supervisor     ready, answer
"""

from __future__ import annotations

import struct
from typing import Any, Union

import msgpack

Value = Union[None, bool, int, str, bytes, list[int]]
Message = list[Any]

HEADER_BYTES = 4
CALL_ID_BYTES = 16
HEAD_BYTES = 64
"""What is looked at of a frame that is too long to be read."""
MAX_CONTROL_BYTES = 64 * 1024
"""Largest control frame but for `discovered`."""
MAX_DISCOVERED_BYTES = 32 * 1024 * 1024
"""A report of every tool with its source."""
_SMALL_BYTES = 64 * 1024
"""Frames up to here are read by one unpacker for all; its buffer stays."""
MAX_VALUES = 10_000
"""Elements of one array, which hold process ids: a jail has at most a few hundred."""

_header = struct.Struct(">I")
_length = _header.unpack_from
_unpack = msgpack.unpackb

NONE, BOOL, INT, STR, BYTES, ARRAY = "none", "bool", "int", "str", "bytes", "array"


def _kinds() -> list[str]:
    """What each first byte of a msgpack value announces; empty for all that has no place here."""
    kinds = [""] * 256  # maps, floats and extensions stay so
    kinds[0x00:0x80] = [INT] * 0x80
    kinds[0xE0:0x100] = [INT] * 0x20
    kinds[0x90:0xA0] = [ARRAY] * 0x10
    kinds[0xA0:0xC0] = [STR] * 0x20
    kinds[0xC0] = NONE
    kinds[0xC2:0xC4] = [BOOL] * 2
    kinds[0xC4:0xC7] = [BYTES] * 3
    kinds[0xCC:0xD4] = [INT] * 8
    kinds[0xD9:0xDC] = [STR] * 3
    kinds[0xDC:0xDE] = [ARRAY] * 2
    return kinds


_KINDS = _kinds()

# One row a message: the types that each element after the name may have.
TO_WARDEN = {
    "slot": (INT,),  # slot: mount a fresh scratch directory for it, in place of what it had
    "measure": (INT,),  # slot: is it full?
}
FROM_WARDEN = {
    "forked": (INT,),  # from the builder, before it ends: the warden's process id outside
    "up": (INT,),  # the zygote's process id inside the jail
    "failed": (STR, INT, STR),  # step, errno, what was attempted
    "slot_ready": (INT, BOOL),  # slot; whether what it had before was full
    "measured": (INT, BOOL),  # slot, whether it is full
    "exited": (INT, INT, INT, INT, ARRAY),
    # process id inside the jail, wait status, CPU µs, peak resident KiB, remaining children
}
TO_ZYGOTE = {
    "go": (),  # the supervisor has verified the confinement: import the toolkit
    "fork": (INT, INT, STR),
    # worker number, slot, its ticket at the way out; with it the descriptors of its call channel,
    # its output and, if it is for more than one call, its permits
    "become": (INT, INT, STR),  # the same, but the zygote itself serves (lifetime "jail")
}
FROM_ZYGOTE = {
    "refused": (STR, INT, STR),  # step of its confinement, errno, what was attempted
    "locked": (INT,),  # confined and verified from inside, waiting for "go"; Landlock's ABI
    "discovered": (BYTES,),  # JSON, see workers.discovery
    "broken": (STR, STR),  # what ended the import, the end of its traceback
    "stopped": (INT,),  # number of the client whose stop() was called
    "fork_failed": (INT, INT),  # worker number, errno
}
TO_WORKER = {
    "call": (BYTES, INT, BYTES, (NONE, BYTES), BOOL),
    # random call id, number of the registration, params and token as JSON, whether it is a sample
}
FROM_WORKER = {
    "ready": (INT,),  # worker number
    "answer": (BYTES, STR, BYTES),
    # call id; "result" and JSON text, or "error" / "invalid" and a sentence in UTF-8
}


class FrameError(Exception):
    """The peer broke the grammar; the message says which rule, never what was in the frame."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.messages: list[Message] = []
        """What the same bytes completed before the violation; still valid."""


class FrameTooLong(FrameError):
    """The peer announced a frame beyond the reader's bound; but for `head`, nothing was kept."""

    def __init__(self, message: str, head: bytes) -> None:
        super().__init__(message)
        self.head = head
        """The first bytes of the frame's body."""


_pack = msgpack.Packer().pack


def encode(name: str, *values: Value) -> bytes:
    """One frame, ready to be sent."""
    body: bytes = _pack((name, *values))
    return _header.pack(len(body)) + body


_BESIDE_RESULT_BYTES = 64 * 1024


def oversize_head(call_id: bytes, result_bytes: int) -> bytes:
    """The beginning of the frame that would answer `call_id` with a result of `result_bytes`.

    A worker sends it in place of a result that is too large anyway; `is_oversize` knows it again.
    More is announced than a reader allows a frame beside its result, so that none waits for it.
    """
    result_bytes += _BESIDE_RESULT_BYTES
    head = _answer_head(call_id) + b"\xc6" + _header.pack(result_bytes)
    return _header.pack(len(head) + result_bytes) + head + bytes(HEAD_BYTES)


def is_oversize(head: bytes, call_id: bytes) -> bool:
    """Whether a frame that begins with `head` answers `call_id` with a large result."""
    return head.startswith(_answer_head(call_id) + b"\xc6")  # bin 32, as of 64 KiB


def _answer_head(call_id: bytes) -> bytes:
    packed: bytes = msgpack.packb(["answer", call_id, "result", 0])
    return packed[:-1]


class TrustingDecoder:
    """As `Decoder`, for zygotes and workers, whose peer is the supervisor: nothing is checked.

    What checking writes to would be copied, page by page, with every fork.
    """

    def __init__(self) -> None:
        self._begun = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes."""
        buffer: bytes | bytearray = data
        if self._begun:
            self._begun += data
            buffer = self._begun
        messages, start = [], 0
        while len(buffer) - start >= HEADER_BYTES:
            end = start + HEADER_BYTES + _length(buffer, start)[0]
            if end > len(buffer):
                break
            messages.append(_unpack(memoryview(buffer)[start + HEADER_BYTES : end]))
            start = end
        if start or buffer is data:
            self._begun = bytearray(memoryview(buffer)[start:])
        return messages


class Decoder:
    """Turns a byte stream into messages of one table, the same ones for any split of the bytes."""

    def __init__(self, table: dict[str, tuple[Any, ...]], max_frame_bytes: int) -> None:
        self._table = table
        self._types = _flat_types(table)
        self._unpacker: Any = None
        self._buffer = bytearray()
        self._is_broken = False
        self.max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> list[Message]:
        """The messages that `data` completes; FrameError at the first violation and ever after."""
        if self._is_broken:
            raise FrameError("data after a violation")
        messages: list[Message] = []
        try:
            if self._buffer:
                self._buffer += data
            else:
                self._buffer += self._parse_whole(data, messages)
            while (body := self._take_body()) is not None:
                messages.append(self._parse(body))
        except FrameError as error:
            self._is_broken = True
            self._buffer.clear()
            error.messages = messages
            raise
        return messages

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that has begun and not ended."""
        return len(self._buffer)

    def _parse_whole(self, data: bytes, messages: list[Message]) -> bytes:
        """Parse what `data` holds of whole frames, uncopied; gives the rest."""
        position = 0
        while len(data) - position >= HEADER_BYTES:
            (length,) = _header.unpack_from(data, position)
            end = position + HEADER_BYTES + length
            if end > len(data) or length > self.max_frame_bytes:
                break
            messages.append(self._parse(data[position + HEADER_BYTES : end]))
            position = end
        return data[position:]

    def _take_body(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < HEADER_BYTES:
            return None
        (length,) = _header.unpack_from(buffer)
        if length > self.max_frame_bytes:
            if len(buffer) < HEADER_BYTES + HEAD_BYTES:
                return None
            head = bytes(buffer[HEADER_BYTES : HEADER_BYTES + HEAD_BYTES])
            raise FrameTooLong(f"a frame of {length} bytes, {self.max_frame_bytes} allowed", head)
        end = HEADER_BYTES + length
        if len(buffer) < end:
            return None
        body = bytes(buffer[HEADER_BYTES:end])
        del buffer[:end]  # moves its start, not its content
        return body

    def _parse(self, body: bytes) -> Message:
        if self._types is not None and len(body) <= _SMALL_BYTES:
            return self._parse_flat(body, self._types)
        unpacker = msgpack.Unpacker(max_buffer_size=len(body))
        unpacker.feed(body)
        try:
            message = self._read(body, unpacker)
        except FrameError:
            raise
        except Exception as error:  # msgpack raises a dozen classes; none of them says more to us
            raise FrameError("a frame that is no whole msgpack value") from error
        if unpacker.tell() != len(body):
            raise FrameError("a frame with more than one value")
        return message

    def _parse_flat(self, body: bytes, table: dict[str, tuple[frozenset[type], ...]]) -> Message:
        """As `_parse`, for a short frame of a table without arrays: nothing nested can be in it."""
        if self._unpacker is None:
            self._unpacker = msgpack.Unpacker(
                max_buffer_size=_SMALL_BYTES, max_array_len=0, max_map_len=0, max_ext_len=0
            )
        unpack = self._unpacker.unpack
        end = self._unpacker.tell() + len(body)
        self._unpacker.feed(body)
        try:
            length = self._unpacker.read_array_header()
            name = unpack() if length else None
            columns = table.get(name) if type(name) is str else None
            if columns is None:
                raise FrameError("a message that has no place here")
            if length != len(columns) + 1:
                raise FrameError(f"{name}: {length - 1} values, {len(columns)} expected")
            message = [name]
            for types in columns:
                value = unpack()
                if type(value) not in types:
                    raise FrameError(f"{name}: a value of the wrong type")
                message.append(value)
        except FrameError:
            raise
        except Exception as error:  # as in `_parse`
            raise FrameError("a frame that is no whole msgpack value") from error
        if self._unpacker.tell() != end:
            raise FrameError("a frame with more than one value")
        return message

    def _read(self, body: bytes, unpacker: Any) -> Message:
        if _KINDS[body[0]] != ARRAY:
            raise FrameError("a frame that is no array")
        length = unpacker.read_array_header()
        if not length or _KINDS[body[unpacker.tell()]] != STR:
            raise FrameError("a frame that is no named message")
        name = unpacker.unpack()
        columns = self._table.get(name)
        if columns is None:
            raise FrameError("a message that has no place here")
        if length != len(columns) + 1:
            raise FrameError(f"{name}: {length - 1} values, {len(columns)} expected")
        message = [name]
        for column in columns:
            kind = _KINDS[body[unpacker.tell()]]
            if kind != column and (type(column) is str or kind not in column):
                raise FrameError(f"{name}: a value of the wrong type")
            message.append(_read_ints(body, unpacker) if kind == ARRAY else unpacker.unpack())
        return message


_TYPES = {NONE: type(None), BOOL: bool, INT: int, STR: str, BYTES: bytes}


def _flat_types(
    table: dict[str, tuple[Any, ...]],
) -> dict[str, tuple[frozenset[type], ...]] | None:
    """What the values of each message may be; None if one of them is an array."""
    kinds = {
        name: [(column,) if type(column) is str else column for column in columns]
        for name, columns in table.items()
    }
    if any(ARRAY in column for columns in kinds.values() for column in columns):
        return None
    return {
        name: tuple(frozenset(_TYPES[kind] for kind in column) for column in columns)
        for name, columns in kinds.items()
    }


def _read_ints(body: bytes, unpacker: Any) -> list[int]:
    length = unpacker.read_array_header()
    if length > MAX_VALUES:
        raise FrameError(f"an array of {length} values, {MAX_VALUES} allowed")
    values = []
    for _ in range(length):
        if _KINDS[body[unpacker.tell()]] != INT:
            raise FrameError("an array of something else than integers")
        values.append(unpacker.unpack())
    return values
