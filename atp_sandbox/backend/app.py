"""The development backend's web side: the ATP endpoints for toolkits, and an HTTP API for people.

The paths and messages are those that the published SDKs, 0.1.0 to 0.2.5, expect. There is no
authentication: what keeps strangers out is that it listens on loopback and `HostGuard`, which
refuses what a web page in the same user's browser could send. No API key reaches a log line.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import math
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from atp_sandbox import limits
from atp_sandbox.backend.hub import MAX_MESSAGE_BYTES, Hub, Link, Listing, Reason, Refusal, Tool
from atp_sandbox.log import ERROR, INFO, WARNING, emit

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_JSON_DEPTH = 500
"""Half of what CPython's encoder can take; above `limits.MAX_JSON_DEPTH`, so that a toolkit's own
limit can be tried."""
DEFAULT_TIMEOUT_S = 60.0
MAX_TIMEOUT_S = 3600.0
"""How long a caller may wait; a forgotten one must end some day."""
PING_INTERVAL_S = 20.0
PING_TIMEOUT_S = 60.0
"""The published SDK runs its tools in the thread that answers pings: as long as a call's default
timeout, or slow tools would cost it the connection."""

_STATUS = {
    Reason.INVALID: 422,
    Reason.KEY_REFUSED: 403,
    Reason.UNKNOWN_TOOL: 404,
    Reason.UNKNOWN_CALL: 404,
    Reason.SEVERAL_APPS: 409,
    Reason.TOO_LARGE: 413,
    Reason.FULL: 429,
    Reason.NOT_CONNECTED: 503,
    Reason.BAD_ANSWER: 502,
    Reason.TIMEOUT: 504,
    Reason.STOPPING: 503,
}

_PAGE = """\
ATP backend for development (atp_sandbox). It has no authentication and keeps nothing on disk.

For people
  GET  /tools                all registered tools, as JSON
  POST /tools/NAME           call one: {{"params": {{...}}, "auth_token": "...", "timeout_s": 60}}
                             ?app=APP where several apps have a tool of that name
  GET  /health               {{"status": "ok"}}

For toolkits (base_url = {url})
  POST /api/v1/register_tool
  POST /api/v1/toolkit/verify_hash
  POST /api/v1/toolkit/verify_tool_hash
  GET  /api/v1/toolkit/KEY/inbox
  POST /api/v1/toolkit/KEY/inbox/respond
  WS   /ws/v1/atp/toolkit-client/KEY/      (SDK 0.1.2 and later)
  WS   /ws/v1/atp/KEY/                     (SDK 0.1.0 and 0.1.1)

Example
  curl {url}/tools/echo -d '{{"params": {{"text": "hello"}}}}'
"""


class Json(Response):
    """Strict JSON in ASCII with a line end, which a terminal likes."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False).encode("ascii") + b"\n"


def create_app(
    *,
    api_keys: Iterable[str] | None = None,
    host_names: Iterable[str] = (),
    allow_remote: bool = False,
) -> Starlette:
    """The backend as an ASGI application; its `state.hub` is the Hub.

    `api_keys` are the only keys let in (None: all are). `host_names` may stand in a Host header
    besides the loopback names; with `allow_remote` also every IP address may.
    """
    names = LOOPBACK_NAMES.union(name.lower() for name in host_names)
    app = Starlette(
        routes=[
            Route("/", index),
            Route("/health", health),
            Route("/tools", list_tools),
            Route("/tools/{name:path}", call_tool, methods=["POST"]),
            Route("/api/v1/register_tool", register_tool, methods=["POST"]),
            Route("/api/v1/toolkit/verify_hash", verify_hash, methods=["POST"]),
            Route("/api/v1/toolkit/verify_tool_hash", verify_tool_hash, methods=["POST"]),
            Route("/api/v1/toolkit/{key}/inbox", fetch_inbox),
            Route("/api/v1/toolkit/{key}/inbox/respond", respond_inbox, methods=["POST"]),
            WebSocketRoute("/ws/v1/atp/toolkit-client/{key}/", serve_toolkit),
            WebSocketRoute("/ws/v1/atp/{key}/", serve_toolkit),
        ],
        middleware=[Middleware(HostGuard, names=names, any_address=allow_remote)],
        exception_handlers={
            Refusal: _on_refusal,
            HTTPException: _on_http_exception,
            Exception: _on_bug,
        },
    )
    app.state.hub = Hub(api_keys)
    return app


class Server(uvicorn.Server):
    """Serves an application made by `create_app`; `on_ready` runs once it accepts connections.

    It takes no signals: whoever runs it calls `stop()`, from the loop's own thread.
    """

    def __init__(self, app: Starlette, on_ready: Callable[[], None]) -> None:
        # uvicorn writes the path of each websocket, which holds the key, whatever access_log says.
        for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
            logger = logging.getLogger(name)
            logger.handlers[:] = [logging.NullHandler()]
            logger.propagate = False
            logger.setLevel(logging.CRITICAL + 1)
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=3,
                ws="auto",  # `websockets`, a dependency; that name itself means a deprecated class
                ws_max_size=MAX_MESSAGE_BYTES,
                ws_per_message_deflate=False,
                ws_ping_interval=PING_INTERVAL_S,
                ws_ping_timeout=PING_TIMEOUT_S,
            )
        )
        self._hub: Hub = app.state.hub
        self._on_ready = on_ready

    def stop(self) -> None:
        """Stop accepting, end the calls under way, close the connections, return from serve()."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._hub.stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HostGuard:
    """Answers only requests that name this backend and do not come from someone else's web page.

    A foreign name in Host is DNS rebinding. A foreign Origin is another site's page reaching for
    `localhost`, which needs no rebinding for a websocket or a plain POST; an SDK sends its own.
    """

    def __init__(self, app: ASGIApp, *, names: frozenset[str], any_address: bool) -> None:
        self._app = app
        self._names = names
        self._any_address = any_address

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").lower()
        origin = headers.get("origin")
        if not self._is_ours(host):
            await _error(
                400,
                "the Host header names another machine",
                "address the backend as 127.0.0.1 or localhost, or as the address it listens on",
            )(scope, receive, send)
        elif origin is not None and origin.lower().partition("://")[2] != host:
            await _error(
                403,
                "this request was sent by a web page of another site",
                "call the backend from a program, or from a page that it serves itself",
            )(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, host: str) -> bool:
        name, colon, port = host.rpartition(":")
        if not colon or "]" in port:
            name = host
        if name in self._names:
            return True
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name.strip("[]"))
            return self._any_address
        return False


# For people


async def index(request: Request) -> Response:
    return PlainTextResponse(_PAGE.format(url=f"http://{request.url.netloc}"))


async def health(_request: Request) -> Response:
    return Json({"status": "ok"})


async def list_tools(request: Request) -> Response:
    return Json([_row(listing) for listing in _hub(request).listing()])


async def call_tool(request: Request) -> Response:
    body = await _read_object(request, default=b"{}")
    unknown = sorted(body.keys() - {"params", "auth_token", "timeout_s"})
    if unknown:
        raise Refusal(
            Reason.INVALID,
            f"unknown field {unknown[0]!r}",
            'the tool\'s parameters belong inside "params"; '
            'the other fields are "auth_token" and "timeout_s"',
        )
    params = body.get("params", {})
    if not isinstance(params, dict):
        raise _wrong("params", "an object of parameter names and values")
    timeout_s = body.get("timeout_s", DEFAULT_TIMEOUT_S)
    if (
        isinstance(timeout_s, bool)
        or not isinstance(timeout_s, int | float)
        or not 0 < timeout_s <= MAX_TIMEOUT_S
    ):
        raise _wrong("timeout_s", f"a number of seconds above 0 and up to {MAX_TIMEOUT_S:.0f}")
    answer = await _hub(request).call(
        request.path_params["name"],
        params,
        auth_token=_text(body, "auth_token", optional=True, max_chars=limits.MAX_TEXT_CHARS),
        app_name=request.query_params.get("app"),
        timeout_s=timeout_s,
    )
    return Json(
        {
            "request_id": answer.request_id,
            "result": answer.result,
            "duration_ms": round(answer.duration_s * 1000, 1),
        }
    )


# For toolkits


async def register_tool(request: Request) -> Response:
    body = await _read_object(request)
    key = _required_text(body, "api_key")
    toolkit_hash = _text(body, "toolkit_hash", optional=True)
    metadata = body.get("metadata")
    if not isinstance(metadata, dict):
        raise _wrong("metadata", "an object")
    tool = Tool(
        name=_required_text(body, "function_id"),
        app=_required_text(body, "app_name"),
        params=_names(metadata, "params"),
        required=_names(metadata, "required_params"),
        description=_text(metadata, "description", max_chars=limits.MAX_TEXT_CHARS) or "",
        auth_provider=_text(metadata, "auth_provider", optional=True),
        auth_type=_text(metadata, "auth_type", optional=True),
        auth_with=_text(metadata, "auth_with", optional=True),
        source_hash=_required_text(body, "code_hash"),
    )
    _hub(request).register(key, tool, toolkit_hash=toolkit_hash)
    emit(INFO, "backend.tool_registered", "tool registered", app=tool.app, tool=tool.name)
    return Json({"exchange_token": secrets.token_urlsafe(24)})


async def verify_hash(request: Request) -> Response:
    body = await _read_object(request)
    key, app, value = (_required_text(body, f) for f in ("api_key", "app_name", "toolkit_hash"))
    return Json({"up_to_date": _hub(request).is_toolkit_current(key, app, value)})


async def verify_tool_hash(request: Request) -> Response:
    body = await _read_object(request)
    key, name, value = (_required_text(body, f) for f in ("api_key", "tool_name", "tool_hash"))
    return Json({"up_to_date": _hub(request).is_tool_current(key, name, value)})


async def fetch_inbox(request: Request) -> Response:
    waiting = _hub(request).fetch(request.path_params["key"])
    return Json({} if waiting is None else waiting.fields())


async def respond_inbox(request: Request) -> Response:
    hub, key = _hub(request), request.path_params["key"]
    hub.admit(key)
    body = await _read_object(request)
    if "request_id" not in body or "response" not in body:
        raise Refusal(Reason.INVALID, 'the fields "request_id" and "response" are needed')
    hub.answer(key, body["request_id"], body["response"])
    return Json({"status": "ok"})


async def serve_toolkit(websocket: WebSocket) -> None:
    """One toolkit's websocket, from the handshake to its end."""
    hub: Hub = websocket.app.state.hub
    key: str = websocket.path_params["key"]
    try:
        hub.admit(key)
    except Refusal as refusal:
        emit(WARNING, "backend.key_refused", "a toolkit was refused: " + refusal.message)
        await websocket.send_denial_response(_refused(refusal))
        return

    async def send(text: str) -> None:
        try:
            await websocket.send_text(text)
        except (WebSocketDisconnect, RuntimeError):
            raise ConnectionError from None

    link = Link(send)
    await websocket.accept()
    try:
        hello = {"message": "Connected to the atp_sandbox development backend"}
        await send(json.dumps({"message_type": "atp_client_connected", "payload": hello}))
        hub.attach(key, link)
        emit(INFO, "backend.connected", "toolkit connected", apps=hub.app_names(key))
        while (message := await websocket.receive())["type"] == "websocket.receive":
            text = message.get("text")
            _take_message(hub, key, message["bytes"] if text is None else text.encode())
    except ConnectionError:
        pass
    finally:
        emit(INFO, "backend.disconnected", "toolkit disconnected", apps=hub.app_names(key))
        hub.detach(key, link)


def _take_message(hub: Hub, key: str, frame: bytes) -> None:
    """Give one message of a toolkit to whoever waits for it; what is no answer is only logged."""
    wrong = "it is not a tool_response"
    try:
        message, fault = _decode_leniently(frame)
        if isinstance(message, dict) and message.get("type") == "tool_response":
            request_id = message.get("request_id")
            if not fault and "result" not in message:
                fault = "it has no result"
            if fault:
                hub.spoil(key, request_id, fault)
            else:
                hub.answer(key, request_id, message["result"])
            return
    except Refusal as refusal:
        wrong = refusal.message
    except ValueError:
        wrong = "it is not JSON"
    emit(WARNING, "backend.message_ignored", f"a message of a toolkit was ignored: {wrong}")


# JSON in, errors out


def _decode(data: bytes) -> object:
    """One strict JSON value in UTF-8; ValueError says what is wrong without showing any of it."""
    try:
        value = json.loads(data.decode(), parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise _TooDeep from None
    if _is_deeper_than(value, MAX_JSON_DEPTH):
        raise _TooDeep
    return value


def _decode_leniently(data: bytes) -> tuple[object, str]:
    """As `_decode`, but NaN and Infinity, which the SDK does send, are taken and pointed out."""
    try:
        return _decode(data), ""
    except _NotFinite as error:
        return json.loads(data), str(error)


class _NotFinite(ValueError):
    pass


class _TooDeep(ValueError):
    def __str__(self) -> str:
        return f"more than {MAX_JSON_DEPTH} levels of nesting"


def _no_number(name: str) -> float:
    raise _NotFinite(f"{name} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number("a number beyond the range of a double")


def _is_deeper_than(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels + 1):
        layer = [
            child
            for item in layer
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not layer:
            return False
    return True


async def _read_object(request: Request, *, default: bytes = b"") -> dict[str, object]:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_MESSAGE_BYTES:
            most = limits.format_size(MAX_MESSAGE_BYTES)
            raise Refusal(Reason.TOO_LARGE, f"the body is larger than {most}")
    try:
        value = _decode(bytes(body) or default)
    except ValueError as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(Reason.INVALID, "the body is not a JSON object", "send {...}")
    return value


def _text(
    body: dict[str, object],
    name: str,
    *,
    optional: bool = False,
    max_chars: int = limits.MAX_NAME_CHARS,
) -> str | None:
    value = body.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, str) or len(value) > max_chars:
        raise _wrong(name, f"a string of up to {max_chars} characters")
    return value


def _required_text(body: dict[str, object], name: str) -> str:
    value = _text(body, name)
    if not value:
        raise _wrong(name, "a string that is not empty")
    return value


def _names(body: dict[str, object], name: str) -> tuple[str, ...]:
    value = body.get(name)
    if not isinstance(value, list) or len(value) > limits.MAX_TOOLS:
        raise _wrong(name, "a list of names")
    if not all(isinstance(item, str) and len(item) <= limits.MAX_NAME_CHARS for item in value):
        raise _wrong(name, "a list of names")
    return tuple(value)


def _wrong(name: str, expected: str) -> Refusal:
    return Refusal(Reason.INVALID, f"{name!r} must be {expected}")


def _row(listing: Listing) -> dict[str, object]:
    tool = listing.tool
    return {
        "name": tool.name,
        "app": tool.app,
        "params": list(tool.params),
        "required": list(tool.required),
        "description": tool.description,
        "auth": {"provider": tool.auth_provider, "type": tool.auth_type, "with": tool.auth_with},
        "connected": listing.connected,
    }


def _hub(request: Request) -> Hub:
    hub: Hub = request.app.state.hub
    return hub


def _error(status: int, message: str, tip: str = "") -> Response:
    return Json({"error": message, "tip": tip}, status)


def _refused(refusal: Refusal) -> Response:
    return _error(_STATUS[refusal.reason], refusal.message, refusal.tip)


async def _on_refusal(_request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _refused(error)


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    tip = "" if error.status_code == 400 else "GET / lists the endpoints"
    response = _error(error.status_code, error.detail, tip)
    response.headers.update(error.headers or {})
    return response


async def _on_bug(_request: Request, error: Exception) -> Response:
    emit(ERROR, "backend.bug", "a request failed inside the backend", kind=type(error).__name__)
    return _error(500, f"the backend failed ({type(error).__name__})", "please report this")
