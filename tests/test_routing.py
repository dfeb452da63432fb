"""Which tool goes over which link: the operator's, or by the operator's leave the toolkits'."""

from __future__ import annotations

from typing import Any

import pytest

from atp_sandbox import routing
from atp_sandbox.discovery import Client, Discovery, Tool
from atp_sandbox.errors import UsageError
from atp_sandbox.routing import Route, route
from atp_sandbox.settings import BackendSettings

OPERATOR = BackendSettings(api_key="operator-key", base_url="https://op.example/")
AS_WRITTEN = BackendSettings(as_written=True)


def client(**given: Any) -> Client:
    fields: dict[str, Any] = {
        "api_key": "kit-key",
        "app_name": "app",
        "base_url": "https://kit.example",
        "started": True,
        "stopped": False,
        **given,
    }
    return Client(**fields)


def kit(*tools: tuple[int, str], clients: tuple[Client, ...] = (client(),)) -> Discovery:
    registrations = tuple(
        Tool(index, number, name, (), (), "", None, None, None, "", False)
        for index, (number, name) in enumerate(tools)
    )
    return Discovery(clients, registrations, "start", 0)


def only(discoveries: dict[str, Discovery], backend: BackendSettings = OPERATOR) -> Route:
    (found,) = route(discoveries, backend)
    return found


def test_the_operators_address_and_key_make_one_link_for_everything() -> None:
    other = client(api_key="other", base_url="https://other.example")
    found = only({"a": kit((0, "x")), "b": kit((0, "y"), clients=(other,))})
    assert (found.base_url, found.api_key) == ("https://op.example", "operator-key")
    assert {name: s.toolkit for name, s in found.tools.items()} == {"x": "a", "y": "b"}
    assert found.is_served


def test_without_an_operator_each_distinct_address_and_key_makes_a_link() -> None:
    clients = (client(), client(api_key="second"), client(base_url="https://kit.example/"))
    discoveries = {"a": kit((0, "x"), (1, "y"), (2, "z"), clients=clients), "b": kit((0, "w"))}
    found = route(discoveries, AS_WRITTEN)
    assert [(r.base_url, r.api_key, sorted(r.tools)) for r in found] == [
        ("https://kit.example", "kit-key", ["w", "x", "z"]),
        ("https://kit.example", "second", ["y"]),
    ]


def test_what_the_toolkits_name_is_used_only_by_leave() -> None:
    with pytest.raises(UsageError) as caught:
        route({"a": kit((0, "x"))}, BackendSettings())
    shown = caught.value.render()
    assert "no API key" in shown
    assert "no base URL" in shown
    assert "https://kit.example (toolkit a, app app)" in shown
    assert "kit-key" not in shown


@pytest.mark.parametrize(
    ("given", "missing"),
    [({"api_key": "k"}, "no base URL"), ({"base_url": "https://x.example"}, "no API key")],
)
def test_half_a_backend_names_the_other_half(given: dict[str, Any], missing: str) -> None:
    with pytest.raises(UsageError, match=missing) as caught:
        route({"a": kit((0, "x"))}, BackendSettings(**given))
    assert " and no" not in caught.value.message


def test_a_name_belongs_to_the_toolkit_that_comes_first() -> None:
    found = only({"first": kit((0, "x")), "second": kit((0, "x"), (0, "y"))})
    assert {name: s.toolkit for name, s in found.tools.items()} == {"x": "first", "y": "second"}
    assert [(r.toolkit, r.name) for r in found.refused] == [("second", "x")]
    assert "first" in found.refused[0].reason
    assert [(s.toolkit, s.tool.name) for s in found.registered] == [("first", "x"), ("second", "y")]


def test_the_same_name_on_two_links_is_no_conflict() -> None:
    discoveries = {"a": kit((0, "x")), "b": kit((0, "x"), clients=(client(api_key="second"),))}
    found = route(discoveries, AS_WRITTEN)
    assert [sorted(r.tools) for r in found] == [["x"], ["x"]]
    assert [r.refused for r in found] == [(), ()]


def test_of_a_name_registered_twice_the_last_is_served_and_both_are_announced() -> None:
    found = only({"a": kit((0, "x"), (0, "x"))})
    assert found.tools["x"].tool.index == 1
    assert [s.tool.index for s in found.registered] == [0, 1]


def test_a_client_that_was_stopped_before_it_started_is_announced_and_not_served() -> None:
    found = only({"a": kit((0, "x"), clients=(client(started=False, stopped=True),))})
    assert found.tools == {}
    assert len(found.registered) == 1
    assert not found.is_served


def test_one_client_of_a_toolkit_can_be_served_alone() -> None:
    discoveries = {"a": kit((0, "x"), (1, "y"), clients=(client(), client()))}
    backend = BackendSettings(api_key="k", base_url="https://op.example", only_client=1)
    assert sorted(only(discoveries, backend).tools) == ["y"]


def test_the_operators_app_name_is_used_only_where_there_is_one_client() -> None:
    backend = BackendSettings(api_key="k", base_url="https://op.example", app_name="mine")
    assert only({"a": kit((0, "x"))}, backend).tools["x"].app_name == "mine"
    two = kit((0, "x"), clients=(client(), client(app_name="b")))
    assert only({"a": two}, backend).tools["x"].app_name == "app"


def test_an_address_that_cannot_be_used_is_left_out_and_named() -> None:
    bad = client(base_url="ftp://nowhere\x1b[2J")
    discoveries = {"a": kit((0, "x")), "b": kit((0, "y"), clients=(bad,))}
    assert [sorted(r.tools) for r in route(discoveries, AS_WRITTEN)] == [["x"]]
    assert [name for name, _, _ in routing.unusable_addresses(discoveries)] == ["b"]
    with pytest.raises(UsageError) as caught:
        route({"b": discoveries["b"]}, AS_WRITTEN)
    assert "\x1b" not in caught.value.render()
    assert "kit-key" not in caught.value.render()


def test_a_client_without_tools_makes_no_link() -> None:
    clients = (client(), client(api_key="empty"))
    assert only({"a": kit((0, "x"), clients=clients)}, AS_WRITTEN).api_key == "kit-key"


def test_repr_of_a_link_does_not_show_its_key() -> None:
    assert "operator-key" not in repr(only({"a": kit((0, "x"))}))


def test_an_author_hears_of_repeated_names_and_of_a_client_never_started() -> None:
    idle = client(app_name="id\nle", started=False)
    found = kit((0, "x"), (0, "x"), (1, "x"), clients=(client(), idle))
    warnings = list(routing.warnings("a", found))
    assert [w.event for w in warnings] == ["tool_replaced", "client_not_started"]
    assert "id\\nle" in warnings[1].message
