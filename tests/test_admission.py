"""What reaches a worker: a known tool, all its required parameters, and its token."""

from __future__ import annotations

import json
from typing import Any

import pytest

from atp_sandbox.admission import ServedTool, admit
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.discovery import Tool
from atp_sandbox.outcome import Failure, Kind


def served(name: str = "echo", **given: Any) -> dict[str, ServedTool]:
    fields: dict[str, Any] = {
        "index": 0,
        "client": 0,
        "name": name,
        "params": (),
        "required": (),
        "description": "",
        "auth_provider": None,
        "auth_type": None,
        "auth_with": None,
        "source": "",
        "needs_token": False,
        **given,
    }
    return {name: ServedTool("kit", "app", Tool(**fields))}


def asked(tools: dict[str, ServedTool], *, token: Any = None, **params: Any) -> Failure | None:
    name = next(iter(tools))
    token_json = None if token is None else json.dumps(token)
    return admit(ToolRequest('"r"', name, params, json.dumps(params), token_json), tools)


def kind_of(failure: Failure | None) -> Kind | None:
    return None if failure is None else failure.kind


def test_an_unknown_tool_is_refused_and_the_nearest_name_is_offered() -> None:
    request = ToolRequest('"r"', "ecco", {}, "{}", None)
    failure = admit(request, served())
    assert failure == Failure(Kind.UNKNOWN_TOOL, "Unknown tool: ecco. Did you mean echo?")
    far = ToolRequest('"r"', "zzz", {}, "{}", None)
    assert admit(far, served()) == Failure(Kind.UNKNOWN_TOOL, "Unknown tool: zzz.")


def test_a_long_unknown_name_is_cut() -> None:
    failure = admit(ToolRequest('"r"', "x" * 10_000, {}, "{}", None), served())
    assert failure is not None
    assert len(failure.error) < 200


def test_missing_parameters_are_named_in_their_order() -> None:
    failure = asked(served(required=("b", "a", "c")), a=1)
    assert failure is not None
    assert failure.kind is Kind.INVALID_PARAMS
    assert failure.error == "Tool echo is missing required parameters: b, c."
    assert failure.details == {"missing": ["b", "c"]}


def test_a_parameter_that_is_null_is_there_and_one_that_nobody_asked_for_may_be_too() -> None:
    assert asked(served(required=("a",)), a=None, extra=1) is None


@pytest.mark.parametrize(
    "declared",
    [
        {"auth_type": "OAuth2"},
        {"auth_provider": "hubspot"},
        {"auth_with": "access_token"},
        {"needs_token": True},
        {"required": ("auth_token",)},
        {"auth_with": "access_token", "required": ("access_token",)},
    ],
)
def test_a_tool_that_declares_a_token_is_not_run_without_one(declared: dict[str, Any]) -> None:
    tools = served(**declared)
    assert kind_of(asked(tools)) is Kind.AUTH_REQUIRED
    assert kind_of(asked(tools, auth_token=None)) is Kind.AUTH_REQUIRED
    assert asked(tools, token="T") is None
    assert asked(tools, auth_token="T") is None


def test_a_token_among_the_parameters_may_have_the_declared_name() -> None:
    tools = served(auth_with="access_token", required=("access_token",))
    assert asked(tools, access_token="T") is None
    assert kind_of(asked(served(auth_type="OAuth2"), access_token="T")) is Kind.AUTH_REQUIRED


def test_a_missing_token_names_its_provider_and_is_no_missing_parameter() -> None:
    failure = asked(served(auth_provider="hubspot", required=("auth_token", "a")), a=1)
    assert failure == Failure(
        Kind.AUTH_REQUIRED, "Tool echo needs an auth_token for hubspot; none was given."
    )


def test_missing_parameters_come_before_a_missing_token() -> None:
    failure = asked(served(auth_type="OAuth2", required=("auth_token", "a")))
    assert failure is not None
    assert failure.details == {"missing": ["a"]}


def test_a_token_that_nobody_asked_for_is_no_fault() -> None:
    assert asked(served(), token={"any": "JSON"}) is None


def test_no_failure_repeats_a_value() -> None:
    tools = served(required=("a",), auth_type="OAuth2")
    for failure in (asked(tools, token="SECRET", b="SECRET"), asked(tools, a="SECRET")):
        assert "SECRET" not in repr(failure)
