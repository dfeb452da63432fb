"""Whatever bytes come, messages of the table or FrameError come out, and at most one frame stays.

Whoever writes them is hostile: each rule of the grammar has a test, and no split changes anything.
"""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers import frames
from workers.frames import (
    ARRAY,
    BOOL,
    BYTES,
    FROM_WORKER,
    HEAD_BYTES,
    HEADER_BYTES,
    INT,
    MAX_VALUES,
    NONE,
    STR,
    Decoder,
    FrameError,
    FrameTooLong,
    Message,
    encode,
    is_oversize,
    oversize_head,
)

TABLE = {
    "nothing": (),
    "all": (BOOL, INT, STR, BYTES, ARRAY),
    "either": ((NONE, BYTES),),
    "kill": (ARRAY,),
}
MOST = 4096

ints = st.integers(-(2**63), 2**64 - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]))
values = st.tuples(st.booleans(), ints, texts, st.binary(), st.lists(ints, max_size=20))
messages = st.one_of(
    st.just(["nothing"]),
    st.tuples(st.just("all"), values).map(lambda pair: [pair[0], *pair[1]]),
    (st.none() | st.binary()).map(lambda value: ["either", value]),
)
trees = st.recursive(
    st.none() | st.booleans() | ints | st.floats() | texts | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
)
mutated = st.tuples(st.lists(messages, max_size=4), st.integers(0), st.binary(max_size=9)).map(
    lambda parts: _overwrite(b"".join(encode(*m) for m in parts[0]), parts[1], parts[2])
)
framed = st.one_of(st.binary(), trees.map(msgpack.packb)).map(lambda body: framed_bytes(body))
hostile = st.one_of(st.binary(), framed, mutated, st.lists(framed, max_size=3).map(b"".join))


def framed_bytes(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def _overwrite(data: bytes, at: int, piece: bytes) -> bytes:
    at %= len(data) + 1
    return data[:at] + piece + data[at + len(piece) :]


def refused(body: bytes, most: int = MOST) -> str:
    with pytest.raises(FrameError) as caught:
        Decoder(TABLE, most).feed(framed_bytes(body))
    return str(caught.value)


def read(pieces: list[bytes]) -> tuple[list[Message], bool]:
    """Every message of `pieces`, and whether a violation followed."""
    decoder = Decoder(TABLE, MOST)
    found: list[Message] = []
    for piece in pieces:
        try:
            found += decoder.feed(piece)
        except FrameError as error:
            assert decoder.pending_bytes == 0
            return found + error.messages, True
        assert decoder.pending_bytes < max(MOST, HEAD_BYTES) + HEADER_BYTES
    return found, False


@given(st.lists(messages))
def test_what_was_sent_arrives(sent: list[Message]) -> None:
    assert read([b"".join(encode(*message) for message in sent)]) == (sent, False)


@given(hostile, st.lists(st.integers(0, 4096)))
def test_any_split_of_any_bytes_gives_the_same(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    whole = read([data])
    assert repr(read(pieces)) == repr(whole)
    assert repr(read([bytes([byte]) for byte in data])) == repr(whole)


@given(hostile)
def test_only_messages_of_the_table_come_out(data: bytes) -> None:
    kinds = {BOOL: bool, INT: int, STR: str, BYTES: bytes, ARRAY: list, NONE: type(None)}
    for name, *rest in read([data])[0]:
        columns: tuple[Any, ...] = TABLE[name]
        assert len(rest) == len(columns)
        for value, column in zip(rest, columns, strict=True):
            allowed = column if isinstance(column, tuple) else (column,)
            assert type(value) in [kinds[kind] for kind in allowed]
            assert type(value) is not list or all(type(item) is int for item in value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        msgpack.packb([]),
        msgpack.packb(["unknown"]),
        msgpack.packb([b"nothing"]),
        msgpack.packb([["nothing"]]),
        msgpack.packb("nothing"),
        msgpack.packb({"nothing": 1}),
        msgpack.packb(["nothing", 1]),
        msgpack.packb(["either"]),
        msgpack.packb(["kill", [1, True]]),
        msgpack.packb(["kill", [b"1"]]),
        msgpack.packb(["kill", [1.0]]),
        msgpack.packb(["nothing"]) + b"\x00",
        msgpack.packb(["kill", [1, 2]])[:-1],
        msgpack.packb(["either", b"12"])[:-1],
        b"\xc1",
    ],
)
def test_a_frame_that_is_not_one_message_of_the_table_is_refused(body: bytes) -> None:
    refused(body)


@pytest.mark.parametrize("column", [NONE, BOOL, INT, STR, BYTES, ARRAY])
@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (NONE, None),
        (BOOL, True),
        (INT, 1),
        (INT, -(2**40)),
        (STR, ""),
        (BYTES, b""),
        (ARRAY, []),
        ("float", 1.0),
        ("map", {}),
        ("map", {"a": 1}),
        ("extension", msgpack.ExtType(1, b"")),
        ("extension", msgpack.ExtType(1, b"four")),
        ("timestamp", msgpack.Timestamp(1)),
        ("timestamp", msgpack.Timestamp(1, 1)),
    ],
)
def test_a_value_is_of_its_columns_type_and_of_no_other(
    column: str, kind: str, value: object
) -> None:
    frame = framed_bytes(msgpack.packb(["m", value]))
    decoder = Decoder({"m": (column,)}, MOST)
    if kind == column:
        assert decoder.feed(frame) == [["m", value]]
    else:
        with pytest.raises(FrameError):
            decoder.feed(frame)


@pytest.mark.parametrize("text", [b"\xed\xa0\x80", b"\xff", b"\xc0\x80"])
def test_a_string_that_is_no_utf8_is_refused(text: bytes) -> None:
    name = bytes([0x91, 0xA0 + len(text)]) + text
    refused(name)
    value = msgpack.packb(["m", ""])[:-1] + bytes([0xA0 + len(text)]) + text
    with pytest.raises(FrameError):
        Decoder({"m": (STR,)}, MOST).feed(framed_bytes(value))


def test_a_lone_surrogate_cannot_be_sent_either() -> None:
    with pytest.raises(UnicodeEncodeError):
        encode("all", "\ud800")


def test_a_frame_too_long_is_refused_by_its_head_alone() -> None:
    head = bytes(range(HEAD_BYTES))
    assert Decoder(TABLE, 100).feed(struct.pack(">I", 100) + head) == []
    decoder = Decoder(TABLE, 100)
    assert decoder.feed(struct.pack(">I", 101) + head[:-1]) == []
    with pytest.raises(FrameTooLong) as caught:
        decoder.feed(head[-1:])
    assert caught.value.head == head


def test_an_oversize_answer_is_known_by_its_head_and_by_its_call_only() -> None:
    call_id = bytes(range(16))
    decoder = Decoder(FROM_WORKER, 100_000)
    with pytest.raises(FrameTooLong) as caught:
        decoder.feed(oversize_head(call_id, 200_000))
    assert is_oversize(caught.value.head, call_id)
    assert not is_oversize(caught.value.head, bytes(16))
    assert not is_oversize(bytes(HEAD_BYTES), call_id)
    whole = encode("answer", call_id, "result", bytes(200_000))
    assert is_oversize(whole[HEADER_BYTES : HEADER_BYTES + HEAD_BYTES], call_id)


def test_nothing_is_read_after_a_violation_and_nothing_kept() -> None:
    decoder = Decoder(TABLE, MOST)
    with pytest.raises(FrameError) as caught:
        decoder.feed(encode("nothing") + framed_bytes(b"\xc0") + encode("nothing"))
    assert caught.value.messages == [["nothing"]]
    with pytest.raises(FrameError) as again:
        decoder.feed(encode("nothing"))
    assert again.value.messages == []
    assert decoder.pending_bytes == 0


def test_an_array_has_a_most_of_elements() -> None:
    most = encode("kill", [1] * MAX_VALUES)
    assert Decoder(TABLE, 2**20).feed(most) == [["kill", [1] * MAX_VALUES]]
    refused(msgpack.packb(["kill", [1] * (MAX_VALUES + 1)]), 2**20)


_MEGABYTE = 2**20


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\x00\x0f\xff\xfb" + b"\x90" * (_MEGABYTE - 5),
        b"\x92\xa4kill" + b"\x9f" * (_MEGABYTE - 6),
        b"\x92\xa4kill" + b"\xdd\x00\x00\x27\x10" + b"\x90" * (_MEGABYTE - 11),
        b"\x92\xa4kill" + b"\x91" * (_MEGABYTE - 7) + b"\x90",
        b"\x92\xa4kill" + b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xdf\xff\xff\xff\xff" * 1000,
        b"\x92\xa4kill\xdb\xff\xff\xff\xff",
        b"\x92\xa6either\xc6\xff\xff\xff\xff",
    ],
    ids=["flat", "nested wide", "inner flat", "deep", "claimed", "outer", "map", "str", "bytes"],
)
def test_a_frame_of_containers_costs_no_more_than_its_own_size(body: bytes) -> None:
    decoder = Decoder(TABLE, _MEGABYTE)
    frame = framed_bytes(body)
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            decoder.feed(frame)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * _MEGABYTE


def test_no_reason_repeats_what_was_in_the_frame() -> None:
    for body in (
        ["SECRET"],
        ["kill", "SECRET"],
        ["all", "SECRET"],
        "SECRET",
        ["nothing", "SECRET"],
    ):
        assert "SECRET" not in refused(msgpack.packb(body))


DIRECTIONS = (
    frames.TO_WARDEN,
    frames.FROM_WARDEN,
    frames.TO_ZYGOTE,
    frames.FROM_ZYGOTE,
    frames.TO_WORKER,
    frames.FROM_WORKER,
)
SAMPLES = {NONE: None, BOOL: True, INT: 7, STR: "s", BYTES: b"b", ARRAY: [1, 2]}


@pytest.mark.parametrize("table", DIRECTIONS)
def test_each_direction_takes_its_own_messages_and_no_other(
    table: dict[str, tuple[Any, ...]],
) -> None:
    for name, columns in table.items():
        kinds = [column if isinstance(column, tuple) else (column,) for column in columns]
        for row in itertools.product(*kinds):
            sent = [SAMPLES[kind] for kind in row]
            assert Decoder(table, MOST).feed(encode(name, *sent)) == [[name, *sent]]
            for other in DIRECTIONS:
                if name not in other:
                    with pytest.raises(FrameError):
                        Decoder(other, MOST).feed(encode(name, *sent))
