"""What a toolkit says it registered, checked: bounded, strictly typed, nothing taken on trust.

PURE. The report is written inside the jail by code that shares a process with the toolkit; the
worst that a lie can do here is to misdescribe the toolkit's own tools.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any, TypeVar

from atp_sandbox.errors import ToolkitError
from atp_sandbox.limits import MAX_NAME_CHARS, MAX_TEXT_CHARS, MAX_TOOLS
from atp_sandbox.log import printable

MAX_CLIENTS = 64
MAX_PARAMS = 1_000
MAX_CONTAINERS = 10_000
"""Lists and objects of a report; 1,000 tools have 3,000. 30 MB of empty ones would become 700."""

_ENDS = ("start", "end", "interrupted")
# A string that does not end is one piece too: tried again from each quote, it would take quadratic
# time.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Client:
    """One `ToolKitClient(...)` of the toolkit."""

    api_key: str = field(repr=False)
    app_name: str
    base_url: str
    started: bool
    stopped: bool


@dataclass(frozen=True, slots=True)
class Tool:
    """One `register_tool(...)`."""

    index: int
    """Its place among all registrations of the toolkit: how a worker is told which one."""
    client: int
    name: str
    params: tuple[str, ...]
    required: tuple[str, ...]
    description: str
    auth_provider: str | None
    auth_type: str | None
    auth_with: str | None
    source: str = field(repr=False)
    needs_token: bool
    """The function's own signature demands `auth_token`."""

    @property
    def declares_auth(self) -> bool:
        """Whether a call without a token is refused."""
        declared = self.auth_type or self.auth_with or self.auth_provider
        return bool(declared) or self.needs_token or "auth_token" in self.required

    @property
    def code_hash(self) -> str:
        """sha256 of the source, in hex, as the registration carries it."""
        return hashlib.sha256(self.source.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True, slots=True)
class Discovery:
    """One toolkit's clients and registrations, in order; repeated names are all there."""

    clients: tuple[Client, ...]
    registrations: tuple[Tool, ...]
    ended: str
    """`start`, `end` or `interrupted`: what ended the import."""
    processes: int
    """Processes that the import started and that still live."""

    @property
    def signature(self) -> tuple[tuple[int, str], ...]:
        """What must be the same each time the toolkit is imported, since workers go by index."""
        return tuple((tool.client, tool.name) for tool in self.registrations)

    def served(self) -> list[Tool]:
        """The tools of clients that serve: none of a client that was stopped before it started."""
        return [
            tool
            for tool in self.registrations
            if self.clients[tool.client].started or not self.clients[tool.client].stopped
        ]


def parse_report(report: bytes) -> Discovery:
    """The checked content of `report`; ToolkitError says which part cannot be used."""
    try:
        _check_size(report)
        content = json.loads(report)
        clients = [_client(entry) for entry in _list(content, "clients", MAX_CLIENTS)]
        tools = [
            _tool(index, entry, len(clients))
            for index, entry in enumerate(_list(content, "tools", MAX_TOOLS))
        ]
        ended = _typed(content, "ended", str)
        processes = _typed(content, "processes", int)
        if ended not in _ENDS or processes < 0:
            raise _Unusable("its end is none that there is")
    except (ValueError, RecursionError, TypeError, LookupError) as error:
        cause = str(error) if isinstance(error, _Unusable) else "it is no such report"
        raise ToolkitError(
            "The toolkit's registrations cannot be used.",
            cause=printable(cause),
            tip="Use the ATP SDK's ToolKitClient and register_tool as documented.",
        ) from None
    return Discovery(tuple(clients), tuple(tools), ended, processes)


class _Unusable(ValueError):
    """A value out of bounds; the message is ours and may be shown."""


def _check_size(report: bytes) -> None:
    if report.count(b"[") + report.count(b"{") > MAX_CONTAINERS:  # brackets in sources count too
        bare = _STRING.sub(b"", report)
        if bare.count(b"[") + bare.count(b"{") > MAX_CONTAINERS:
            raise _Unusable(f"it has more than {MAX_CONTAINERS} parts")


def _client(entry: Any) -> Client:
    return Client(
        api_key=_text(entry, "api_key", MAX_NAME_CHARS * 4),
        app_name=_text(entry, "app_name", MAX_NAME_CHARS),
        base_url=_text(entry, "base_url", MAX_NAME_CHARS * 8),
        started=_typed(entry, "started", bool),
        stopped=_typed(entry, "stopped", bool),
    )


def _tool(index: int, entry: Any, clients: int) -> Tool:
    client = _typed(entry, "client", int)
    if not 0 <= client < clients:
        raise _Unusable(f"registration {index + 1} belongs to no client")
    name = _text(entry, "name", MAX_NAME_CHARS)
    if not name:
        raise _Unusable(f"registration {index + 1} has an empty name")
    return Tool(
        index=index,
        client=client,
        name=name,
        params=_names(entry, "params"),
        required=_names(entry, "required"),
        description=_text(entry, "description", MAX_TEXT_CHARS),
        auth_provider=_optional_text(entry, "auth_provider"),
        auth_type=_optional_text(entry, "auth_type"),
        auth_with=_optional_text(entry, "auth_with"),
        source=_text(entry, "source", MAX_TEXT_CHARS),
        needs_token=_typed(entry, "needs_token", bool),
    )


def _typed(entry: Any, key: str, kind: type[T]) -> T:
    value = entry[key]
    if type(value) is not kind:
        raise _Unusable(f"{key} is not of the documented type")
    return value


def _text(entry: Any, key: str, most: int) -> str:
    text = _typed(entry, key, str)
    if len(text) > most:
        raise _Unusable(f"{key} has {len(text)} characters, {most} are allowed")
    return text


def _optional_text(entry: Any, key: str) -> str | None:
    return None if entry[key] is None else _text(entry, key, MAX_NAME_CHARS)


def _list(entry: Any, key: str, most: int) -> list[Any]:
    values: list[Any] = _typed(entry, key, list)
    if len(values) > most:
        raise _Unusable(f"{len(values)} {key}, {most} are allowed")
    return values


def _names(entry: Any, key: str) -> tuple[str, ...]:
    names = _list(entry, key, MAX_PARAMS)
    for name in names:
        if type(name) is not str or len(name) > MAX_NAME_CHARS:
            raise _Unusable(f"{key} holds something else than a name")
    return tuple(names)
