"""Which tool is served over which link, under which name and key. PURE.

The operator's key and address make one link for everything; otherwise, and only if the operator
said so, each distinct pair of address and key that the toolkits name makes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from atp_sandbox.admission import ServedTool
from atp_sandbox.atp.address import LinkAddress
from atp_sandbox.discovery import Client, Discovery, Tool
from atp_sandbox.errors import BackendError, SandboxError, ToolkitError, UsageError
from atp_sandbox.log import printable
from atp_sandbox.settings import BackendSettings


@dataclass(frozen=True, slots=True)
class RefusedTool:
    """A tool that is not served because its name is taken on that link."""

    toolkit: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """One link to be."""

    base_url: str
    api_key: str = field(repr=False)
    tools: Mapping[str, ServedTool]
    """What is served, by name."""
    registered: tuple[ServedTool, ...]
    """What the backend is told of, in order; of a name that was registered twice, both."""
    refused: tuple[RefusedTool, ...]
    is_served: bool
    """False if every client of it was stopped before it was started: announced, no more."""


@dataclass(frozen=True, slots=True)
class Warning:
    event: str
    message: str


def warnings(toolkit: str, discovery: Discovery) -> Iterator[Warning]:
    """What the author of a toolkit should hear about its registrations."""
    seen: set[tuple[int, str]] = set()
    for tool in discovery.registrations:
        if (tool.client, tool.name) in seen:
            name = printable(tool.name)
            yield Warning("tool_replaced", f"{name} is registered twice; the last one is served")
        seen.add((tool.client, tool.name))
    for number, client in enumerate(discovery.clients):
        has_tools = any(tool.client == number for tool in discovery.registrations)
        if has_tools and not client.started and not client.stopped:
            app = printable(client.app_name)
            yield Warning(
                "client_not_started",
                f"client {app} registered tools but never called start(); "
                "it is served all the same",
            )


def route(discoveries: Mapping[str, Discovery], backend: BackendSettings) -> tuple[Route, ...]:
    """The links for these toolkits, given in the operator's order.

    UsageError if neither the operator nor, by the operator's leave, the toolkits say where to.
    """
    app_name = _app_name(discoveries, backend)
    as_written = backend.as_written
    targets = _as_written(discoveries) if as_written else _operators(discoveries, backend)
    return tuple(
        _route(base_url, api_key, owners, discoveries, app_name)
        for (base_url, api_key), owners in targets.items()
    )


def reroute(
    toolkit: str,
    discoveries: Mapping[str, Discovery],
    backend: BackendSettings,
    links: Mapping[tuple[str, str], Mapping[str, ServedTool]],
) -> tuple[Mapping[tuple[str, str], Route], tuple[str, ...]]:
    """Where a new version of `toolkit` is served: a route for each link, and who else is named.

    `discoveries` has its new one. `links` are those that are open, by address and key, with what
    they serve. No version opens another, nor takes a name that another toolkit serves: links that
    it names beside them are only told of, as they may be shown. ToolkitError if it names no other.
    """
    app_name = _app_name(discoveries, backend)
    mine = {toolkit: discoveries[toolkit]}
    try:
        targets = _as_written(mine) if backend.as_written else _operators(mine, backend)
    except UsageError as error:
        raise ToolkitError(error.message, cause=error.cause) from None
    others = [link for link in targets if link not in links]
    unknown = tuple(LinkAddress(url, key).redacted for url, key in others)
    if len(unknown) == len(targets):
        raise ToolkitError(
            f"Toolkit {toolkit} names no link that is open.",
            cause=f"it names {', '.join(map(printable, unknown))}",
            tip="Which links there are is settled at the start; restart to open others.",
        )
    routes = {}
    for link, tools in links.items():
        held = {name: served for name, served in tools.items() if served.toolkit != toolkit}
        routes[link] = _route(*link, targets.get(link, []), mine, app_name, held)
    return routes, unknown


def _app_name(discoveries: Mapping[str, Discovery], backend: BackendSettings) -> str | None:
    """The operator's, if there is but one client that it can be meant for."""
    clients = sum(len(discovery.clients) for discovery in discoveries.values())
    return backend.app_name if clients <= 1 else None


Owners = list[tuple[str, int]]
"""(toolkit, client)"""


def _operators(
    discoveries: Mapping[str, Discovery], backend: BackendSettings
) -> dict[tuple[str, str], Owners]:
    if backend.api_key is None or backend.base_url is None:
        missing = [
            name
            for name, value in (
                ("no API key (--api-key-file or ATP_API_KEY)", backend.api_key),
                ("no base URL (--base-url or ATP_BASE_URL)", backend.base_url),
            )
            if value is None
        ]
        named = sorted(
            {
                f"{printable(client.base_url)} "
                f"(toolkit {toolkit}, app {printable(client.app_name)})"
                for toolkit, discovery in discoveries.items()
                for client in discovery.clients
            }
        )
        raise UsageError(
            f"The backend is not known: there is {' and '.join(missing)}.",
            cause="The toolkits name: " + "; ".join(named),
            tip="Give both, or use --embedded to try it here, or --as-written to connect where the "
            "toolkits say, with the keys they hold.",
        )
    owners = [
        (toolkit, number)
        for toolkit, discovery in discoveries.items()
        for number in range(len(discovery.clients))
        if backend.only_client in (None, number)
    ]
    return {(backend.base_url.rstrip("/"), backend.api_key): owners}


def _as_written(discoveries: Mapping[str, Discovery]) -> dict[tuple[str, str], Owners]:
    targets: dict[tuple[str, str], Owners] = {}
    faults: list[str] = []
    for toolkit, discovery in discoveries.items():
        for number, client in enumerate(discovery.clients):
            if not any(tool.client == number for tool in discovery.registrations):
                continue
            try:
                LinkAddress(client.base_url, client.api_key)
            except SandboxError as error:
                faults.append(f"{toolkit}: {printable(client.base_url)}: {error.message}")
                continue
            key = (client.base_url.rstrip("/"), client.api_key)
            targets.setdefault(key, []).append((toolkit, number))
    if not targets:
        raise UsageError(
            "No toolkit names a backend that can be connected to.", cause="\n".join(faults)
        )
    return targets


def unusable_addresses(discoveries: Mapping[str, Discovery]) -> Iterator[tuple[str, Client, str]]:
    """(toolkit, client, why) for each address that `--as-written` cannot use."""
    for toolkit, discovery in discoveries.items():
        for client in discovery.clients:
            try:
                LinkAddress(client.base_url, client.api_key)
            except SandboxError as error:
                yield toolkit, client, error.message


def _route(
    base_url: str,
    api_key: str,
    owners: Owners,
    discoveries: Mapping[str, Discovery],
    app_name: str | None,
    held: Mapping[str, ServedTool] | None = None,
) -> Route:
    """`held`: what is served there already, by toolkits that are not looked at."""
    tools: dict[str, ServedTool] = {}
    registered: list[ServedTool] = []
    refused: list[RefusedTool] = []
    wanted = set(owners)
    is_served = False
    for toolkit, discovery in discoveries.items():
        served = {id(tool) for tool in discovery.served()}
        for tool in discovery.registrations:
            if (toolkit, tool.client) not in wanted:
                continue
            holder = tools.get(tool.name) or (held or {}).get(tool.name)
            if holder is not None and holder.toolkit != toolkit:
                refused.append(RefusedTool(toolkit, tool.name, _taken(tool, holder.toolkit)))
                continue
            name = app_name or discovery.clients[tool.client].app_name
            entry = ServedTool(toolkit, name, tool)
            registered.append(entry)
            if id(tool) in served:
                tools[tool.name] = entry
                is_served = True
    return Route(base_url, api_key, tools, tuple(registered), tuple(refused), is_served)


def _taken(tool: Tool, holder: str) -> str:
    return f"{printable(tool.name)} is already served by toolkit {holder}, which came first"


def refused_by_backend(url: str, reason: str) -> BackendError:
    """The error for a first handshake that was answered 401 or 403."""
    return BackendError(
        f"The backend refused the connection: {url}",
        cause=reason,
        tip="Check the API key and that it belongs to this backend; --ws-path 0.1 is for backends "
        "of the SDK's first releases.",
    )
