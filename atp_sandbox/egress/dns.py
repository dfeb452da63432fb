"""A name server that resolves nothing: queries in, "no such name" out, and the name for the log.

PURE: bytes in, queries out; no socket, no clock. Only TCP is spoken, where each message follows its
length in two bytes (RFC 1035, section 4.2.2; RFC 7766). What follows the question of a query, such
as EDNS (RFC 6891), is not looked at: an answer without it is a server's that does not know it.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_MESSAGE_BYTES = 512
"""A query is a name of at most 255 bytes, a header, and what EDNS adds: under 400 as glibc asks."""
MAX_NAME_CHARACTERS = 253
"""As written with dots: 255 bytes on the wire less the first length and the root (RFC 1035)."""
MAX_LABEL_BYTES = 63
_MAX_WIRE_NAME_BYTES = 255

NXDOMAIN = 3
FORMERR = 1

_length = struct.Struct(">H")
_header = struct.Struct(">6H")  # id, flags, questions, answers, authorities, additional
_type_and_class = struct.Struct(">HH")

_RESPONSE = 0x8000
_OPCODE = 0x7800
_RECURSION_DESIRED = 0x0100
_RECURSION_AVAILABLE = 0x0080

_LABEL = re.compile(rb"[A-Za-z0-9_-]{1,%d}" % MAX_LABEL_BYTES)


@dataclass(frozen=True, slots=True)
class Query:
    """One message of a client; `name` is None where it is the root's or no host could have it."""

    id: int
    flags: int
    name: str | None
    qtype: int
    question: bytes = field(repr=False)
    """As it came, to be echoed; empty for a message that is no standard query."""

    @property
    def is_malformed(self) -> bool:
        return not self.question


class DnsError(Exception):
    """What the client sent cannot be answered; the text holds nothing of it. Close the connection.

    `queries` holds what the same bytes completed before the fault.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.queries: list[Query] = []


class Queries:
    """Turns a byte stream into queries, the same ones for any split of the bytes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._is_broken = False

    def feed(self, data: bytes) -> list[Query]:
        """The queries that `data` completes; DnsError at the first violation and ever after."""
        if self._is_broken:
            raise DnsError("data after a violation")
        self._buffer += data
        queries: list[Query] = []
        try:
            while (message := self._take_message()) is not None:
                queries.append(_parse(message))
        except DnsError as error:
            self._is_broken = True
            self._buffer.clear()
            error.queries = queries
            raise
        return queries

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that has begun and not ended, its length included."""
        return len(self._buffer)

    def _take_message(self) -> bytes | None:
        buffer = self._buffer
        if len(buffer) < _length.size:
            return None
        (length,) = _length.unpack_from(buffer)
        if length > MAX_MESSAGE_BYTES:
            raise DnsError(f"a message of {length} bytes, {MAX_MESSAGE_BYTES} allowed")
        if length < _length.size:
            raise DnsError("a message too short for an id")
        end = _length.size + length
        if len(buffer) < end:
            return None
        message = bytes(buffer[_length.size : end])
        del buffer[:end]
        return message


def refuse(query: Query) -> bytes:
    """The whole answer, its length in front: no such name, or what is asked is malformed."""
    flags = _RESPONSE | _RECURSION_AVAILABLE | query.flags & (_OPCODE | _RECURSION_DESIRED)
    flags |= FORMERR if query.is_malformed else NXDOMAIN
    answer = _header.pack(query.id, flags, 0 if query.is_malformed else 1, 0, 0, 0) + query.question
    return _length.pack(len(answer)) + answer


def canonical_name(labels: Sequence[bytes]) -> str | None:
    """Lower-case ASCII with dots between and none at the end; None if no host could be called so.

    Underscores are allowed, for they are in use. A dot within a label is not, so no two lists of
    labels give the same name but for their case.
    """
    if not labels or not all(_LABEL.fullmatch(label) for label in labels):
        return None
    name = b".".join(labels).decode("ascii").lower()
    return name if len(name) <= MAX_NAME_CHARACTERS else None


def _parse(message: bytes) -> Query:
    (query_id,) = _length.unpack_from(message)
    if len(message) < _header.size:
        return Query(query_id, 0, None, 0, b"")
    _, flags, questions, *_ = _header.unpack_from(message)
    malformed = Query(query_id, flags, None, 0, b"")
    if flags & (_RESPONSE | _OPCODE) or questions != 1:
        return malformed
    labels, end = _read_labels(message, _header.size)
    stop = end + _type_and_class.size
    if labels is None or stop > len(message):
        return malformed
    qtype, _ = _type_and_class.unpack_from(message, end)
    question = message[_header.size : stop]
    return Query(query_id, flags, canonical_name(labels), qtype, question)


def _read_labels(message: bytes, start: int) -> tuple[list[bytes] | None, int]:
    """The labels of the name at `start` and where it ends; None for labels if it is no plain name.

    The first question has nothing before it that a compression pointer (RFC 1035, section 4.1.4)
    could point to, so none is followed.
    """
    labels: list[bytes] = []
    position = start
    while position < len(message):
        size = message[position]
        position += 1
        if position + size - start > _MAX_WIRE_NAME_BYTES or size > MAX_LABEL_BYTES:
            break
        if size == 0:
            return labels, position
        labels.append(message[position : position + size])
        position += size
    return None, position
