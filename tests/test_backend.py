"""The development backend: what toolkits, people and strangers get from it, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from atp_sandbox.backend.app import Server, create_app
from atp_sandbox.backend.embedded import EmbeddedBackend
from atp_sandbox.backend.hub import POLL_FRESH_S, Hub, Tool
from atp_sandbox.cli.backend import backend as backend_command
from atp_sandbox.cli.backend import listen
from atp_sandbox.errors import SandboxError, UsageError

KEY = "key-for-tests-only"
PATIENCE_S = 40.0
WS_PATHS = ["/ws/v1/atp/{key}/", "/ws/v1/atp/toolkit-client/{key}/"]
ROOT = Path(__file__).resolve().parents[1]


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not happen"
        threading.Event().wait(0.02)


def open_link(url: str, **options: Any) -> ClientConnection:
    link: ClientConnection = connect(url, max_size=None, proxy=None, **options)
    return link


class Running:
    """A backend in a thread of this process, on a free port."""

    def __init__(self, **options: Any) -> None:
        self.listener = listen("127.0.0.1", 0, allow_remote=False)
        self.port: int = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        ready = threading.Event()
        self.server = Server(create_app(**options), ready.set)
        self._callers = ThreadPoolExecutor(8)
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self.server.serve(sockets=[self.listener]))
        )
        self._thread.start()
        assert ready.wait(PATIENCE_S)

    def close(self) -> None:
        self.server.stop()
        self._thread.join(PATIENCE_S)
        self._callers.shutdown()
        self.http.close()
        self.listener.close()

    def link(self, key: str = KEY, path: str = WS_PATHS[1], **options: Any) -> ClientConnection:
        return open_link(f"ws://127.0.0.1:{self.port}{path.format(key=key)}", **options)

    @contextlib.contextmanager
    def toolkit(self, key: str = KEY, path: str = WS_PATHS[1]) -> Iterator[ClientConnection]:
        """A websocket that has been greeted; the backend counts it as connected from then on."""
        with self.link(key, path) as link:
            hello = json.loads(link.recv(timeout=PATIENCE_S))
            assert hello["message_type"] == "atp_client_connected"
            assert isinstance(hello["payload"]["message"], str)
            yield link

    def register(self, **changes: Any) -> httpx.Response:
        return self.http.post("/api/v1/register_tool", json=registration(**changes))

    def call(self, name: str = "echo", **body: Any) -> httpx.Response:
        return self.http.post(f"/tools/{name}", content=json.dumps(body))

    def call_soon(self, name: str = "echo", **body: Any) -> Future[httpx.Response]:
        return self._callers.submit(self.call, name, **body)


def registration(**changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "function_id": "echo",
        "api_key": KEY,
        "app_name": "demo",
        "programming_language": "Python",
        "code_hash": hashlib.sha256(b"def echo(): ...").hexdigest(),
        "toolkit_hash": "t1",
        "metadata": {
            "params": ["text", "times"],
            "required_params": ["text"],
            "description": "Gives back what it is given.",
            "auth_provider": "hubspot",
            "auth_type": "OAuth2",
            "auth_with": "access_token",
            "sample_response": "",
            "source_code": "def echo(): ...",
        },
    }
    metadata = changes.pop("metadata", {})
    return {**body, **changes, "metadata": {**body["metadata"], **metadata}}


@pytest.fixture(scope="module")
def _shared() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


@pytest.fixture
def backend(_shared: Running) -> Running:
    """The module's backend with an empty memory: a server is costly, a hub is not."""
    app: Any = _shared.server.config.app
    app.state.hub = _shared.server._hub = Hub()
    return _shared


def answer(link: ClientConnection, result: object = None, **changes: Any) -> dict[str, Any]:
    """Take one request from `link`, answer it, and give what was asked."""
    message: dict[str, Any] = json.loads(link.recv(timeout=PATIENCE_S))
    assert message["message_type"] == "atp_tool_request"
    row = {"type": "tool_response", "request_id": message["payload"]["request_id"]}
    link.send(json.dumps({**row, "result": result, **changes}))
    return message


# People and their tools


def test_registered_tool_is_listed_with_everything_but_its_key(backend: Running) -> None:
    registered = backend.register()
    assert registered.status_code == 200
    assert registered.json()["exchange_token"]
    assert backend.http.get("/tools").json() == [
        {
            "name": "echo",
            "app": "demo",
            "params": ["text", "times"],
            "required": ["text"],
            "description": "Gives back what it is given.",
            "auth": {"provider": "hubspot", "type": "OAuth2", "with": "access_token"},
            "connected": False,
        }
    ]


@pytest.mark.parametrize("path", WS_PATHS)
def test_call_reaches_the_toolkit_and_its_result_the_caller(backend: Running, path: str) -> None:
    backend.register()
    with backend.toolkit(path=path) as link:
        wait_until(lambda: backend.http.get("/tools").json()[0]["connected"])
        waiting = backend.call_soon(params={"text": "hé"}, auth_token="secret")
        payload = answer(link, {"said": "hé"})["payload"]
        assert payload.pop("request_id") == waiting.result().json()["request_id"]
        assert payload == {
            "tool_name": "echo",
            "params": {"text": "hé"},
            "auth_token": "secret",
        }
        assert waiting.result().status_code == 200
        assert waiting.result().json()["result"] == {"said": "hé"}
        assert waiting.result().json()["duration_ms"] >= 0
    wait_until(lambda: not backend.http.get("/tools").json()[0]["connected"])


def test_token_is_not_mentioned_to_the_toolkit_unless_given(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link:
        waiting = backend.call_soon()
        assert answer(link)["payload"].keys() == {"request_id", "tool_name", "params"}
        assert waiting.result().json()["result"] is None


def test_calls_of_one_toolkit_are_answered_in_any_order(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link:
        calls = [backend.call_soon(params={"text": str(n)}) for n in range(4)]
        asked = [json.loads(link.recv(timeout=PATIENCE_S))["payload"] for _ in calls]
        for payload in reversed(asked):
            row = {"type": "tool_response", "request_id": payload["request_id"]}
            link.send(json.dumps({**row, "result": payload["params"]["text"]}))
        assert [call.result().json()["result"] for call in calls] == ["0", "1", "2", "3"]


def test_answer_may_come_over_a_later_connection(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link:
        waiting = backend.call_soon()
        payload = json.loads(link.recv(timeout=PATIENCE_S))["payload"]
    with backend.toolkit() as link:
        row = {"type": "tool_response", "request_id": payload["request_id"], "result": 7}
        link.send(json.dumps(row))
        assert waiting.result().json()["result"] == 7


def test_another_key_cannot_answer_a_call(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link, backend.toolkit("another-key") as thief:
        waiting = backend.call_soon()
        request = json.loads(link.recv(timeout=PATIENCE_S))
        row = {"type": "tool_response", "request_id": request["payload"]["request_id"]}
        thief.send(json.dumps({**row, "result": "stolen"}))
        assert thief.ping().wait(PATIENCE_S)
        link.send(json.dumps({**row, "result": "honest"}))
        assert waiting.result().json()["result"] == "honest"


def test_unknown_tool_is_404_and_names_the_nearest(backend: Running) -> None:
    assert "no tool is registered" in backend.call("ehco").json()["tip"]
    backend.register()
    refused = backend.call("ehco")
    assert refused.status_code == 404
    assert refused.json() == {"error": "there is no tool 'ehco'", "tip": "did you mean 'echo'?"}
    wrong_app = backend.http.post("/tools/echo?app=demi", json={})
    assert wrong_app.status_code == 404
    assert wrong_app.json()["tip"] == "did you mean 'demo'?"


def test_tool_without_a_connected_toolkit_is_503(backend: Running) -> None:
    backend.register()
    refused = backend.call()
    assert refused.status_code == 503
    assert "no toolkit of the app 'demo' is connected" in refused.json()["error"]


def test_tool_that_several_apps_have_is_409_until_one_is_named(backend: Running) -> None:
    backend.register()
    backend.register(app_name="other", api_key="other-key")
    with backend.toolkit(), backend.toolkit("other-key") as other:
        refused = backend.call()
        assert refused.status_code == 409
        assert refused.json()["error"].endswith("demo, other")
        picked = backend._callers.submit(backend.http.post, "/tools/echo?app=other", json={})
        answer(other, "it was me")
        assert picked.result().json()["result"] == "it was me"


def test_silent_toolkit_is_504_and_stays_connected(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link:
        late = backend.call(timeout_s=0.05)
        assert late.status_code == 504
        assert "50 ms" in late.json()["error"]
        answer(link, "too late")
        waiting = backend.call_soon()
        answer(link, "in time")
        assert waiting.result().json()["result"] == "in time"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"params", 400, "not JSON"),
        (b"\xff", 400, "not JSON"),
        (b'{"params": {"x": NaN}}', 400, "NaN"),
        (b'{"params": {"x": 1e999}}', 400, "range"),
        (b"[" * 100_000, 400, "nesting"),
        (b'{"params": {"x": ' + b"[" * 600 + b"]" * 600 + b"}}", 400, "nesting"),
        (b"[]", 422, "not a JSON object"),
        (b'{"params": []}', 422, "'params'"),
        (b'{"auth_token": 1}', 422, "'auth_token'"),
        (b'{"timeout_s": 0}', 422, "'timeout_s'"),
        (b'{"timeout_s": true}', 422, "'timeout_s'"),
        (b'{"timeout_s": 1e9}', 422, "'timeout_s'"),
        (b'{"text": "hello"}', 422, "'text'"),
    ],
)
def test_body_that_is_no_call_is_refused(
    backend: Running, body: bytes, status: int, said: str
) -> None:
    backend.register()
    refused = backend.http.post("/tools/echo", content=body)
    assert refused.status_code == status
    assert said in refused.json()["error"]
    assert refused.json().keys() == {"error", "tip"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/tools/echo", 405), ("POST", "/tools", 405)],
)
def test_every_error_is_json(backend: Running, method: str, path: str, status: int) -> None:
    refused = backend.http.request(method, path)
    assert refused.status_code == status
    assert refused.json().keys() == {"error", "tip"}


def test_front_page_and_health(backend: Running) -> None:
    page = backend.http.get("/")
    assert page.headers["content-type"].startswith("text/plain")
    assert f"curl {backend.url}/tools/" in page.text
    assert backend.http.get("/health").json() == {"status": "ok"}


# Toolkits and their messages


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"function_id": ""}, "function_id"),
        ({"function_id": 7}, "function_id"),
        ({"api_key": None}, "api_key"),
        ({"app_name": "x" * 300}, "app_name"),
        ({"code_hash": None}, "code_hash"),
        ({"toolkit_hash": 1}, "toolkit_hash"),
        ({"metadata": {"params": "text"}}, "params"),
        ({"metadata": {"params": ["text", 1]}}, "params"),
        ({"metadata": {"required_params": None}}, "required_params"),
        ({"metadata": {"description": None}}, "description"),
        ({"metadata": {"auth_type": []}}, "auth_type"),
    ],
)
def test_registration_names_the_field_that_is_wrong(
    backend: Running, changes: dict[str, Any], field: str
) -> None:
    refused = backend.register(**changes)
    assert refused.status_code == 422
    assert repr(field) in refused.json()["error"]
    assert backend.http.get("/tools").json() == []


def test_registration_of_sdk_0_1_0_has_no_toolkit_hash(backend: Running) -> None:
    body = registration()
    del body["toolkit_hash"]
    assert backend.http.post("/api/v1/register_tool", json=body).status_code == 200
    refused = backend.http.post("/api/v1/register_tool", content=b"not json")
    assert refused.status_code == 400


def test_hashes_are_compared_with_what_was_registered(backend: Running) -> None:
    def is_current(path: str, **body: str) -> bool:
        reply = backend.http.post(f"/api/v1/toolkit/{path}", json={"api_key": KEY, **body})
        assert reply.status_code == 200
        value: bool = reply.json()["up_to_date"]
        return value

    toolkit = {"app_name": "demo", "toolkit_hash": "t2"}
    tool = {"tool_name": "echo", "tool_hash": "c1"}
    assert not is_current("verify_hash", **toolkit)
    assert not is_current("verify_tool_hash", **tool)
    backend.register(code_hash="c1", toolkit_hash="t1")
    assert not is_current("verify_hash", **toolkit)
    assert is_current("verify_tool_hash", **tool)
    backend.register(function_id="second", code_hash="c2", toolkit_hash="t2")
    assert is_current("verify_hash", **toolkit)
    assert is_current("verify_tool_hash", **tool)
    assert not is_current("verify_hash", **{**toolkit, "app_name": "other"})
    assert not is_current("verify_hash", **{**toolkit, "api_key": "other"})
    assert not is_current("verify_tool_hash", **{**tool, "tool_name": "second"})
    incomplete = backend.http.post("/api/v1/toolkit/verify_hash", json={"api_key": KEY})
    assert incomplete.status_code == 422


def test_polling_toolkit_is_served_from_its_inbox(backend: Running) -> None:
    inbox = f"/api/v1/toolkit/{KEY}/inbox"
    backend.register()
    assert backend.http.get(inbox).json() == {}
    assert backend.http.get("/tools").json()[0]["connected"]
    waiting = backend.call_soon(params={"text": "hi"}, auth_token="secret")
    requests: list[dict[str, Any]] = []

    def fetched() -> bool:
        requests.append(backend.http.get(inbox).json())
        return bool(requests[-1])

    wait_until(fetched)
    request_id = requests[-1].pop("request_id")
    assert requests[-1] == {"tool_name": "echo", "params": {"text": "hi"}, "auth_token": "secret"}
    assert backend.http.get(inbox).json() == {}

    reply = {"request_id": request_id, "response": {"said": "hi"}}
    assert backend.http.post(inbox + "/respond", json={"request_id": "x"}).status_code == 422
    stolen = backend.http.post("/api/v1/toolkit/other/inbox/respond", json=reply)
    assert stolen.status_code == 404
    assert backend.http.post(inbox + "/respond", json=reply).status_code == 200
    assert waiting.result().json()["result"] == {"said": "hi"}
    assert backend.http.post(inbox + "/respond", json=reply).status_code == 404


def test_call_that_timed_out_is_not_left_in_the_inbox(backend: Running) -> None:
    backend.register()
    backend.http.get(f"/api/v1/toolkit/{KEY}/inbox")
    assert backend.call(timeout_s=0.05).status_code == 504
    assert backend.http.get(f"/api/v1/toolkit/{KEY}/inbox").json() == {}


def test_toolkit_that_stopped_polling_counts_as_gone() -> None:
    now = 1000.0
    hub = Hub(clock=lambda: now)
    hub.register(KEY, Tool("echo", "demo"))
    hub.fetch(KEY)
    now += POLL_FRESH_S - 1
    assert hub.listing()[0].connected
    now += 2
    assert not hub.listing()[0].connected


@pytest.mark.parametrize(
    "junk",
    [
        "",
        "nonsense",
        "[]",
        '{"type": "app_response", "request_id": 1, "result": 1}',
        '{"type": "tool_response"}',
        '{"type": "tool_response", "request_id": [], "result": 1}',
        '{"type": "tool_response", "request_id": "unknown", "result": NaN}',
        "[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_odd_message_does_not_end_the_connection(backend: Running, junk: str | bytes) -> None:
    backend.register()
    with backend.toolkit() as link:
        link.send(junk)
        waiting = backend.call_soon()
        answer(link, "still here")
        assert waiting.result().json()["result"] == "still here"


def test_answer_in_a_binary_frame_is_taken(backend: Running) -> None:
    backend.register()
    with backend.toolkit() as link:
        waiting = backend.call_soon()
        payload = json.loads(link.recv(timeout=PATIENCE_S))["payload"]
        row = {"type": "tool_response", "request_id": payload["request_id"], "result": 1}
        link.send(json.dumps(row).encode())
        assert waiting.result().json()["result"] == 1


@pytest.mark.parametrize("result", ["NaN", "-Infinity", "1e999"])
def test_answer_that_is_not_strict_json_is_502_at_once(backend: Running, result: str) -> None:
    backend.register()
    with backend.toolkit() as link:
        waiting = backend.call_soon()
        request_id = json.loads(link.recv(timeout=PATIENCE_S))["payload"]["request_id"]
        link.send(f'{{"type": "tool_response", "request_id": "{request_id}", "result": {result}}}')
        assert waiting.result().status_code == 502
        assert "unusable" in waiting.result().json()["error"]


def test_lone_surrogate_and_deep_nesting_pass_both_ways(backend: Running) -> None:
    deep: list[Any] = []
    for _ in range(400):
        deep = [deep]
    backend.register()
    with backend.toolkit() as link:
        waiting = backend.call_soon(params={"text": "\ud800", "times": deep})
        params = answer(link, ["\udfff", deep])["payload"]["params"]
        assert params == {"text": "\ud800", "times": deep}
        assert json.loads(waiting.result().content)["result"] == ["\udfff", deep]


def test_messages_of_twenty_megabytes_pass_both_ways(backend: Running) -> None:
    backend.register()
    text = "x" * (20 << 20)
    with backend.toolkit() as link:
        waiting = backend.call_soon(params={"text": text})
        assert answer(link, text)["payload"]["params"]["text"] == text
        assert waiting.result().json()["result"] == text


def test_call_of_more_than_64_mebibytes_is_413(backend: Running) -> None:
    backend.register()
    refused = backend.http.post("/tools/echo", content=b" " * (65 << 20))
    assert refused.status_code == 413
    # each é is two bytes in the body and six on the websocket
    body = json.dumps({"params": {"text": "é" * (12 << 20)}}, ensure_ascii=False).encode()
    with backend.toolkit():
        wait_until(lambda: backend.http.get("/tools").json()[0]["connected"])
        assert backend.http.post("/tools/echo", content=body).status_code == 413


def test_pings_are_answered_and_nothing_is_compressed(backend: Running) -> None:
    with backend.toolkit() as link:
        assert link.response is not None
        assert "Sec-WebSocket-Extensions" not in link.response.headers
        assert link.ping(b"payload").wait(PATIENCE_S)


def test_backend_pings_idle_toolkits() -> None:
    running = Running()
    try:
        running.server.config.ws_ping_interval = 0.05
        with running.toolkit() as link:
            (served,) = running.server.server_state.connections
            wait_until(lambda: getattr(served, "last_ping_rtt", 0) > 0)
            assert link.ping().wait(PATIENCE_S)
    finally:
        running.close()


def test_stopping_ends_the_calls_under_way() -> None:
    running = Running()
    try:
        running.register()
        with running.toolkit() as link:
            waiting = running.call_soon()
            link.recv(timeout=PATIENCE_S)
            running.server.stop()
            assert waiting.result(timeout=PATIENCE_S).status_code == 503
    finally:
        running.close()


# Strangers


@pytest.fixture
def restricted() -> Iterator[Running]:
    running = Running(api_keys={KEY})
    yield running
    running.close()


def test_only_the_listed_keys_are_let_in(restricted: Running) -> None:
    assert restricted.register().status_code == 200
    with restricted.toolkit():
        pass
    for path in WS_PATHS:
        with pytest.raises(InvalidStatus) as refused, restricted.link("stranger", path):
            pass
        assert refused.value.response.status_code == 403
        assert json.loads(refused.value.response.body or b"{}").keys() == {"error", "tip"}
    assert restricted.register(api_key="stranger").status_code == 403
    assert restricted.http.get("/api/v1/toolkit/stranger/inbox").status_code == 403
    verify = {"api_key": "stranger", "app_name": "demo", "toolkit_hash": "t1"}
    assert restricted.http.post("/api/v1/toolkit/verify_hash", json=verify).status_code == 403


@pytest.mark.parametrize(
    ("host", "is_served"),
    [
        ("127.0.0.1:{port}", True),
        ("LocalHost:{port}", True),
        ("localhost", True),
        ("[::1]:{port}", True),
        ("evil.example:{port}", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1:{port}", False),
        ("[2001:db8::1]:{port}", False),
        ("::1", False),
    ],
)
def test_host_header_of_another_machine_is_400(
    backend: Running, host: str, is_served: bool
) -> None:
    reply = backend.http.get("/tools", headers={"Host": host.format(port=backend.port)})
    assert reply.status_code == (200 if is_served else 400)
    if not is_served:
        assert reply.json().keys() == {"error", "tip"}


def test_rebound_or_foreign_page_gets_no_websocket_and_no_call(backend: Running) -> None:
    backend.register()
    for origin in ("https://evil.example", "null", f"http://localhost:{backend.port}"):
        with pytest.raises(InvalidStatus) as refused, backend.link(origin=origin):
            pass
        assert refused.value.response.status_code == 403
        page = backend.http.post("/tools/echo", json={}, headers={"Origin": origin})
        assert page.status_code == 403
    with backend.link(origin=f"http://127.0.0.1:{backend.port}"):
        pass
    rebound = {"Host": "evil.example", "Origin": "http://evil.example"}
    assert backend.http.post("/tools/echo", json={}, headers=rebound).status_code == 400


def test_remote_backend_answers_to_addresses_but_not_to_unknown_names() -> None:
    running = Running(allow_remote=True, host_names=["build-box"])
    try:
        for host, status in [("10.0.0.1", 200), ("build-box", 200), ("evil.example", 400)]:
            assert running.http.get("/health", headers={"Host": host}).status_code == status
    finally:
        running.close()


# The command


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_command_refuses_an_address_that_others_reach(host: str) -> None:
    result = CliRunner().invoke(backend_command, ["--host", host, "--port", "0"])
    assert isinstance(result.exception, UsageError)
    assert "no authentication" in result.exception.cause
    assert "--allow-remote" in result.exception.tip


def test_command_says_that_the_port_is_taken(backend: Running) -> None:
    result = CliRunner().invoke(backend_command, ["--port", str(backend.port)])
    assert isinstance(result.exception, SandboxError)
    assert str(backend.port) in result.exception.message
    assert "EADDRINUSE" in result.exception.cause
    assert "--port 0" in result.exception.tip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_ends_with_0_and_shows_no_key(number: signal.Signals, tmp_path: Path) -> None:
    code = "from atp_sandbox.cli.backend import backend; backend()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--port", "0", "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    with process:
        try:
            assert process.stdout is not None
            ready = json.loads(process.stdout.readline())
            assert ready["url"] == f"http://127.0.0.1:{ready['port']}"
            with httpx.Client(base_url=ready["url"], trust_env=False) as http:
                http.post("/api/v1/register_tool", json=registration())
                http.get(f"/api/v1/toolkit/{KEY}/inbox")
                for path in WS_PATHS:
                    url = f"ws://127.0.0.1:{ready['port']}{path.format(key=KEY)}"
                    with open_link(url) as link:
                        link.recv(timeout=PATIENCE_S)
                        link.send("junk")
                process.send_signal(number)
                output, _ = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0
    events = [json.loads(line)["event"] for line in output.splitlines()]
    assert {"backend.tool_registered", "backend.connected", "backend.disconnected"} <= set(events)
    assert KEY.encode() not in output


# The embedded backend


def test_embedded_backend_listens_until_it_is_closed() -> None:
    with EmbeddedBackend() as embedded:
        assert httpx.get(embedded.url + "/health", trust_env=False).json() == {"status": "ok"}
        assert embedded.url == f"http://127.0.0.1:{embedded.port}"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", embedded.port), 5)
    embedded.close()


def test_embedded_backend_says_why_it_cannot_start(backend: Running) -> None:
    with pytest.raises(SandboxError) as raised:
        EmbeddedBackend(backend.port)
    assert str(backend.port) in raised.value.message
    assert "EADDRINUSE" in raised.value.cause
    assert raised.value.tip


def test_embedded_backend_does_not_import_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('the toolkit ran in our process')")
    monkeypatch.chdir(tmp_path)
    with EmbeddedBackend() as embedded:
        assert httpx.get(embedded.url + "/health", trust_env=False).status_code == 200


def test_embedded_backend_ends_when_its_parent_is_killed() -> None:
    code = (
        "import sys; from atp_sandbox.backend.embedded import EmbeddedBackend\n"
        "print(EmbeddedBackend().pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        try:
            assert parent.stdout is not None
            child = os.pidfd_open(int(parent.stdout.readline()))
        finally:
            parent.kill()
    try:
        assert select.select([child], [], [], PATIENCE_S)[0], "the child outlived its parent"
    finally:
        os.close(child)


# The published SDKs, unmodified


def sdk_python(version: str, oldest: tuple[int, int], *also: str) -> str:
    """The interpreter of a virtual environment that holds this release; made once and kept.

    It lies in $ATP_TEST_CACHE, or in .cache beside the tests folder.
    """
    cache = Path(os.environ.get("ATP_TEST_CACHE") or ROOT / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"atp_sdk-{version}"
    python, complete = folder / "bin" / "python", folder / "complete"
    with (cache / f"atp_sdk-{version}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            base = find_interpreter(oldest)
            run(base, "-m", "venv", "--clear", str(folder))
            wanted = [f"agenttoolprotocol=={version}", *also]
            run(str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *wanted)
            complete.touch()
    return str(python)


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        pytest.skip(f"cannot prepare the SDK: `{' '.join(command[1:])}`: {last}")


def find_interpreter(oldest: tuple[int, int]) -> str:
    if sys.version_info[:2] >= oldest:
        return sys.executable
    named = map(shutil.which, ("python3.12", "python3.13", "python3.14"))
    installed = sorted(Path.home().glob(".pyenv/versions/*/bin/python"), reverse=True)
    candidates = [path for path in named if path] + [str(path) for path in installed]
    check = f"import sys, venv, ensurepip; sys.exit(sys.version_info < {oldest})"
    for path in candidates:
        if subprocess.run([path, "-c", check], capture_output=True, check=False).returncode == 0:
            return path
    wanted = ".".join(map(str, oldest))
    pytest.skip(f"no Python {wanted} or later: {len(candidates)} interpreters tried, none fits")


@pytest.fixture(scope="session")
def sdk_0_1_0() -> str:
    return sdk_python("0.1.0", (3, 11), "websocket-client", "requests")


@pytest.fixture(scope="session")
def sdk_0_2_5() -> str:
    return sdk_python("0.2.5", (3, 12))


@contextlib.contextmanager
def sdk_toolkit(python: str, folder: Path, url: str, options: str = "") -> Iterator[None]:
    script = folder / "toolkit.py"
    script.write_text(f"""
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key={KEY!r}, app_name="demo", base_url={url!r}{options})

@client.register_tool(
    function_name="echo", params=["text"], required_params=["text"], description="Echo.",
    auth_provider=None, auth_type=None, auth_with=None,
)
def echo(text):
    return {{"said": text}}

client.start()
""")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [python, str(script)], cwd=folder, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()
        sys.stdout.write((folder / "log").read_text(errors="replace")[-20_000:])


def call_sdk(backend: Running, *texts: str, timeout_s: float = PATIENCE_S) -> None:
    def is_connected() -> bool:
        return [row["connected"] for row in backend.http.get("/tools").json()] == [True]

    wait_until(is_connected)
    for text in texts or ("hello", "ünï \U0001f600 \x00"):
        reply = backend.call(params={"text": text}, timeout_s=timeout_s)
        assert (reply.status_code, reply.json().get("result")) == (200, {"said": text})


def test_sdk_0_1_0_is_served_over_its_websocket(
    backend: Running, sdk_0_1_0: str, tmp_path: Path
) -> None:
    with sdk_toolkit(sdk_0_1_0, tmp_path, backend.url):
        call_sdk(backend)
        wrong = backend.call(params={"nope": 1})
        assert isinstance(wrong.json()["result"]["error"], str)


def test_sdk_0_2_5_is_served_over_its_websocket(
    backend: Running, sdk_0_2_5: str, tmp_path: Path
) -> None:
    with sdk_toolkit(sdk_0_2_5, tmp_path, backend.url, ', protocol="ws"'):
        call_sdk(backend)


def test_sdk_0_2_5_skips_registration_of_what_is_up_to_date(
    backend: Running, sdk_0_2_5: str, tmp_path: Path
) -> None:
    for _ in range(2):
        with sdk_toolkit(sdk_0_2_5, tmp_path, backend.url, ', protocol="ws"'):
            call_sdk(backend)
        wait_until(lambda: not backend.http.get("/tools").json()[0]["connected"])
    assert "registration skipped" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_sdk_0_2_5_is_served_from_its_inbox(
    backend: Running, sdk_0_2_5: str, tmp_path: Path
) -> None:
    with sdk_toolkit(sdk_0_2_5, tmp_path, backend.url):
        call_sdk(backend, "hello", timeout_s=60)
