"""A server name is read from any hello that is one, however it is split, and from nothing else."""

from __future__ import annotations

import ssl

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.egress.hello import (
    MAX_HELLO_BYTES,
    MAX_RECORDS,
    UNMATCHABLE,
    ClientHello,
    NotTls,
    read_hello,
)

SERVER_NAME, ALPN, ENCRYPTED = 0, 16, 0xFE0D


def vector(content: bytes, length_size: int) -> bytes:
    return len(content).to_bytes(length_size, "big") + content


def extension(kind: int, content: bytes) -> bytes:
    return kind.to_bytes(2, "big") + vector(content, 2)


def name_entry(name: bytes, kind: int = 0) -> bytes:
    return bytes([kind]) + vector(name, 2)


def server_name(*entries: bytes) -> bytes:
    return extension(SERVER_NAME, vector(b"".join(entries), 2))


def message(*extensions: bytes, padding: int = 0) -> bytes:
    """A client hello with its header, without records."""
    body = b"\x03\x03" + bytes(32) + vector(bytes(32), 1) + vector(b"\x13\x01", 2) + b"\x01\x00"
    if padding:
        extensions += (extension(21, bytes(padding)),)
    body += vector(b"".join(extensions), 2)
    return b"\x01" + vector(body, 3)


def record(content: bytes) -> bytes:
    return b"\x16\x03\x01" + vector(content, 2)


def records(content: bytes, size: int) -> bytes:
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    return b"".join(record(part) for part in parts)


def named(name: bytes) -> str | None:
    found = read_hello(record(message(server_name(name_entry(name)))))
    assert isinstance(found, ClientHello)
    return found.server_name


def real(name: str | None, *, alpn: list[str] | None = None, only_tls12: bool = False) -> bytes:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    if only_tls12:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if alpn:
        context.set_alpn_protocols(alpn)
    sent = ssl.MemoryBIO()
    connection = context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        connection.do_handshake()
    return sent.read()


GOOD = message(server_name(name_entry(b"api.example.com")), extension(ALPN, b"\0\3\2h2"))
HELLOS = {
    "named": real("api.example.com"),
    "unnamed": real(None),
    "alpn": real("api.example.com", alpn=["h2", "http/1.1"]),
    "tls 1.2": real("api.example.com", only_tls12=True),
    "three records": records(GOOD, len(GOOD) // 3 + 1),
    "byte records": records(GOOD[:60], 1) + record(GOOD[60:]),
    "encrypted": record(message(server_name(name_entry(b"x.y")), extension(ENCRYPTED, b"\0"))),
}


@pytest.mark.parametrize("name", HELLOS)
def test_every_prefix_of_a_hello_needs_more_and_what_follows_it_is_ignored(name: str) -> None:
    hello = HELLOS[name]
    for end in range(len(hello)):
        assert read_hello(hello[:end]) is None
    whole = read_hello(hello)
    assert isinstance(whole, ClientHello)
    for more in (b"\x00", b"GET / HTTP/1.1\r\n", hello, bytes(MAX_HELLO_BYTES)):
        assert read_hello(hello + more) == whole


def test_a_real_client_is_read_as_it_was_configured() -> None:
    named_only = ClientHello("api.example.com", False, ())
    assert read_hello(HELLOS["named"]) == named_only
    assert read_hello(HELLOS["tls 1.2"]) == named_only
    assert read_hello(HELLOS["unnamed"]) == ClientHello(None, False, ())
    both = ClientHello("api.example.com", False, ("h2", "http/1.1"))
    assert read_hello(HELLOS["alpn"]) == both


def test_a_hello_over_several_records_is_read_as_if_in_one() -> None:
    expected = ClientHello("api.example.com", False, ("h2",))
    for size in range(4, len(GOOD) + 1):
        assert read_hello(records(GOOD, size)) == expected


def test_an_encrypted_hello_is_said_to_be_one() -> None:
    assert read_hello(HELLOS["encrypted"]) == ClientHello("x.y", True, ())


def test_a_hello_without_extensions_names_no_server() -> None:
    body = b"\x03\x01" + bytes(32) + b"\x00" + vector(b"\x00\x2f", 2) + b"\x01\x00"
    assert read_hello(record(b"\x01" + vector(body, 3))) == ClientHello(None, False, ())


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (b"API.Example.COM", "api.example.com"),
        (b"api.example.com.", "api.example.com"),
        (b"xn--bcher-kva.example", "xn--bcher-kva.example"),
        (b"a_b.example", "a_b.example"),
        (b"a" * 63 + b".example", "a" * 63 + ".example"),
        (b"api.example.com..", UNMATCHABLE),
        (b".api.example.com", UNMATCHABLE),
        (b"api..example.com", UNMATCHABLE),
        (b"", UNMATCHABLE),
        (b".", UNMATCHABLE),
        (b"api.example.com\x00", UNMATCHABLE),
        (b"api.example.com\x00.evil.example", UNMATCHABLE),
        (b"api.example.com\n", UNMATCHABLE),
        (b" api.example.com", UNMATCHABLE),
        (b"*.example.com", UNMATCHABLE),
        (b"api.example.com:443", UNMATCHABLE),
        (b"2a00::1", UNMATCHABLE),
        ("bücher.example".encode(), UNMATCHABLE),
        ("api。example。com".encode(), UNMATCHABLE),
        ("\u212aelvin.example".encode(), UNMATCHABLE),
        (b"a" * 64 + b".example", UNMATCHABLE),
        (b".".join([b"a" * 63] * 4), UNMATCHABLE),
    ],
)
def test_a_name_is_canonical_or_matches_none(sent: bytes, read: str) -> None:
    assert named(sent) == read


ONE = name_entry(b"a.example")


@pytest.mark.parametrize(
    "extensions",
    [
        [server_name(ONE), server_name(ONE)],
        [server_name(ONE), server_name(name_entry(b"b.example"))],
        [server_name(ONE), extension(43, b""), extension(43, b"")],
        [server_name(ONE, name_entry(b"b.example"))],
        [server_name(ONE, ONE)],
        [server_name(ONE, name_entry(b"b.example", kind=1))],
        [server_name(name_entry(b"a.example", kind=1))],
        [server_name()],
        [extension(SERVER_NAME, b"")],
        [extension(SERVER_NAME, vector(ONE, 2) + b"\x00")],
        [extension(SERVER_NAME, vector(ONE + b"\x00", 2))],
        [extension(SERVER_NAME, vector(ONE[:-1], 2))],
        [extension(SERVER_NAME, vector(ONE, 2)[:-1])],
    ],
)
def test_a_server_name_that_could_be_read_in_two_ways_matches_none(extensions: list[bytes]) -> None:
    assert read_hello(record(message(*extensions))) == ClientHello(UNMATCHABLE, False, ())


def test_what_matches_none_is_not_taken_for_no_name() -> None:
    assert UNMATCHABLE
    assert named(UNMATCHABLE.encode()) == UNMATCHABLE


@pytest.mark.parametrize(
    "first",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"EHLO me\r\n",
        b"GET / HTTP/1.1\r\n",
        b"PRI * HTTP/2.0\r\n",
        b"\x00\x00\x00\x08\x04\xd2\x16\x2f",  # PostgreSQL asks for TLS
        b"\x80\x2e\x01\x00\x02",  # a hello in the style of SSLv2
        b"\x17\x03\x03",
        b"\x15\x03\x03",
        b"\x16\x02",
        b"\x16\x04",
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\x40\x01",
        b"\x16\x03\x01\x00\x04\x02",
        b"\x16\x03\x01\x00\x04\x00",
        record(b"\x01\x00") + b"\x17",
        record(b"\x01" + MAX_HELLO_BYTES.to_bytes(3, "big")),
        b"\x16\x03\x01\x40\x00\x01\xff\xff\xff",
    ],
)
def test_what_is_no_client_hello_is_known_by_its_first_wrong_byte(first: bytes) -> None:
    assert isinstance(read_hello(first), NotTls)
    known = [isinstance(read_hello(first[:end]), NotTls) for end in range(len(first) + 1)]
    assert known == sorted(known)
    if first[0] != 0x16:
        assert known[1]
    else:
        assert not known[-2]


@pytest.mark.parametrize("end", range(4, len(GOOD)))
def test_a_hello_that_is_shorter_than_its_fields_is_none(end: int) -> None:
    cut = b"\x01" + vector(GOOD[4:end], 3)
    found = read_hello(record(cut))
    without_extensions = 4 + 2 + 32 + 33 + 4 + 2
    if end == without_extensions:
        assert found == ClientHello(None, False, ())
    else:
        assert isinstance(found, NotTls)


@pytest.mark.parametrize(
    "body",
    [
        b"\x02\x00" + bytes(32) + b"\x00" + vector(b"\x13\x01", 2) + b"\x01\x00",
        b"\x03\x03" + bytes(32) + vector(bytes(33), 1) + vector(b"\x13\x01", 2) + b"\x01\x00",
        b"\x03\x03" + bytes(32) + b"\x00" + vector(b"", 2) + b"\x01\x00",
        b"\x03\x03" + bytes(32) + b"\x00" + vector(b"\x13", 2) + b"\x01\x00",
        b"\x03\x03" + bytes(32) + b"\x00" + vector(b"\x13\x01", 2) + b"\x00",
        b"\x03\x03" + bytes(32) + b"\x00" + vector(b"\x13\x01", 2) + b"\x01\x00" + b"\x00\x00\x00",
        GOOD[4:] + b"\x00",
    ],
)
def test_a_hello_with_a_field_out_of_range_is_none(body: bytes) -> None:
    assert isinstance(read_hello(record(b"\x01" + vector(body, 3))), NotTls)


def test_a_hello_with_large_keys_is_read_up_to_the_bound_and_not_beyond() -> None:
    name = server_name(name_entry(b"a.example"))
    for padding in (1_700, 16_000, 32_000):
        found = read_hello(records(message(name, padding=padding), 2**14))
        assert found == ClientHello("a.example", False, ())
    fixed = len(records(message(name, padding=32_000), 2**14)) - 32_000
    at_bound = records(message(name, padding=MAX_HELLO_BYTES - fixed), 2**14)
    assert len(at_bound) == MAX_HELLO_BYTES
    assert isinstance(read_hello(at_bound), ClientHello)
    assert read_hello(at_bound[:-1]) is None
    beyond = records(message(name, padding=MAX_HELLO_BYTES - fixed + 1), 2**14)
    assert isinstance(read_hello(beyond), NotTls)
    assert isinstance(read_hello(beyond[:-1]), NotTls)


def test_a_hello_in_too_many_records_is_none() -> None:
    small = records(GOOD[:MAX_RECORDS], 1)
    assert isinstance(read_hello(small), NotTls)
    assert read_hello(small[:-1]) is None
    assert isinstance(read_hello(small + record(GOOD[MAX_RECORDS:])), NotTls)


def test_no_reason_repeats_what_was_sent() -> None:
    for first in (b"SECRET", record(b"SECRET"), record(b"\x01" + vector(b"\x03SECRET" * 9, 3))):
        found = read_hello(first)
        assert isinstance(found, NotTls)
        assert "SECRET" not in found.reason


mutated = st.tuples(
    st.sampled_from(list(HELLOS.values())), st.integers(0), st.binary(max_size=4)
).map(lambda parts: _overwrite(*parts))
hostile = st.one_of(
    st.binary(),
    st.binary(max_size=200).map(lambda body: record(b"\x01" + vector(body, 3))),
    st.binary(max_size=200).map(lambda body: record(message(body))),
    mutated,
)


def _overwrite(data: bytes, at: int, piece: bytes) -> bytes:
    at %= len(data) + 1
    return data[:at] + piece + data[at + len(piece) :]


@given(hostile, st.binary())
def test_an_answer_to_any_bytes_is_not_changed_by_more_of_them(data: bytes, more: bytes) -> None:
    data += more
    answers = [read_hello(data[:end]) for end in range(len(data) + 1)]
    decided = [answer for answer in answers if answer is not None]
    assert answers == [None] * (len(answers) - len(decided)) + decided
    assert all(answer == decided[0] for answer in decided)


@given(hostile)
def test_a_server_name_is_canonical_whatever_was_sent(data: bytes) -> None:
    found = read_hello(data)
    if isinstance(found, ClientHello) and found.server_name not in (None, UNMATCHABLE):
        assert found.server_name is not None
        assert set(found.server_name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
        assert not found.server_name.endswith(".")
