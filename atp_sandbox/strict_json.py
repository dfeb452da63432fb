"""JSON as we accept it from a worker: one value, strict, finite, bounded in depth, pure Unicode.

PURE. The text goes out as it is once it has passed, so nothing is encoded twice.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from atp_sandbox.limits import MAX_JSON_DEPTH

_MAY_BE_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][cdefCDEF]")
_DIGIT = re.compile("[0-9]")
_LONG_EXPONENT = re.compile(r"[0-9][eE]\+?[0-9]{3}")
_LONG_INTEGER = re.compile(r"[0-9]{200}")
"""A double ends at 1.8e308, and 200 digits with a two-digit exponent stay below it."""


def check_json(body: bytes) -> str:
    """`body` as text if it is one JSON value that may go out; ValueError says why it may not."""
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("the result is not spelled in ASCII") from None
    try:
        value, end = _decoder.raw_decode(text)
        if end != len(text):
            value = _decoder.decode(text)  # white space, or more than one value
    except RecursionError:
        raise ValueError(f"the result is nested more than {MAX_JSON_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and is_too_deep(value):
        raise ValueError(f"the result is nested more than {MAX_JSON_DEPTH} levels deep")
    if _may_be_infinite(text) and not _is_finite(value):
        raise ValueError("the result contains a number too large for a double")
    if "\\" in text and _MAY_BE_SURROGATE.search(text) and _has_lone_surrogate(value):
        raise ValueError("the result contains a lone surrogate, which is no character")
    return text


def is_too_deep(value: Any, most: int = MAX_JSON_DEPTH) -> bool:
    """Whether containers nest more than `most` levels; level by level, so it never recurses."""
    level = [value] if type(value) in (dict, list) else []
    depth = 0
    while level:
        depth += 1
        if depth > most:
            return True
        level = [
            item
            for container in level
            for item in (container.values() if type(container) is dict else container)
            if type(item) is dict or type(item) is list
        ]
    return False


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"the result contains {name}, which is no JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant)


def _may_be_infinite(text: str) -> bool:
    if _LONG_EXPONENT.search(text):
        return True
    # A run of 200 digits has one of them at each 200th place, and those are looked at quickly.
    return _DIGIT.search(text[199::200]) is not None and _LONG_INTEGER.search(text) is not None


def _is_finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
