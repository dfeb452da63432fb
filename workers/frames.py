"""The pipe between supervisor and jail: framing, and the one place that lists its messages.

PURE: bytes in, messages out; no I/O, no clock. Used on both sides of the wall. A frame is a length
(4 bytes, big-endian) and that many bytes of msgpack, one array whose first element names the message.
Values are None, bool, int, str, bytes and arrays of these; anything else is a violation, as is a
frame longer than the reader allows. After a violation the stream is unusable and its peer ends.

    supervisor → warden     slot, free, kill
    warden → supervisor     up, failed, slot_ready, exited
    supervisor → zygote     go, fork, become
    zygote → supervisor     locked, discovered, broken, stopped, fork_failed
    supervisor → worker     call
    worker → supervisor     ready, answer
"""

from __future__ import annotations

import struct
from typing import Any, Dict, List, Tuple, Union

import msgpack

Value = Union[None, bool, int, str, bytes, List[Any]]
Message = List[Any]

HEADER_BYTES = 4
MAX_CONTROL_BYTES = 64 * 1024
"""Largest control frame but for `discovered`."""
MAX_DISCOVERED_BYTES = 32 * 1024 * 1024
"""A report of every tool with its source."""
MAX_DEPTH = 6
MAX_VALUES = 100_000
"""Elements of one frame: a megabyte of empty arrays would become 64 MB of objects."""

_header = struct.Struct(">I")

NONE, BOOL, INT, STR, BYTES, ARRAY = "none", "bool", "int", "str", "bytes", "array"
_TYPES: Dict[str, Tuple[type, ...]] = {
    NONE: (type(None),),
    BOOL: (bool,),
    INT: (int,),
    STR: (str,),
    BYTES: (bytes,),
    ARRAY: (list,),
}

# One row a message: the types that each element after the name may have.
TO_WARDEN = {
    "slot": (INT,),  # slot: mount a fresh scratch directory for it
    "free": (INT,),  # slot: unmount it
    "kill": (ARRAY,),  # process ids inside the jail
}
FROM_WARDEN = {
    "up": (INT,),  # the zygote's process id inside the jail
    "failed": (STR, INT, STR),  # step, errno, what was attempted
    "slot_ready": (INT,),
    "exited": (INT, INT, INT, INT, ARRAY),
    # process id inside the jail, wait status, CPU µs, peak resident KiB, remaining children
}
TO_ZYGOTE = {
    "go": (),  # the supervisor has verified the confinement: import the toolkit
    "fork": (INT, INT),  # worker number, slot; with it two descriptors: call channel, output
    "become": (INT, INT),  # the same, but the zygote itself serves (lifetime "jail")
}
FROM_ZYGOTE = {
    "locked": (),  # confined, waiting for "go"
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


def encode(name: str, *values: Value) -> bytes:
    """One frame, ready to be sent."""
    body: bytes = msgpack.packb([name, *values])
    return _header.pack(len(body)) + body


class FrameTooLong(FrameError):
    """The peer announced a frame beyond the reader's bound; nothing of it was kept."""


class Decoder:
    """Turns a byte stream into messages of one table; any split of the bytes gives the same ones."""

    def __init__(self, table: Dict[str, Tuple[Any, ...]], max_frame_bytes: int) -> None:
        self._table = table
        self._buffer = bytearray()
        self.max_frame_bytes = max_frame_bytes

    def feed(self, data: bytes) -> List[Message]:
        """The messages that `data` completes; FrameError at the first violation."""
        buffer = self._buffer
        buffer += data
        messages: List[Message] = []
        start = 0
        while len(buffer) - start >= HEADER_BYTES:
            (length,) = _header.unpack_from(buffer, start)
            if length > self.max_frame_bytes:
                raise FrameTooLong(f"a frame of {length} bytes, {self.max_frame_bytes} allowed")
            end = start + HEADER_BYTES + length
            if len(buffer) < end:
                break
            messages.append(self._parse(bytes(buffer[start + HEADER_BYTES : end])))
            start = end
        if start:
            del buffer[:start]
        return messages

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that has begun and not ended."""
        return len(self._buffer)

    def _parse(self, body: bytes) -> Message:
        try:
            message = msgpack.unpackb(
                body,
                use_list=True,
                strict_map_key=True,
                max_map_len=0,
                max_ext_len=0,
                max_array_len=MAX_VALUES,
            )
        except Exception as error:  # msgpack raises a dozen classes; none of them says more to us
            raise FrameError("a frame that is no single msgpack value") from error
        if not isinstance(message, list) or not message or not isinstance(message[0], str):
            raise FrameError("a frame that is no named message")
        columns = self._table.get(message[0])
        if columns is None:
            raise FrameError("a message that has no place here")
        if len(message) != len(columns) + 1:
            raise FrameError(f"{message[0]}: {len(message) - 1} values, {len(columns)} expected")
        for value, column in zip(message[1:], columns):
            names = column if isinstance(column, tuple) else (column,)
            if not any(type(value) in _TYPES[name] for name in names):
                raise FrameError(f"{message[0]}: a value of the wrong type")
            if type(value) is list and not all(type(item) is int for item in value):
                raise FrameError(f"{message[0]}: an array of something else than integers")
        return message
