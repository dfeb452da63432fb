"""RFC 6455 as a client speaks it, over bytes: frames in as events, frames out as bytes.

PURE: no socket, no clock, no randomness (the caller passes the masking keys). Supervisor side;
no extension is ever negotiated, so reserved bits are an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA
_CONTINUATION = 0x0
_FIN = 0x80
_MASKED = 0x80
_RESERVED_BITS = 0x70

NORMAL_CLOSURE = 1000
PROTOCOL_VIOLATION = 1002
INVALID_DATA = 1007
TOO_BIG = 1009

MAX_CONTROL_BYTES = 125
"""Payload of one control frame (RFC 6455, section 5.5)."""
_MASK_CHUNK_BYTES = 64 * 1024
"""Masked at once: larger integers leave the processor's cache and gain nothing."""


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message, fragments joined. Text is valid UTF-8 but still bytes."""

    data: bytes = field(repr=False)
    is_text: bool


@dataclass(frozen=True, slots=True)
class Ping:
    data: bytes


@dataclass(frozen=True, slots=True)
class Pong:
    data: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """The peer's last frame; `code` is None where it gave none."""

    code: int | None
    reason: str


Event = Message | Ping | Pong | Close


class ProtocolError(Exception):
    """The peer broke the protocol; `close_code` is what to tell it.

    `events` holds what was decoded before the fault in the same `feed`. The text holds nothing
    that the peer sent.
    """

    def __init__(self, close_code: int, message: str) -> None:
        super().__init__(message)
        self.close_code = close_code
        self.message = message
        self.events: list[Event] = []


class Decoder:
    """Turns what a server sends into events; how the bytes are split makes no difference.

    After a `Close` further bytes are discarded; after a `ProtocolError` each `feed` raises again.
    """

    def __init__(self, max_message_bytes: int) -> None:
        self._max_bytes = max_message_bytes
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._needed_bytes = 0
        self._fragments: bytearray | None = None
        self._fragments_are_text = False
        self._closed = False
        self._failure: ProtocolError | None = None

    def feed(self, data: bytes) -> list[Event]:
        """Events completed by `data`."""
        if self._failure is not None:
            raise ProtocolError(self._failure.close_code, self._failure.message)
        if self._closed:
            return []
        if self._parts:
            # A long frame is joined once, when it is whole, and not at each read.
            self._parts.append(data)
            self._held_bytes += len(data)
            if self._held_bytes < self._needed_bytes:
                return []
            data = b"".join(self._parts)
            self._parts.clear()
        events: list[Event] = []
        try:
            rest = self._decode(data, events)
        except ProtocolError as fault:
            self._failure = fault
            fault.events = events
            raise
        if rest < len(data) and not self._closed:
            self._parts.append(data[rest:])
            self._held_bytes = len(data) - rest
        return events

    def _decode(self, data: bytes, events: list[Event]) -> int:
        """Append the events of all whole frames; the offset of the first frame that is not."""
        position, end = 0, len(data)
        while end - position >= 2:
            first, length = data[position], data[position + 1]
            start = position + 2
            if first & _RESERVED_BITS:
                raise ProtocolError(PROTOCOL_VIOLATION, "a reserved bit is set")
            if length & _MASKED:
                raise ProtocolError(PROTOCOL_VIOLATION, "a server's frame is masked")
            if length > 125:
                start += 2 if length == 126 else 8
                if start > end:
                    self._needed_bytes = start - position
                    return position
                length = int.from_bytes(data[position + 2 : start], "big")
            opcode = first & 0x0F
            self._check_header(opcode, bool(first & _FIN), length)
            stop = start + length
            if stop > end:
                self._needed_bytes = stop - position
                return position
            payload = data[start:stop]
            position = stop
            if first == _FIN | TEXT:
                events.append(Message(_checked_text(payload), True))
            elif opcode < CLOSE:
                self._add_fragment(opcode, bool(first & _FIN), payload, events)
            elif opcode == PING:
                events.append(Ping(payload))
            elif opcode == PONG:
                events.append(Pong(payload))
            else:
                events.append(_close_event(payload))
                self._closed = True
                return end
        self._needed_bytes = 2
        return position

    def _check_header(self, opcode: int, is_final: bool, length: int) -> None:
        if opcode <= BINARY:
            if (opcode == _CONTINUATION) is (self._fragments is None):
                raise ProtocolError(PROTOCOL_VIOLATION, "fragments of a message are out of order")
            total = length if self._fragments is None else length + len(self._fragments)
            if total > self._max_bytes:
                raise ProtocolError(TOO_BIG, f"a message of more than {self._max_bytes} bytes")
        elif opcode not in (CLOSE, PING, PONG):
            raise ProtocolError(PROTOCOL_VIOLATION, f"reserved opcode {opcode}")
        elif not is_final or length > MAX_CONTROL_BYTES:
            raise ProtocolError(PROTOCOL_VIOLATION, "a control frame is fragmented or too long")

    def _add_fragment(
        self, opcode: int, is_final: bool, payload: bytes, events: list[Event]
    ) -> None:
        if is_final and self._fragments is None:
            events.append(Message(payload, False))
            return
        if self._fragments is None:
            self._fragments = bytearray()
            self._fragments_are_text = opcode == TEXT
        self._fragments += payload
        if is_final:
            whole = bytes(self._fragments)
            self._fragments = None
            if self._fragments_are_text:
                _checked_text(whole)
            events.append(Message(whole, self._fragments_are_text))


def encode_text(text: str, mask: bytes) -> bytes:
    """One unfragmented masked text frame; `mask` is 4 unpredictable bytes, fresh for each frame."""
    return _encode(TEXT, text.encode(), mask)


def encode_ping(data: bytes, mask: bytes) -> bytes:
    return _encode_control(PING, data, mask)


def encode_pong(data: bytes, mask: bytes) -> bytes:
    return _encode_control(PONG, data, mask)


def encode_close(code: int, reason: str, mask: bytes) -> bytes:
    return _encode_control(CLOSE, code.to_bytes(2, "big") + reason.encode(), mask)


def _encode_control(opcode: int, data: bytes, mask: bytes) -> bytes:
    if len(data) > MAX_CONTROL_BYTES:
        raise ValueError(f"a control frame takes at most {MAX_CONTROL_BYTES} bytes")
    return _encode(opcode, data, mask)


def _encode(opcode: int, payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    if size <= 125:
        header = bytes((_FIN | opcode, _MASKED | size))
    elif size <= 0xFFFF:
        header = bytes((_FIN | opcode, _MASKED | 126, size >> 8, size & 0xFF))
    else:
        header = bytes((_FIN | opcode, _MASKED | 127)) + size.to_bytes(8, "big")
    if size <= _MASK_CHUNK_BYTES:
        return header + mask + _xor(payload, mask)
    chunks = [header, mask]
    chunks += (
        _xor(payload[start : start + _MASK_CHUNK_BYTES], mask)
        for start in range(0, size, _MASK_CHUNK_BYTES)
    )
    return b"".join(chunks)


def _xor(payload: bytes, mask: bytes) -> bytes:
    # As one long integer: the only XOR over bytes that the standard library does in C.
    size = len(payload)
    pattern = (mask * (size // 4 + 1))[:size]
    mixed = int.from_bytes(payload, "little") ^ int.from_bytes(pattern, "little")
    return mixed.to_bytes(size, "little")


def _checked_text(payload: bytes) -> bytes:
    if not payload.isascii():
        try:
            payload.decode()
        except UnicodeDecodeError:
            raise ProtocolError(INVALID_DATA, "a text message is not UTF-8") from None
    return payload


def _close_event(payload: bytes) -> Close:
    if not payload:
        return Close(None, "")
    code = int.from_bytes(payload[:2], "big")
    # RFC 6455, section 7.4: the codes that may stand in a frame; 1012 to 1014 by IANA's registry.
    may_be_sent = 1000 <= code <= 1003 or 1007 <= code <= 1014 or 3000 <= code <= 4999
    if len(payload) == 1 or not may_be_sent:
        raise ProtocolError(PROTOCOL_VIOLATION, "a close frame without a valid code")
    try:
        return Close(code, payload[2:].decode())
    except UnicodeDecodeError:
        raise ProtocolError(INVALID_DATA, "a close reason is not UTF-8") from None
