"""What passes is JSON that any peer reads alike: finite, bounded in depth, no half characters."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.limits import MAX_JSON_DEPTH
from atp_sandbox.strict_json import check_json, is_too_deep

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@given(values)
def test_what_python_encodes_passes_unchanged(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return  # a key with a lone surrogate
    text = json.dumps(value, allow_nan=False)
    assert check_json(text.encode()) == text


@given(st.binary() | values.map(lambda v: json.dumps(v).encode()))
def test_anything_else_is_a_value_error(body: bytes) -> None:
    try:
        text = check_json(body)
    except ValueError:
        return
    assert text.encode() == body
    json.dumps(json.loads(text), ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"1 2",
        b"[1,]",
        b"{1: 2}",
        b"'a'",
        b"01",
        b"\xef\xbb\xbf1",
        b'"\n"',
        b'"\\x"',
        '"é"'.encode(),
        b'"\xff"',
        "1".encode("utf-16"),
    ],
)
def test_what_is_not_json_in_ascii_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_json(body)


@pytest.mark.parametrize("word", [b"NaN", b"Infinity", b"-Infinity", b'{"a": [NaN]}'])
def test_words_that_json_does_not_have_are_refused(word: bytes) -> None:
    with pytest.raises(ValueError, match="no JSON"):
        check_json(word)


@pytest.mark.parametrize(
    "number",
    ["1e309", "-1E309", "[1e+0000309]", "9" * 309 + ".0", "1" * 250 + "e99", "1.8e308", "1e99999"],
)
def test_a_number_beyond_a_double_is_refused(number: str) -> None:
    with pytest.raises(ValueError, match="too large"):
        check_json(number.encode())


@given(st.integers(-400, 400), st.integers(1, 350), st.integers(0, 350))
def test_no_spelling_of_an_infinite_number_passes(power: int, before: int, after: int) -> None:
    text = "9" * before + ("." + "9" * after if after else "") + f"e{power}"
    if math.isinf(float(text)):
        with pytest.raises(ValueError, match="too large"):
            check_json(text.encode())
    else:
        assert check_json(text.encode()) == text


@pytest.mark.parametrize("text", ['"1e999"', "1e308", "1e-999", "1" * 400, f'"{"9" * 400}"'])
def test_what_only_looks_infinite_passes(text: str) -> None:
    assert check_json(text.encode()) == text


def test_depth_is_bounded_where_python_gives_up_and_before() -> None:
    assert check_json(nested(MAX_JSON_DEPTH))
    for depth in (MAX_JSON_DEPTH + 1, 900, 10_000, 500_000):
        with pytest.raises(ValueError, match="deep"):
            check_json(nested(depth))


def test_many_containers_side_by_side_are_not_deep() -> None:
    assert check_json(json.dumps([[] for _ in range(10_000)]).encode())


@pytest.mark.parametrize("text", [r'"\ud800"', r'"\uDC00x"', r'{"\udbff": 1}', r'["\udc00\ud800"]'])
def test_a_lone_surrogate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        check_json(text.encode())


@pytest.mark.parametrize("text", [r'"\ud83d\ude00"', r'"\\ud800"'])
def test_a_surrogate_pair_and_an_escaped_escape_pass(text: str) -> None:
    assert check_json(text.encode()) == text


@given(st.integers(1, 30), st.booleans(), st.integers(1, 30))
def test_too_deep_counts_levels_of_lists_and_objects(depth: int, as_dict: bool, most: int) -> None:
    value: Any = 1
    for level in range(depth):
        value = {"k": value} if as_dict and level % 2 else [0, value]
    assert is_too_deep(value, most) == (depth > most)


def test_a_hostile_text_takes_no_more_than_linear_time() -> None:
    started = time.monotonic()
    check_json(b"[" + b"1" * 199 + b".5" + b",1" * 400_000 + b"]")
    check_json(b'"' + b"1" * 1_000_000 + b'"')
    assert time.monotonic() - started < 5
