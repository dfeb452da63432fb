"""The state of the development backend: keys, their tools and connections, and calls under way.

Knows no HTTP and no websocket: a connection is something with a `send`. One event loop's thread
owns it; nothing here is safe to call from another.
"""

from __future__ import annotations

import asyncio
import difflib
import itertools
import json
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from atp_sandbox import limits

MAX_MESSAGE_BYTES = 64 * limits.MIB
"""One websocket message or HTTP body, either way: the largest answer on record with the SDK."""
MAX_KEYS = 1_000
"""API keys remembered at the same time; only tests come near."""
MAX_WAITING = 1_000
"""Calls that wait in one key's inbox; at one a poll more would never be fetched."""
POLL_FRESH_S = 90.0
"""A key that fetched its inbox this recently counts as connected: the SDK polls every 30 s."""


class Reason(Enum):
    """Why something was refused; the web side has a status for each."""

    INVALID = auto()
    KEY_REFUSED = auto()
    UNKNOWN_TOOL = auto()
    UNKNOWN_CALL = auto()
    SEVERAL_APPS = auto()
    TOO_LARGE = auto()
    FULL = auto()
    NOT_CONNECTED = auto()
    BAD_ANSWER = auto()
    TIMEOUT = auto()
    STOPPING = auto()


class Refusal(Exception):
    """A request that will not be served: what and why in one sentence, and what to do next."""

    def __init__(self, reason: Reason, message: str, tip: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.tip = tip


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool as its toolkit declared it."""

    name: str
    app: str
    params: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    description: str = ""
    auth_provider: str | None = None
    auth_type: str | None = None
    auth_with: str | None = None
    source_hash: str = ""


@dataclass(frozen=True, slots=True)
class Listing:
    """A tool and whether a toolkit that could serve it is there now."""

    tool: Tool
    connected: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A call on its way to a toolkit, in the words of the protocol."""

    request_id: str
    tool_name: str
    params: dict[str, object]
    auth_token: str | None = field(default=None, repr=False)

    def fields(self) -> dict[str, object]:
        row: dict[str, object] = {
            "request_id": self.request_id,
            "tool_name": self.tool_name,
            "params": self.params,
        }
        return row if self.auth_token is None else {**row, "auth_token": self.auth_token}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call gave, and how long the caller waited for it."""

    request_id: str
    result: object
    duration_s: float


@dataclass(eq=False, slots=True)
class Link:
    """One open websocket of a toolkit. `send` raises ConnectionError once it is gone."""

    send: Callable[[str], Awaitable[None]]


@dataclass(eq=False, slots=True)
class _Call:
    key: str
    request: Request
    result: asyncio.Future[object]


@dataclass(eq=False, slots=True)
class _App:
    tools: dict[str, Tool] = field(default_factory=dict)
    toolkit_hash: str | None = None


@dataclass(eq=False, slots=True)
class _Toolkit:
    """Everything under one API key."""

    apps: dict[str, _App] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    inbox: deque[_Call] = field(default_factory=deque)
    polled_at: float | None = None
    touched: int = 0
    """Grows with each registration and connection: the higher of two is the newer."""

    def tools(self) -> Iterator[Tool]:
        for app in self.apps.values():
            yield from app.tools.values()


class Hub:
    """Brings callers and toolkits together. `api_keys=None` lets every key in."""

    def __init__(
        self,
        api_keys: Iterable[str] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed = None if api_keys is None else frozenset(api_keys)
        self._clock = clock
        self._toolkits: dict[str, _Toolkit] = {}
        self._pending: dict[str, _Call] = {}
        self._sequence = itertools.count(1)
        self._stopping = False

    # Toolkits

    def admit(self, key: str) -> None:
        """Refuse a key that is not allowed, or that there is no room for."""
        if self._allowed is not None and key not in self._allowed:
            raise Refusal(
                Reason.KEY_REFUSED,
                "this API key is not one of those that the backend was started with",
                "use one of its keys, or start a backend that accepts every key",
            )
        if key not in self._toolkits and len(self._toolkits) >= MAX_KEYS:
            raise Refusal(
                Reason.FULL,
                f"the backend already knows {MAX_KEYS} API keys",
                "restart it to forget them",
            )

    def register(self, key: str, tool: Tool, *, toolkit_hash: str | None = None) -> None:
        """Remember `tool`, in place of an earlier one of that app and name."""
        self.admit(key)
        toolkit = self._toolkit(key)
        known = sum(1 for _ in toolkit.tools())
        app = toolkit.apps.get(tool.app) or _App()
        if tool.name not in app.tools and known >= limits.MAX_TOOLS:
            raise Refusal(
                Reason.FULL,
                f"this API key already has {limits.MAX_TOOLS} tools",
                "register fewer tools, or spread them over several keys",
            )
        app.tools[tool.name] = tool
        app.toolkit_hash = toolkit_hash
        toolkit.apps[tool.app] = app
        toolkit.touched = next(self._sequence)

    def is_toolkit_current(self, key: str, app_name: str, toolkit_hash: str) -> bool:
        """Whether the newest registration of this app came with this toolkit hash."""
        self.admit(key)
        toolkit = self._toolkits.get(key)
        app = toolkit.apps.get(app_name) if toolkit else None
        return app is not None and app.toolkit_hash == toolkit_hash

    def is_tool_current(self, key: str, name: str, source_hash: str) -> bool:
        """Whether a tool of this name is registered with this source hash; the app is not told."""
        self.admit(key)
        toolkit = self._toolkits.get(key)
        tools = toolkit.tools() if toolkit else ()
        return any(tool.name == name and tool.source_hash == source_hash for tool in tools)

    def attach(self, key: str, link: Link) -> None:
        """Send this key's calls over `link` from now on, until it is detached."""
        self.admit(key)
        toolkit = self._toolkit(key)
        toolkit.links.append(link)
        toolkit.touched = next(self._sequence)

    def detach(self, key: str, link: Link) -> None:
        """Forget `link`. Its calls stay open: a toolkit may answer after it has reconnected."""
        toolkit = self._toolkits.get(key)
        if toolkit is not None and link in toolkit.links:
            toolkit.links.remove(link)
            if not (toolkit.links or toolkit.apps or toolkit.inbox):
                del self._toolkits[key]

    def fetch(self, key: str) -> Request | None:
        """The oldest call in the inbox, for a toolkit that polls; it is handed out once."""
        self.admit(key)
        toolkit = self._toolkit(key)
        toolkit.polled_at = self._clock()
        return toolkit.inbox.popleft().request if toolkit.inbox else None

    def answer(self, key: str, request_id: object, result: object) -> None:
        """Give a caller its result; a Refusal if nobody waits for it."""
        self._expect(key, request_id).result.set_result(result)

    def spoil(self, key: str, request_id: object, why: str) -> None:
        """End a call whose answer came but cannot be used."""
        self._expect(key, request_id).result.set_exception(
            Refusal(Reason.BAD_ANSWER, f"the toolkit answered with something unusable: {why}")
        )

    # Callers

    def listing(self) -> list[Listing]:
        """All registered tools, by app and name."""
        rows = [
            Listing(tool, self._is_connected(toolkit))
            for toolkit in self._toolkits.values()
            for tool in toolkit.tools()
        ]
        return sorted(rows, key=lambda row: (row.tool.app, row.tool.name))

    def app_names(self, key: str) -> list[str]:
        """The apps registered under a key: what to call it where the key must not be shown."""
        toolkit = self._toolkits.get(key)
        return sorted(toolkit.apps) if toolkit else []

    async def call(
        self,
        name: str,
        params: dict[str, object],
        *,
        auth_token: str | None = None,
        app_name: str | None = None,
        timeout_s: float,
    ) -> Answer:
        """Have a tool called and wait for what it gives; a Refusal if there will be no answer.

        Under a timeout the toolkit may still run the call: the protocol has no cancel.
        """
        started = self._clock()
        key = self._find(name, app_name)
        if self._stopping:
            raise _stopping()
        call = _Call(
            key,
            Request(uuid.uuid4().hex, name, params, auth_token),
            asyncio.get_running_loop().create_future(),
        )
        self._pending[call.request.request_id] = call
        try:
            async with asyncio.timeout(timeout_s):
                await self._hand_over(call)
                result = await call.result
        except TimeoutError:
            raise Refusal(
                Reason.TIMEOUT,
                f"no answer from {name!r} within {limits.format_duration(timeout_s)}",
                "give it longer with timeout_s, and see the toolkit's log: "
                "the published SDK does not answer for a tool it does not know",
            ) from None
        finally:
            del self._pending[call.request.request_id]
            inbox = self._toolkit(key).inbox
            if call in inbox:
                inbox.remove(call)
        return Answer(call.request.request_id, result, self._clock() - started)

    def stop(self) -> None:
        """End all calls under way, and refuse new ones."""
        self._stopping = True
        for call in self._pending.values():
            if not call.result.done():
                call.result.set_exception(_stopping())

    # Inside

    def _toolkit(self, key: str) -> _Toolkit:
        return self._toolkits.setdefault(key, _Toolkit())

    def _is_connected(self, toolkit: _Toolkit) -> bool:
        polled_at = toolkit.polled_at
        return bool(toolkit.links) or (
            polled_at is not None and self._clock() - polled_at < POLL_FRESH_S
        )

    def _expect(self, key: str, request_id: object) -> _Call:
        call = self._pending.get(request_id) if isinstance(request_id, str) else None
        if call is None or call.key != key or call.result.done():
            raise Refusal(
                Reason.UNKNOWN_CALL,
                "no call with this request_id waits for an answer",
                "it was answered already, or its caller gave up waiting",
            )
        return call

    def _find(self, name: str, app_name: str | None) -> str:
        """The key to send a call to: of several with the tool, a connected one, then the newest."""
        found = [
            (self._is_connected(toolkit), toolkit.touched, key, tool)
            for key, toolkit in self._toolkits.items()
            for tool in toolkit.tools()
            if tool.name == name and app_name in (None, tool.app)
        ]
        if not found:
            raise self._unknown(name, app_name)
        apps = sorted({tool.app for *_, tool in found})
        if len(apps) > 1:
            raise Refusal(
                Reason.SEVERAL_APPS,
                f"several apps have a tool {name!r}: {', '.join(apps)}",
                f"say which with ?app=NAME, for example ?app={apps[0]}",
            )
        connected, _, key, tool = max(found, key=lambda row: row[:2])
        if not connected:
            raise Refusal(
                Reason.NOT_CONNECTED,
                f"{name!r} is registered, but no toolkit of the app {tool.app!r} is connected",
                "start the toolkit; GET /tools shows what is connected",
            )
        return key

    def _unknown(self, name: str, app_name: str | None) -> Refusal:
        tools = [tool for toolkit in self._toolkits.values() for tool in toolkit.tools()]
        if app_name is not None:
            apps = {tool.app for tool in tools}
            if app_name not in apps:
                tip = _nearest(app_name, apps) or "GET /tools lists the apps and their tools"
                return Refusal(Reason.UNKNOWN_TOOL, f"there is no app {app_name!r}", tip)
            tools = [tool for tool in tools if tool.app == app_name]
        where = "" if app_name is None else f" in the app {app_name!r}"
        if not tools:
            tip = "no tool is registered: start a toolkit (again, if the backend was restarted)"
        else:
            tip = _nearest(name, {tool.name for tool in tools}) or "GET /tools lists all tools"
        return Refusal(Reason.UNKNOWN_TOOL, f"there is no tool {name!r}{where}", tip)

    async def _hand_over(self, call: _Call) -> None:
        """Send the call over the newest websocket, or leave it in the inbox if there is none."""
        toolkit = self._toolkit(call.key)
        if not toolkit.links:
            if len(toolkit.inbox) >= MAX_WAITING:
                raise Refusal(
                    Reason.FULL,
                    f"{MAX_WAITING} calls wait for this toolkit to fetch them",
                    "call less often, or let the toolkit use the websocket",
                )
            toolkit.inbox.append(call)
            return
        message = {"message_type": "atp_tool_request", "payload": call.request.fields()}
        text = json.dumps(message, allow_nan=False)
        if len(text) > MAX_MESSAGE_BYTES:
            size, most = map(limits.format_size, (len(text), MAX_MESSAGE_BYTES))
            raise Refusal(Reason.TOO_LARGE, f"the call is {size} of JSON; {most} is the most")
        try:
            await toolkit.links[-1].send(text)
        except ConnectionError:
            raise Refusal(
                Reason.NOT_CONNECTED,
                "the toolkit's connection was lost while the call was handed over",
                "call again once the toolkit has reconnected",
            ) from None


def _stopping() -> Refusal:
    return Refusal(Reason.STOPPING, "the backend is stopping", "start it again, then call again")


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, sorted(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""
