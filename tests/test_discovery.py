"""A toolkit's report is a hostile text: used only if every part is as documented and bounded."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.discovery import MAX_CLIENTS, MAX_PARAMS, Discovery, parse_report
from atp_sandbox.errors import ToolkitError
from atp_sandbox.limits import MAX_NAME_CHARS, MAX_TEXT_CHARS, MAX_TOOLS


def client(**given: Any) -> dict[str, Any]:
    return {
        "api_key": "KEY",
        "app_name": "app",
        "base_url": "https://example.com",
        "started": True,
        "stopped": False,
        **given,
    }


def tool(**given: Any) -> dict[str, Any]:
    return {
        "client": 0,
        "name": "echo",
        "params": ["text"],
        "required": [],
        "description": "d",
        "auth_provider": None,
        "auth_type": None,
        "auth_with": None,
        "source": "def echo(): ...",
        "needs_token": False,
        **given,
    }


def report(**given: Any) -> dict[str, Any]:
    whole = {"ended": "start", "threads": 1, "processes": 0, "clients": [client()]}
    return {**whole, "tools": [tool()], **given}


def parsed(**given: Any) -> Discovery:
    return parse_report(json.dumps(report(**given)).encode())


def refusal(body: bytes) -> ToolkitError:
    with pytest.raises(ToolkitError) as caught:
        parse_report(body)
    return caught.value


def test_a_report_becomes_values_in_order() -> None:
    found = parsed(tools=[tool(name="a"), tool(name="b", params=["x", "y"])])
    assert [t.name for t in found.registrations] == ["a", "b"]
    assert [t.index for t in found.registrations] == [0, 1]
    assert found.registrations[1].params == ("x", "y")
    assert found.clients[0].app_name == "app"
    assert found.ended == "start"
    assert found.signature == ((0, "a"), (0, "b"))


def test_repr_shows_neither_keys_nor_sources() -> None:
    shown = repr(parsed(clients=[client(api_key="SECRET")], tools=[tool(source="SECRET")]))
    assert "SECRET" not in shown


def test_tools_of_a_client_that_was_stopped_before_it_started_are_not_served() -> None:
    clients = [
        client(started=started, stopped=stopped)
        for started in (False, True)
        for stopped in (False, True)
    ]
    found = parsed(clients=clients, tools=[tool(client=n, name=str(n)) for n in range(4)])
    assert [t.name for t in found.served()] == ["0", "2", "3"]


@pytest.mark.parametrize(
    ("given", "declares"),
    [
        ({}, False),
        ({"auth_type": ""}, False),
        ({"auth_type": "OAuth2"}, True),
        ({"auth_with": "access_token"}, True),
        ({"auth_provider": "hubspot"}, True),
        ({"needs_token": True}, True),
        ({"required": ["auth_token"]}, True),
    ],
)
def test_any_sign_of_a_token_declares_one(given: dict[str, Any], declares: bool) -> None:
    assert parsed(tools=[tool(**given)]).registrations[0].declares_auth is declares


def test_a_source_with_a_lone_surrogate_still_has_a_hash() -> None:
    assert len(parsed(tools=[tool(source="\ud800")]).registrations[0].code_hash) == 64


@pytest.mark.parametrize(
    "broken",
    [
        {"clients": {}},
        {"clients": ["x"]},
        {"clients": [client(api_key=None)]},
        {"clients": [client(api_key="x" * (4 * MAX_NAME_CHARS + 1))]},
        {"clients": [client(app_name="x" * (MAX_NAME_CHARS + 1))]},
        {"clients": [client(base_url="x" * (8 * MAX_NAME_CHARS + 1))]},
        {"clients": [client(started=1)]},
        {"clients": [client()] * (MAX_CLIENTS + 1)},
        {"tools": None},
        {"tools": [[]]},
        {"tools": [tool(client=-1)]},
        {"tools": [tool(client=1)]},
        {"tools": [tool(client=True)]},
        {"tools": [tool(client=0.0)]},
        {"tools": [tool(name="")]},
        {"tools": [tool(name=1)]},
        {"tools": [tool(name="x" * (MAX_NAME_CHARS + 1))]},
        {"tools": [tool(params="text")]},
        {"tools": [tool(params=[1])]},
        {"tools": [tool(params=["p"] * (MAX_PARAMS + 1))]},
        {"tools": [tool(required=["x" * (MAX_NAME_CHARS + 1)])]},
        {"tools": [tool(description="x" * (MAX_TEXT_CHARS + 1))]},
        {"tools": [tool(source="x" * (MAX_TEXT_CHARS + 1))]},
        {"tools": [tool(auth_with=1)]},
        {"tools": [tool(auth_type="x" * (MAX_NAME_CHARS + 1))]},
        {"tools": [tool(needs_token=None)]},
        {"tools": [tool()] * (MAX_TOOLS + 1)},
        {"ended": None},
        {"ended": "otherwise"},
        {"processes": "0"},
        {"processes": -1},
    ],
)
def test_each_part_is_of_its_type_and_within_its_bound(broken: dict[str, Any]) -> None:
    refusal(json.dumps(report(**broken)).encode())


@pytest.mark.parametrize("missing", ["ended", "processes", "clients", "tools"])
def test_each_part_must_be_there(missing: str) -> None:
    whole = report()
    del whole[missing]
    refusal(json.dumps(whole).encode())


@given(st.binary())
def test_any_other_bytes_are_a_toolkit_error(body: bytes) -> None:
    refusal(body)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"{" * 9_000, b'{"clients": ' + b"9" * 5_000])
def test_what_json_cannot_hold_is_a_toolkit_error(body: bytes) -> None:
    refusal(body)


def test_the_largest_toolkit_passes_brackets_in_its_sources_and_all() -> None:
    source = 'x = [[{}]]  # "quoted" \\ '
    found = parsed(tools=[tool(name=str(n), source=source * 20) for n in range(MAX_TOOLS)])
    assert len(found.registrations) == MAX_TOOLS


def test_millions_of_empty_lists_are_refused_before_they_are_made() -> None:
    body = b'{"tools": [' + b"[]," * 1_000_000 + b"[]]}"
    tracemalloc.start()
    try:
        error = refusal(body)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "parts" in error.cause
    assert peak_bytes < 3 * len(body)


def test_a_string_without_an_end_takes_no_more_than_linear_time() -> None:
    started = time.monotonic()
    refusal(b"[" * 20_000 + b'"\\' * 1_000_000)
    assert time.monotonic() - started < 10


def test_the_cause_shows_nothing_that_could_move_the_cursor() -> None:
    error = refusal(json.dumps(report(tools=[tool(name="\x1b[2J" * 100)])).encode())
    assert "\x1b" not in error.render()
