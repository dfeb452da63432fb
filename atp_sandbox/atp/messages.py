"""What the backend says, as values, and what we say, as text: ATP's JSON over the websocket.

PURE. Everything is parsed here once; nothing behind this module sees an unchecked message. No
reason and no error text repeats anything of a payload.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from atp_sandbox.limits import MAX_JSON_DEPTH, MAX_REQUEST_ID_BYTES
from atp_sandbox.outcome import Failure, Kind
from atp_sandbox.strict_json import is_too_deep

MAX_HELLO_CHARS = 200
"""The backend's greeting is for the log only; longer ones are cut."""

_APP_MESSAGES = frozenset({"atp_app_request", "atp_app_action", "atp_app_terminate"})
_ABSENT: Any = object()

_decoder = json.JSONDecoder()
_decode_json = _decoder.decode
# `allow_nan=False` finds what a `parse_constant` would and 1e999 too, which decodes to infinity.
_encode_json = json.JSONEncoder(allow_nan=False).encode


@dataclass(slots=True)
class ToolRequest:
    """One call that can be tried. Not frozen: that would make each three times as slow to make."""

    request_id_json: str
    """The id as `json.dumps` spells it: to be echoed as it is."""
    tool: str
    params: dict[str, Any] = field(repr=False)
    """Strings may hold lone surrogates; every number is finite."""
    params_json: str = field(repr=False)
    auth_token_json: str | None = field(repr=False)
    """Any JSON; None where the backend gave none, or one that is false in Python."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that can be answered but not run."""

    request_id_json: str
    tool: str | None
    failure: Failure


@dataclass(frozen=True, slots=True)
class Hello:
    """The backend's greeting; nothing depends on it."""

    message: str


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message without an answer; `reason` goes to the log."""

    reason: str


def decode(payload: bytes) -> ToolRequest | Rejected | Hello | Ignored:
    """What one websocket message, text or binary, asks for. Raises nothing."""
    try:
        text = payload.decode()
        if text[:1] == "{" and text[-1:] == "}":  # no white space to skip
            message, end = _decoder.raw_decode(text)
            if end != len(text):
                return Ignored("not JSON")
        else:
            message = _decode_json(text)
    except RecursionError:
        return _reject_too_deep(payload)
    except ValueError:  # not UTF-8, not JSON, or an integer of thousands of digits
        return Ignored("not JSON")
    if type(message) is not dict:
        return Ignored("not a JSON object")
    kind = message.get("message_type")
    if kind == "atp_tool_request":
        content = message.get("payload")
        if type(content) is not dict:
            return Ignored("a tool request without a payload object")
        # A message nested deeper has at least so many brackets; counting them is cheap.
        may_be_deep = payload.count(b"[") + payload.count(b"{") > MAX_JSON_DEPTH
        return _tool_request(content, may_be_deep)
    match kind:
        case "atp_client_connected":
            return _hello(message.get("payload"))
        case str(kind) if kind in _APP_MESSAGES:
            return Ignored(f"{kind}: app sessions are not supported")
        case _:
            return Ignored("unknown message type")


def encode_response(request_id_json: str, result_json: str) -> str:
    """The text of one `tool_response`; both arguments are JSON texts already."""
    return f'{{"type": "tool_response", "request_id": {request_id_json}, "result": {result_json}}}'


def _tool_request(content: dict[str, Any], may_be_deep: bool) -> ToolRequest | Rejected | Ignored:
    request_id = content.get("request_id")
    if request_id is None:
        return Ignored("a tool request without a request_id")
    if may_be_deep and is_too_deep(request_id):
        return Ignored("a tool request with a request_id nested too deep")
    try:
        request_id_json = _encode_json(request_id)
    except ValueError:
        return Ignored("a tool request whose request_id is not finite")
    if len(request_id_json) > MAX_REQUEST_ID_BYTES:
        # Answered, but never run: nothing is to be remembered under such a name.
        return _invalid_params(request_id_json, None, _LONG_ID)

    tool = content.get("tool_name", _ABSENT)
    if type(tool) is not str:
        problem = "is missing" if tool is _ABSENT else f"must be a string, not {_json_type(tool)}"
        return Rejected(request_id_json, None, Failure(Kind.UNKNOWN_TOOL, f"tool_name {problem}"))
    params = content.get("params", _ABSENT)
    if params is _ABSENT:
        params = {}
    elif type(params) is not dict:
        problem = f"params must be a JSON object, not {_json_type(params)}"
        return _invalid_params(request_id_json, tool, problem)
    token = content.get("auth_token") or None
    if may_be_deep and is_too_deep([params, token], MAX_JSON_DEPTH + 1):
        return _invalid_params(request_id_json, tool, _TOO_DEEP)
    try:
        params_json = _encode_json(params)
    except ValueError:
        return _invalid_params(request_id_json, tool, "params " + _NOT_FINITE)
    try:
        token_json = None if token is None else _encode_json(token)
    except ValueError:
        return _invalid_params(request_id_json, tool, "auth_token " + _NOT_FINITE)
    return ToolRequest(request_id_json, tool, params, params_json, token_json)


_LONG_ID = f"request_id is longer than {MAX_REQUEST_ID_BYTES:,} bytes of JSON"
_TOO_DEEP = f"params are nested more than {MAX_JSON_DEPTH} levels deep"
_NOT_FINITE = "must hold only finite numbers, no NaN or Infinity"


def _invalid_params(request_id_json: str, tool: str | None, sentence: str) -> Rejected:
    return Rejected(request_id_json, tool, Failure(Kind.INVALID_PARAMS, sentence))


def _hello(content: Any) -> Hello:
    message = content.get("message") if type(content) is dict else None
    return Hello(message[:MAX_HELLO_CHARS] if type(message) is str else "")


def _json_type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
        case _:
            return "a number"


# A string that does not end is one piece too: tried again from each of its quotes, it would take
# quadratic time.
_JSON_PIECE = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]|[^"\[\]{}]+', re.DOTALL)
_ENVELOPE_DEPTH = 2
"""The message and its payload: everything that a rejection needs to know."""


def _reject_too_deep(payload: bytes) -> Rejected | Ignored:
    """The answer to a message that the decoder gave up on: its outermost levels are read alone."""
    depth = 0
    kept: list[str] = []
    for piece in _JSON_PIECE.findall(payload.decode()):
        if piece in ("[", "{"):
            depth += 1
            if depth > _ENVELOPE_DEPTH:
                if depth == _ENVELOPE_DEPTH + 1:
                    kept.append("null")
                continue
        elif piece in ("]", "}"):
            depth -= 1
            if depth >= _ENVELOPE_DEPTH:
                continue
        if depth <= _ENVELOPE_DEPTH:
            kept.append(piece)
    try:
        message = _decode_json("".join(kept))
        content = message["payload"]
        request_id_json = _encode_json(content["request_id"])
        tool = content.get("tool_name")
        is_request = message["message_type"] == "atp_tool_request"
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Ignored("nested too deep")
    if not is_request or request_id_json == "null":
        return Ignored("nested too deep")
    return _invalid_params(request_id_json, tool if type(tool) is str else None, _TOO_DEEP)
