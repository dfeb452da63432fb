"""The first bytes of a TLS connection: which server the client names, before any is dialled.

PURE: bytes in, a value out; nothing is decrypted. Source: RFC 8446, sections 4.1.2, 4.2 and 5.1;
RFC 6066, section 3 (server name); RFC 7301 (ALPN); RFC 9849 (encrypted hello).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from atp_sandbox.egress.dns import canonical_name

MAX_HELLO_BYTES = 32 * 1024
"""From the connection's first byte to the hello's last: 0.5 to 2 kB, with post-quantum keys too."""
MAX_RECORDS = 64
"""A hello is in one record, or in a few; each is read again whenever more bytes come."""

UNMATCHABLE = "?"
"""Stands for a server name that no server has or that two servers would read differently."""

_HANDSHAKE = 22
_MAJOR_VERSION = 3
_CLIENT_HELLO = 1
_RECORD_HEADER_BYTES = 5
_MESSAGE_HEADER_BYTES = 4
_MAX_RECORD_BYTES = 2**14
_RANDOM_BYTES = 32
_MAX_SESSION_ID_BYTES = 32

_SERVER_NAME = 0
_ALPN = 16
_ENCRYPTED_CLIENT_HELLO = 0xFE0D
_HOST_NAME = 0


@dataclass(frozen=True, slots=True)
class ClientHello:
    """What the client says in the clear of the server that it wants."""

    server_name: str | None
    """Lower-case ASCII without a dot at the end, UNMATCHABLE, or None where no name was sent."""
    is_encrypted: bool
    """There is, or seems to be, a second hello within: then `server_name` may be another's."""
    alpn: tuple[str, ...]
    """In the client's order; bytes read as Latin-1, so that none is lost."""


@dataclass(frozen=True, slots=True)
class NotTls:
    """No TLS server should take it; `reason` is half a sentence that holds nothing of the bytes.

    A lenient one might, so where a server name is demanded this is a refusal as well.
    """

    reason: str


class _Malformed(Exception):
    """Carries the reason of a NotTls."""


def read_hello(first: bytes) -> ClientHello | NotTls | None:
    """What the `first` bytes of a client are; None while more are needed.

    All bytes from the connection's first one are given each time. Once there is an answer, more
    bytes do not change it; there is one at MAX_HELLO_BYTES at the latest.
    """
    bounded = first[:MAX_HELLO_BYTES]
    try:
        message = _first_message(bounded)
        if message is not None:
            return _parse(_Reader(message))
        if len(bounded) == MAX_HELLO_BYTES:
            raise _Malformed("a client hello that is too long")
    except _Malformed as error:
        return NotTls(str(error))
    return None


def _first_message(first: bytes) -> bytes | None:
    """The client hello without its header, its records joined; None while it is not whole.

    Each rule is applied as soon as its byte is there and before any later one is looked at.
    """
    joined = b""
    for fragment in _fragments(first):
        joined += fragment
        if joined and joined[0] != _CLIENT_HELLO:
            raise _Malformed("a handshake that does not begin with a client hello")
        if len(joined) < _MESSAGE_HEADER_BYTES:
            continue
        end = _MESSAGE_HEADER_BYTES + int.from_bytes(joined[1:_MESSAGE_HEADER_BYTES], "big")
        if end > MAX_HELLO_BYTES:
            raise _Malformed("a client hello that is too long")
        if len(joined) >= end:
            return joined[_MESSAGE_HEADER_BYTES:end]
    return None


def _fragments(first: bytes) -> Iterator[bytes]:
    """What each record carries; of the last one what is there of it."""
    position = 0
    for _ in range(MAX_RECORDS):
        header = first[position : position + _RECORD_HEADER_BYTES]
        if header and header[0] != _HANDSHAKE:
            raise _Malformed("no TLS handshake")
        if len(header) > 1 and header[1] != _MAJOR_VERSION:
            raise _Malformed("no TLS handshake of a known version")
        if len(header) < _RECORD_HEADER_BYTES:
            return
        size = int.from_bytes(header[3:], "big")
        if not 0 < size <= _MAX_RECORD_BYTES:
            raise _Malformed("a TLS record that is empty or too long")
        position += _RECORD_HEADER_BYTES
        yield first[position : position + size]
        position += size
        if position > len(first):
            return
    raise _Malformed("a client hello in too many records")


class _Reader:
    """Takes fields off the front of `content`; _Malformed where it is too short."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._position = 0

    @property
    def is_at_end(self) -> bool:
        return self._position == len(self._content)

    def take(self, size: int) -> bytes:
        start, self._position = self._position, self._position + size
        if self._position > len(self._content):
            raise _Malformed("a client hello whose lengths do not fit")
        return self._content[start : self._position]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, length_size: int) -> bytes:
        """As many bytes as a length of `length_size` bytes in front of them says."""
        return self.take(self.number(length_size))

    def only_vector(self, length_size: int) -> _Reader:
        """A vector with nothing after it."""
        inner = self.vector(length_size)
        if not self.is_at_end:
            raise _Malformed("a client hello whose lengths do not fit")
        return _Reader(inner)


def _parse(hello: _Reader) -> ClientHello:
    version = hello.number(2)
    hello.take(_RANDOM_BYTES)
    session_id = hello.vector(1)
    suites = hello.vector(2)
    compressions = hello.vector(1)
    if version >> 8 != _MAJOR_VERSION or len(session_id) > _MAX_SESSION_ID_BYTES:
        raise _Malformed("a client hello with a field out of range")
    if not suites or len(suites) % 2 or not compressions:
        raise _Malformed("a client hello with a field out of range")
    if hello.is_at_end:  # TLS 1.2 without extensions (RFC 5246, section 7.4.1.2)
        return ClientHello(None, False, ())
    return _parse_extensions(hello.only_vector(2))


def _parse_extensions(reader: _Reader) -> ClientHello:
    found: dict[int, bytes] = {}
    times: Counter[int] = Counter()
    while not reader.is_at_end:
        kind = reader.number(2)
        found[kind] = reader.vector(2)
        times[kind] += 1
    server_name = _read_server_name(found[_SERVER_NAME]) if _SERVER_NAME in found else None
    if times.total() != len(times):
        # Forbidden (RFC 8446, section 4.2), and which of the two a lenient server takes is unknown.
        server_name = UNMATCHABLE
    alpn = _read_alpn(found[_ALPN]) if _ALPN in found else ()
    return ClientHello(server_name, _ENCRYPTED_CLIENT_HELLO in found, alpn)


def _read_server_name(extension: bytes) -> str:
    """The one host name of the list, UNMATCHABLE for anything else."""
    try:
        names = _Reader(extension).only_vector(2)
        kind = names.number(1)
        name = names.vector(2)
    except _Malformed:
        return UNMATCHABLE
    if kind != _HOST_NAME or not names.is_at_end:
        return UNMATCHABLE
    return canonical_name(name.removesuffix(b".").split(b".")) or UNMATCHABLE


def _read_alpn(extension: bytes) -> tuple[str, ...]:
    names = _Reader(extension).only_vector(2)
    found = []
    while not names.is_at_end:
        found.append(names.vector(1).decode("latin-1"))
    return tuple(found)
