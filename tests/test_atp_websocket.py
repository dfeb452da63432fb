"""The codec against the RFC, and against two libraries that others trust."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket import ABNF
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN
from websockets.server import ServerProtocol

from atp_sandbox.atp.websocket import (
    Close,
    Decoder,
    Event,
    Message,
    Ping,
    Pong,
    ProtocolError,
    encode_close,
    encode_ping,
    encode_pong,
    encode_text,
)

LIMIT = 1 << 20
MASK = b"\x01\x80\xfe\x33"
SIZES = [0, 1, 3, 4, 125, 126, 127, 300, 65535, 65536, 65537, 200_003]


def frame(opcode: int, payload: bytes = b"", *, first_bits: int = 0x80, masked: int = 0) -> bytes:
    """A server's frame, built by hand."""
    size = len(payload)
    if size < 126:
        length = bytes((masked | size,))
    elif size < 1 << 16:
        length = bytes((masked | 126,)) + size.to_bytes(2, "big")
    else:
        length = bytes((masked | 127,)) + size.to_bytes(8, "big")
    return bytes((first_bits | opcode,)) + length + payload


def decode(data: bytes, limit: int = LIMIT) -> list[Event]:
    return Decoder(limit).feed(data)


def fault(data: bytes, limit: int = LIMIT) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        decode(data, limit)
    return caught.value


@pytest.mark.parametrize("size", SIZES)
def test_messages_of_every_length_form_are_decoded(size: int) -> None:
    data = b"x" * size
    assert decode(frame(1, data) + frame(2, data)) == [Message(data, True), Message(data, False)]


def test_fragments_are_joined_with_pings_between() -> None:
    data = (
        frame(1, b"a\xc3", first_bits=0)
        + frame(9, b"p")
        + frame(0, b"", first_bits=0)
        + frame(10)
        + frame(0, b"\xa9b")
    )
    assert decode(data) == [Ping(b"p"), Pong(b""), Message("aéb".encode(), True)]


def test_binary_fragments_need_not_be_utf8() -> None:
    assert decode(frame(2, b"\xff", first_bits=0) + frame(0, b"\xfe")) == [
        Message(b"\xff\xfe", False)
    ]


@pytest.mark.parametrize(
    ("payload", "event"),
    [
        (b"", Close(None, "")),
        (b"\x03\xe8", Close(1000, "")),
        (b"\x03\xf3bye", Close(1011, "bye")),
        (b"\x0f\xa1" + "é".encode(), Close(4001, "é")),
    ],
)
def test_close_frames_are_read_and_end_everything(payload: bytes, event: Close) -> None:
    decoder = Decoder(LIMIT)
    assert decoder.feed(frame(8, payload) + frame(1, b"after")) == [event]
    assert decoder.feed(frame(3)) == []


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(3), 1002),
        (frame(7), 1002),
        (frame(11), 1002),
        (frame(1, first_bits=0xC0), 1002),
        (frame(1, first_bits=0xA0), 1002),
        (frame(1, first_bits=0x90), 1002),
        (frame(1, masked=0x80) + MASK, 1002),
        (frame(9, first_bits=0), 1002),
        (frame(9, b"x" * 126), 1002),
        (frame(0, b"x"), 1002),
        (frame(1, b"x", first_bits=0) + frame(1, b"y"), 1002),
        (frame(1, b"x", first_bits=0) + frame(2, b"y", first_bits=0), 1002),
        (frame(8, b"x"), 1002),
        (frame(8, (1005).to_bytes(2, "big")), 1002),
        (frame(8, (999).to_bytes(2, "big")), 1002),
        (frame(8, (2000).to_bytes(2, "big")), 1002),
        (frame(8, (5000).to_bytes(2, "big")), 1002),
        (frame(8, b"\x03\xe8\xff"), 1007),
        (frame(1, b"\xff\xfe"), 1007),
        (frame(1, b"\xc3", first_bits=0) + frame(0, b"("), 1007),
        (frame(1, b"\xed\xa0\x80"), 1007),
    ],
)
def test_each_violation_has_its_close_code(data: bytes, code: int) -> None:
    assert fault(data).close_code == code


def test_a_fault_hands_over_what_came_before_it_and_stays() -> None:
    decoder = Decoder(LIMIT)
    for _ in range(2):
        with pytest.raises(ProtocolError) as caught:
            decoder.feed(frame(1, b"good") + frame(3))
        assert caught.value.close_code == 1002
        assert caught.value.events in ([Message(b"good", True)], [])


def test_a_message_too_large_is_refused_before_it_is_read() -> None:
    assert decode(frame(1, b"x" * 10), 10) == [Message(b"x" * 10, True)]
    assert fault(frame(1, b"x" * 11)[:2], 10).close_code == 1009
    assert fault(frame(1, b"x" * 6, first_bits=0) + frame(0, b"x" * 5), 10).close_code == 1009
    assert fault(b"\x81\x7f" + b"\xff" * 8).close_code == 1009


def outcome(pieces: list[bytes]) -> tuple[list[Event], int | None]:
    decoder = Decoder(1000)
    events: list[Event] = []
    try:
        for piece in pieces:
            events += decoder.feed(piece)
    except ProtocolError as error:
        return events + error.events, error.close_code
    return events, None


frames = st.builds(
    lambda opcode, payload, bits: frame(opcode, payload, first_bits=bits),
    st.sampled_from([0, 1, 1, 1, 2, 8, 9, 10, 3]),
    st.one_of(
        st.binary(max_size=20),
        st.text(max_size=20).map(str.encode),
        st.sampled_from([b"", b"\x03\xe8", b"x" * 126, b"y" * 999, b"z" * 1001]),
    ),
    st.sampled_from([0x80, 0x80, 0x80, 0x00, 0xC0]),
)


@settings(max_examples=300)
@given(st.lists(frames, max_size=8), st.data())
def test_any_split_of_the_bytes_gives_the_same_events(
    parts: list[bytes], data: st.DataObject
) -> None:
    whole = b"".join(parts)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12).map(sorted))
    edges = [0, *cuts, len(whole)]
    assert outcome([whole[a:b] for a, b in pairwise(edges)]) == outcome([whole])


@settings(max_examples=50)
@given(st.lists(frames, max_size=5))
def test_byte_by_byte_gives_the_same_events(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert outcome([whole[i : i + 1] for i in range(len(whole))]) == outcome([whole])


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes) -> None:
    outcome([data])


@pytest.mark.parametrize("size", SIZES)
def test_text_frames_equal_websocket_clients_own(size: int) -> None:
    text = ("é" + "x" * size)[:size]
    theirs = ABNF.create_frame(text, ABNF.OPCODE_TEXT)
    theirs.get_mask_key = lambda _length: MASK
    assert encode_text(text, MASK) == theirs.format()


@pytest.mark.parametrize(
    ("ours", "opcode", "data"),
    [
        (encode_ping(b"", MASK), ABNF.OPCODE_PING, b""),
        (encode_pong(b"mid", MASK), ABNF.OPCODE_PONG, b"mid"),
        (encode_close(1000, "", MASK), ABNF.OPCODE_CLOSE, b"\x03\xe8"),
        (encode_close(1002, "no", MASK), ABNF.OPCODE_CLOSE, b"\x03\xeano"),
    ],
)
def test_control_frames_equal_websocket_clients_own(ours: bytes, opcode: int, data: bytes) -> None:
    theirs = ABNF(1, 0, 0, 0, opcode, 1, data)
    theirs.get_mask_key = lambda _length: MASK
    assert ours == theirs.format()


def test_a_control_frame_too_long_is_not_made() -> None:
    with pytest.raises(ValueError, match="125"):
        encode_ping(b"x" * 126, MASK)


def open_server() -> ServerProtocol:
    server = ServerProtocol(max_size=None)
    server.state = OPEN
    server.parser = server.parse()
    next(server.parser)
    return server


@pytest.mark.parametrize("size", SIZES)
def test_the_websockets_library_reads_what_we_write(size: int) -> None:
    server = open_server()
    text = "é" * (size // 2) + "x" * (size % 2)
    server.receive_data(
        encode_text(text, os.urandom(4))
        + encode_pong(b"p", os.urandom(4))
        + encode_close(1000, "", os.urandom(4))
    )
    received = [event for event in server.events_received() if isinstance(event, Frame)]
    assert [(event.opcode, bytes(event.data)) for event in received] == [
        (Opcode.TEXT, text.encode()),
        (Opcode.PONG, b"p"),
        (Opcode.CLOSE, b"\x03\xe8"),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_we_read_what_the_websockets_library_writes(size: int) -> None:
    server = open_server()
    server.send_text(b"x" * size)
    server.send_binary(b"\xff" * size)
    server.send_text(b"a", fin=False)
    server.send_ping(b"p")
    server.send_continuation(b"b", fin=True)
    server.send_close(1012, "bye")
    assert decode(b"".join(server.data_to_send())) == [
        Message(b"x" * size, True),
        Message(b"\xff" * size, False),
        Ping(b"p"),
        Message(b"ab", True),
        Close(1012, "bye"),
    ]
