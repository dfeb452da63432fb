"""Every query gets the answer that there is no such name, and no bytes get more than that."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.egress.dns import (
    FORMERR,
    MAX_MESSAGE_BYTES,
    NXDOMAIN,
    DnsError,
    Queries,
    Query,
    canonical_name,
    refuse,
)

A, AAAA, IN = 1, 28, 1
RD = 0x0100
EDNS = b"\x00" + struct.pack(">HHIH", 41, 1200, 0, 0)  # as glibc asks with `options edns0`


def wire_name(*labels: bytes) -> bytes:
    return b"".join(bytes([len(label)]) + label for label in labels) + b"\x00"


EXAMPLE = wire_name(b"api", b"example", b"com")


def message(
    name: bytes = EXAMPLE,
    *,
    flags: int = RD,
    questions: int = 1,
    additional: bytes = b"",
    qtype: int = A,
) -> bytes:
    header = struct.pack(">6H", 0xBEEF, flags, questions, 0, 0, 1 if additional else 0)
    return header + name + struct.pack(">HH", qtype, IN) + additional


def framed(body: bytes) -> bytes:
    return struct.pack(">H", len(body)) + body


def one(body: bytes) -> Query:
    (query,) = Queries().feed(framed(body))
    return query


def fields(answer: bytes) -> tuple[int, ...]:
    """Length, id, flags and the four counts."""
    return struct.unpack_from(">7H", answer)


def read(pieces: list[bytes]) -> tuple[list[Query], bool]:
    queries = Queries()
    found: list[Query] = []
    for piece in pieces:
        try:
            found += queries.feed(piece)
        except DnsError as error:
            assert queries.pending_bytes == 0
            return found + error.queries, True
        assert queries.pending_bytes < 2 + MAX_MESSAGE_BYTES
    return found, False


@pytest.mark.parametrize("qtype", [A, AAAA, 65])
@pytest.mark.parametrize("additional", [b"", EDNS])
def test_a_query_is_answered_field_by_field_with_no_such_name(
    qtype: int, additional: bytes
) -> None:
    query = one(message(wire_name(b"API", b"eXample", b"com"), qtype=qtype, additional=additional))
    assert (query.id, query.name, query.qtype) == (0xBEEF, "api.example.com", qtype)
    answer = refuse(query)
    length, answer_id, flags, *counts = fields(answer)
    assert length == len(answer) - 2
    assert answer_id == 0xBEEF
    assert flags == 0x8000 | RD | 0x0080 | NXDOMAIN
    assert counts == [1, 0, 0, 0]
    # As it was sent, capitals too: glibc compares, and others check that their case comes back.
    question = wire_name(b"API", b"eXample", b"com") + struct.pack(">HH", qtype, IN)
    assert answer[14:] == question


def test_recursion_is_desired_in_the_answer_only_if_it_was_in_the_query() -> None:
    assert fields(refuse(one(message(flags=RD))))[2] & RD
    assert not fields(refuse(one(message(flags=0))))[2] & RD


def test_no_other_flag_of_the_query_comes_back() -> None:
    assert fields(refuse(one(message(flags=0x07FF))))[2] == 0x8000 | RD | 0x0080 | NXDOMAIN


@pytest.mark.parametrize(
    "body",
    [
        message(flags=0x8000),
        message(flags=0x2000),  # status
        message(flags=0x2800),  # update
        message(questions=0),
        message(questions=2),
        message(b"\xc0\x0c"),
        message(b"\x03api\xc0\x0c"),
        message(b"\x40" + b"a" * 64 + b"\x00"),
        message(b"\x80"),
        message(wire_name(*[b"a" * 62] * 4, b"aa")),  # 256 bytes
        message(EXAMPLE[:-1]),
        message()[:-1],
        message()[:12],
        message()[:11],
        message()[:2],
    ],
)
def test_what_is_no_standard_query_is_answered_as_malformed(body: bytes) -> None:
    query = one(body)
    assert query.is_malformed
    assert query.name is None
    answer = refuse(query)
    length, answer_id, flags, *counts = fields(answer)
    assert (length, answer_id, counts) == (12, 0xBEEF, [0, 0, 0, 0])
    assert flags & 0x8000
    assert flags & 0xF == FORMERR
    assert len(answer) == 14


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        ([b"API", b"Example", b"COM"], "api.example.com"),
        ([b"_sip", b"_tcp", b"a-b"], "_sip._tcp.a-b"),
        ([b"localhost"], "localhost"),
        ([b"a" * 63], "a" * 63),
        ([b"a" * 63] * 3 + [b"a" * 61], ".".join(["a" * 63] * 3 + ["a" * 61])),
        ([], None),
        ([b"api.example", b"com"], None),
        ([b"api\x00", b"com"], None),
        ([b"api\n"], None),
        ([b"a b"], None),
        ([b"*", b"example"], None),
        (["bücher".encode()], None),
        ([b"\xff"], None),
    ],
)
def test_a_name_is_given_only_if_a_host_could_have_it(
    labels: list[bytes], name: str | None
) -> None:
    query = one(message(wire_name(*labels)))
    assert query.name == name
    assert not query.is_malformed
    assert fields(refuse(query))[2] & 0xF == NXDOMAIN


def test_a_list_of_labels_is_no_name_where_one_is_empty_or_too_long() -> None:
    for labels in ([b""], [b"a", b""], [b"", b"a"], [b"a" * 64], [b"a" * 63] * 4):
        assert canonical_name(labels) is None


def test_two_queries_at_once_are_answered_in_their_order() -> None:
    found = Queries().feed(framed(message(qtype=A)) + framed(message(qtype=AAAA)))
    assert [query.qtype for query in found] == [A, AAAA]


def test_a_message_too_long_ends_the_connection_before_it_is_kept() -> None:
    most = message() + bytes(MAX_MESSAGE_BYTES - len(message()))
    assert one(most).name == "api.example.com"
    queries = Queries()
    with pytest.raises(DnsError) as caught:
        queries.feed(framed(message()) + struct.pack(">H", MAX_MESSAGE_BYTES + 1))
    assert [query.name for query in caught.value.queries] == ["api.example.com"]
    assert queries.pending_bytes == 0
    with pytest.raises(DnsError) as again:
        queries.feed(framed(message()))
    assert again.value.queries == []


@pytest.mark.parametrize("body", [b"", b"\x01"])
def test_a_message_without_an_id_ends_the_connection(body: bytes) -> None:
    with pytest.raises(DnsError):
        Queries().feed(framed(body))


bodies = st.one_of(
    st.binary(min_size=2, max_size=40),
    st.binary(max_size=300).map(message),
    st.lists(st.binary(max_size=63), max_size=5).map(lambda labels: message(wire_name(*labels))),
)
streams = st.one_of(st.binary(), st.lists(bodies.map(framed), max_size=4).map(b"".join))


@given(streams, st.lists(st.integers(0, 2000)))
def test_any_split_of_any_bytes_gives_the_same_queries(data: bytes, cuts: list[int]) -> None:
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    whole = read([data])
    assert read([data[a:b] for a, b in itertools.pairwise(places)]) == whole
    assert read([bytes([byte]) for byte in data]) == whole


@given(streams)
def test_no_answer_holds_a_record_or_is_longer_than_its_query(data: bytes) -> None:
    for query in read([data])[0]:
        answer = refuse(query)
        length, answer_id, flags, questions, *counts = fields(answer)
        assert length == len(answer) - 2 == 12 + len(query.question)
        assert (answer_id, counts) == (query.id, [0, 0, 0])
        assert questions == (0 if query.is_malformed else 1)
        assert flags & 0xF == (FORMERR if query.is_malformed else NXDOMAIN)
