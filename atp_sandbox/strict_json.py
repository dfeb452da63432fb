"""JSON as we accept it from a worker: one value, strict, finite, bounded in depth, pure Unicode.

PURE. The text goes out as it is once it has passed, so nothing is encoded twice.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from atp_sandbox.limits import MAX_JSON_DEPTH

_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][cdefCDEF]")


def check_json(body: bytes) -> str:
    """`body` as text if it is one JSON value that may go out; ValueError says why it may not."""
    try:
        text = body.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("the result is not spelled in ASCII") from None
    try:
        value = _decode(text)
    except RecursionError:
        raise ValueError(f"the result is nested more than {MAX_JSON_DEPTH} levels deep") from None
    if text.count("[") + text.count("{") > MAX_JSON_DEPTH and is_too_deep(value, MAX_JSON_DEPTH):
        raise ValueError(f"the result is nested more than {MAX_JSON_DEPTH} levels deep")
    if _SURROGATE.search(text) and _has_lone_surrogate(value):
        raise ValueError("the result contains a lone surrogate, which is no character")
    return text


def is_too_deep(value: Any, most: int) -> bool:
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


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
