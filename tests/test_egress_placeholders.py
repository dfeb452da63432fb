"""Where a placeholder may stand and a token may not: claims on bytes alone."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import secrets
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.egress.denial import Denied
from atp_sandbox.egress.placeholders import DIGITS, PREFIX, Leaving, Returning, fill_headers

PLACEHOLDER = (PREFIX + secrets.token_hex(DIGITS // 2)).encode()
OTHER = (PREFIX + secrets.token_hex(DIGITS // 2)).encode()
TOKEN = b'ghp_tokenWith"odd/bytes+in=it&<end>'
ALIVE = {PLACEHOLDER: TOKEN}


def cut(text: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(marks)]


@given(st.binary(), st.binary(), st.lists(st.integers(0, 200)))
def test_a_placeholder_is_seen_leaving_however_the_stream_is_split(
    before: bytes, after: bytes, places: list[int]
) -> None:
    leaving = Leaving()
    assert any([leaving.feed(part) for part in cut(before + PLACEHOLDER + after, places)])
    assert leaving.feed(b"")


@given(st.lists(st.sampled_from([b"atp-", b"placeholder", b"-", b"atp-placeholder", b"x", b""])))
def test_nothing_but_the_prefix_counts_as_a_placeholder(parts: list[bytes]) -> None:
    leaving = Leaving()
    for end, part in enumerate(parts, 1):
        assert leaving.feed(part) is (PREFIX.encode() in b"".join(parts[:end]))


@given(st.binary(), st.lists(st.integers(0, 200)))
def test_an_answer_without_the_token_passes_unchanged(body: bytes, places: list[int]) -> None:
    returning = Returning([b"\x00\x01\x00\x01\x00\x02"])
    if b"\x00\x01\x00\x01\x00\x02" in body:
        return
    passed = b"".join(returning.feed(part) for part in cut(body, places))
    assert passed + returning.finish() == body


@pytest.mark.parametrize(
    "shape",
    [
        TOKEN,
        quote(TOKEN, safe="").encode(),
        json.dumps(TOKEN.decode()).encode(),
        json.dumps(TOKEN.decode()).replace("/", "\\/").encode(),
        TOKEN.hex().encode(),
        *(base64.b64encode(b"user-"[:size] + b":" + TOKEN + b"tail") for size in range(5)),
        *(base64.urlsafe_b64encode(b"u" * size + b":" + TOKEN) for size in range(3)),
    ],
)
@given(places=st.lists(st.integers(0, 200)))
def test_no_byte_of_a_returning_token_passes_however_it_is_told_and_split(
    shape: bytes, places: list[int]
) -> None:
    returning, passed = Returning([TOKEN]), b""
    with contextlib.suppress(Denied):
        for part in cut(b"told: " + shape + b" end", places):
            passed += returning.feed(part)
        pytest.fail("the token passed")
    # Base64 has up to eight letters before the token's own that are of the user's name.
    assert len(passed) <= len(b"told: ") + 8
    assert b"told: ".startswith(passed[:6])


def test_what_might_have_begun_a_token_passes_as_the_answer_ends() -> None:
    returning = Returning([TOKEN])
    assert returning.feed(b"x" + TOKEN[:5]) == b"x"
    assert returning.finish() == TOKEN[:5]


def test_an_empty_token_is_found_nowhere() -> None:
    assert Returning([b""]).feed(b"abc") == b"abc"


def test_tokens_stand_in_for_live_placeholders_in_header_values() -> None:
    headers = [(b"Authorization", b"Bearer " + PLACEHOLDER), (b"X-Two", PLACEHOLDER * 2)]
    filled = fill_headers([*headers, (b"Accept", b"*/*")], ALIVE)
    assert filled == [
        (b"Authorization", b"Bearer " + TOKEN),
        (b"X-Two", TOKEN * 2),
        (b"Accept", b"*/*"),
    ]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("credentials", [b"user:%b", b"%b:x-oauth-basic", b":%b"])
def test_the_token_is_put_into_basic_credentials(credentials: bytes, padded: bool) -> None:
    encoded = base64.b64encode(credentials % PLACEHOLDER)
    value = b"Basic " + (encoded if padded else encoded.rstrip(b"="))
    ((_, filled),) = fill_headers([(b"authorization", value)], ALIVE)
    assert base64.b64decode(filled.removeprefix(b"Basic ")) == credentials % TOKEN


@pytest.mark.parametrize("value", [b"Basic !!!", b"Basic", b"Basic YQ", b"Basic A", b"Digest x=1"])
def test_credentials_without_a_placeholder_are_not_touched(value: bytes) -> None:
    assert fill_headers([(b"Authorization", value)], ALIVE) == [(b"Authorization", value)]


@pytest.mark.parametrize(
    "header",
    [
        (b"Authorization", b"Bearer " + OTHER),
        (b"Authorization", b"Basic " + base64.b64encode(b"user:" + OTHER)),
        (b"X", PREFIX.encode() + b"invented"),
        (b"X", PLACEHOLDER + PREFIX.encode()),
        (PLACEHOLDER, b"x"),
        (b"Host", PLACEHOLDER),
    ],
)
def test_a_placeholder_that_is_not_alive_or_in_a_wrong_place_is_denied(
    header: tuple[bytes, bytes],
) -> None:
    with pytest.raises(Denied) as caught:
        fill_headers([header], ALIVE)
    assert PREFIX not in caught.value.reason


@pytest.mark.parametrize("token", [b"", b"a\r\nb", b"a\nb", b"a\0b", b" a", b"a ", b"a\x7fb"])
def test_a_token_that_would_break_its_header_is_never_put_in(token: bytes) -> None:
    with pytest.raises(Denied):
        fill_headers([(b"X", PLACEHOLDER)], {PLACEHOLDER: token})
