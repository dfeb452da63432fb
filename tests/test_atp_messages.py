"""What a message from the backend may hold, and what comes of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.atp.messages import (
    Hello,
    Ignored,
    Rejected,
    ToolRequest,
    decode,
    encode_response,
)
from atp_sandbox.limits import MAX_JSON_DEPTH, MAX_REQUEST_ID_BYTES
from atp_sandbox.outcome import Kind


def request(**content: Any) -> bytes:
    payload = {"request_id": "r", "tool_name": "echo", **content}
    return json.dumps({"message_type": "atp_tool_request", "payload": payload}).encode()


def decoded(payload: bytes) -> ToolRequest:
    result = decode(payload)
    assert isinstance(result, ToolRequest)
    return result


def rejected(payload: bytes) -> Rejected:
    result = decode(payload)
    assert isinstance(result, Rejected)
    return result


def test_a_request_becomes_its_parts() -> None:
    found = decoded(request(params={"text": "é", "n": [1, 2.5, None]}, auth_token="T"))
    assert found == ToolRequest(
        '"r"',
        "echo",
        {"text": "é", "n": [1, 2.5, None]},
        '{"text": "\\u00e9", "n": [1, 2.5, null]}',
        '"T"',
    )


def test_repr_shows_neither_parameters_nor_token() -> None:
    shown = repr(decoded(request(params={"p": "PARAM"}, auth_token="TOKEN")))
    assert "PARAM" not in shown
    assert "TOKEN" not in shown


def test_absent_params_are_an_empty_object() -> None:
    found = decoded(request())
    assert (found.params, found.params_json) == ({}, "{}")


def test_a_request_id_is_as_long_as_any_backend_makes_it_and_not_longer() -> None:
    longest = "i" * (MAX_REQUEST_ID_BYTES - 2)
    assert decoded(request(request_id=longest)).request_id_json == f'"{longest}"'
    for too_long in ("i" + longest, [0] * MAX_REQUEST_ID_BYTES, {longest: 1}):
        refused = decode(request(request_id=too_long))
        assert isinstance(refused, Rejected)
        assert json.loads(refused.request_id_json) == too_long
        assert refused.failure.kind is Kind.INVALID_PARAMS


@pytest.mark.parametrize("token", [None, "", False, 0, {}, []])
def test_a_token_that_is_false_in_python_is_absent(token: Any) -> None:
    assert decoded(request(auth_token=token)).auth_token_json is None


@pytest.mark.parametrize("token", ["T", 5, True, {"a": [1]}])
def test_any_other_token_is_kept_as_json(token: Any) -> None:
    assert decoded(request(auth_token=token)).auth_token_json == json.dumps(token)


@pytest.mark.parametrize(
    "request_id", ["x", "", 1, 1.0, 10**30, True, False, 0, [], {"a": [None]}, "\udce9 é"]
)
def test_the_request_id_is_echoed_with_its_json_type(request_id: Any) -> None:
    found = decoded(request(request_id=request_id))
    assert found.request_id_json == json.dumps(request_id)
    answer = json.loads(encode_response(found.request_id_json, "null"))
    assert answer["request_id"] == request_id
    assert type(answer["request_id"]) is type(request_id)


@pytest.mark.parametrize(
    ("params", "word"),
    [(None, "null"), ([1], "a list"), ("x=1", "a string"), (1, "a number"), (True, "a boolean")],
)
def test_params_that_are_no_object_are_answered(params: Any, word: str) -> None:
    found = rejected(request(params=params, auth_token="T"))
    assert (found.request_id_json, found.tool) == ('"r"', "echo")
    assert found.failure.kind is Kind.INVALID_PARAMS
    assert found.failure.error == f"params must be a JSON object, not {word}"


@pytest.mark.parametrize("name", [None, 5, [], {}])
def test_a_tool_name_that_is_no_string_is_an_unknown_tool(name: Any) -> None:
    found = rejected(request(tool_name=name))
    assert (found.tool, found.failure.kind) == (None, Kind.UNKNOWN_TOOL)


def test_a_missing_tool_name_is_an_unknown_tool() -> None:
    text = b'{"message_type": "atp_tool_request", "payload": {"request_id": 1}}'
    found = rejected(text)
    assert found.failure.error == "tool_name is missing"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    head = '{"message_type": "atp_tool_request", "payload": {"request_id": 7, "tool_name": "t", '
    for member in (f'"params": {{"a": [{{"b": {number}}}]}}', f'"auth_token": {number}'):
        found = rejected(f"{head}{member}}}}}".encode())
        assert (found.request_id_json, found.failure.kind) == ("7", Kind.INVALID_PARAMS)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"this is not json{",
        b"[1,2]",
        b'"x"',
        b"null",
        b"NaN",
        b"\xff\xfe",
        b"\xef\xbb\xbf" + request(),
        b'{"payload": {"request_id": "a", "tool_name": "echo"}}',
        b'{"type": "atp_tool_request", "payload": {"request_id": "a", "tool_name": "echo"}}',
        b'{"message_type": "atp_future_thing", "payload": {}}',
        b'{"message_type": ["atp_tool_request"], "payload": {}}',
        b'{"message_type": "atp_tool_request"}',
        b'{"message_type": "atp_tool_request", "payload": null}',
        b'{"message_type": "atp_tool_request", "payload": []}',
        b'{"message_type": "atp_tool_request", "payload": {"tool_name": "SECRET"}}',
        b'{"message_type": "atp_tool_request", "payload": {"request_id": null, "tool_name": "t"}}',
        b'{"message_type": "atp_tool_request", "payload": {"request_id": NaN, "tool_name": "t"}}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
    ],
)
def test_what_cannot_be_answered_is_ignored_without_quoting_it(payload: bytes) -> None:
    result = decode(payload)
    assert isinstance(result, Ignored)
    assert "SECRET" not in result.reason
    assert "atp_future_thing" not in result.reason


@pytest.mark.parametrize("kind", ["atp_app_request", "atp_app_action", "atp_app_terminate"])
def test_app_messages_are_ignored_by_name(kind: str) -> None:
    result = decode(json.dumps({"message_type": kind, "payload": {"request_id": 1}}).encode())
    assert isinstance(result, Ignored)
    assert kind in result.reason


@pytest.mark.parametrize(
    ("payload", "message"),
    [({"message": "hi"}, "hi"), ({}, ""), (None, ""), ({"message": "x" * 9999}, "x" * 200)],
)
def test_the_greeting_needs_no_message(payload: Any, message: str) -> None:
    text = json.dumps({"message_type": "atp_client_connected", "payload": payload})
    assert decode(text.encode()) == Hello(message)


def test_white_space_extra_fields_and_repeated_keys_are_accepted() -> None:
    text = (
        b'  \r\n {"message_type": "atp_client_connected", "message_type": "atp_tool_request",'
        b' "version": 9, "payload": {"request_id": "p", "tool_name": "opt", "zzz": NaN,'
        b' "params": {"a": 1, "a": 2}}}  '
    )
    assert decoded(text).params == {"a": 2}


def test_lone_surrogates_reach_the_tool() -> None:
    found = decoded(request(params={"text": "\ud800"}))
    assert found.params == {"text": "\ud800"}
    assert found.params_json.isascii()


def nested(levels: int) -> str:
    return "[" * (levels - 1) + "{}" + "]" * (levels - 1)


def deep_request(params: str, request_id: str = '"d"') -> bytes:
    return (
        '{"message_type": "atp_tool_request", "payload": {"tool_name": "t", "params": {"a": '
        f'{params}, "s": "{{[\\"{"[" * 300}"}}, "request_id": {request_id}}}}}'
    ).encode()


def test_params_as_deep_as_allowed_are_accepted() -> None:
    decoded(deep_request(nested(MAX_JSON_DEPTH - 1)))


@pytest.mark.parametrize("levels", [MAX_JSON_DEPTH, 900, 50_000])
def test_params_nested_too_deep_are_answered(levels: int) -> None:
    found = rejected(deep_request(nested(levels)))
    assert (found.request_id_json, found.tool) == ('"d"', "t")
    assert found.failure.kind is Kind.INVALID_PARAMS
    assert "nested" in found.failure.error


@pytest.mark.parametrize("levels", [MAX_JSON_DEPTH + 1, 50_000])
def test_a_request_id_nested_too_deep_is_ignored(levels: int) -> None:
    assert isinstance(decode(deep_request("1", nested(levels))), Ignored)


def test_brackets_in_strings_are_no_nesting() -> None:
    decoded(request(params={"a": "[{" * 1000}))


def test_the_answer_is_spelled_as_the_sdk_spells_it() -> None:
    answer = encode_response('"r1"', '{"echo": "hello"}')
    assert answer == '{"type": "tool_response", "request_id": "r1", "result": {"echo": "hello"}}'


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def all_finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_nothing_makes_decode_raise(payload: bytes) -> None:
    decode(payload)


@given(json_values, json_values, json_values, json_values)
def test_every_request_with_an_id_is_run_or_answered(
    request_id: Any, tool: Any, params: Any, token: Any
) -> None:
    result = decode(request(request_id=request_id, tool_name=tool, params=params, auth_token=token))
    if isinstance(result, Ignored):
        assert request_id is None or not all_finite(request_id)
    else:
        assert isinstance(result, ToolRequest | Rejected)
        assert result.request_id_json == json.dumps(request_id)


def test_a_deep_message_whose_string_never_ends_takes_no_more_than_linear_time() -> None:
    started = time.monotonic()
    assert decode(b'{"a":' + b"[" * 2_000 + b'"\\' * 500_000) == Ignored("nested too deep")
    assert time.monotonic() - started < 10
