"""Registration against a real HTTP server that answers as scripted."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import wait_until

from atp_sandbox.atp.registration import (
    Registered,
    Registrar,
    RegistrationEntry,
    RegistrationEvent,
    RegistrationFailed,
    RegistrationTimings,
    registration_body,
    toolkit_hash,
)
from atp_sandbox.loop import Loop

KEY = "S3CRET/key"
FAST = RegistrationTimings(backoff_first_s=0.02, backoff_cap_s=0.08)
PATIENCE_S = 30.0

KW = RegistrationEntry(
    app_name="oracle_app",
    function_id="kw",
    params=["a", "b"],
    required_params=["a"],
    description="d",
    auth_provider=None,
    auth_type=None,
    auth_with=None,
    sample_response={
        "got": {"a": "sample_value", "auth_token": "sample_token", "b": "sample_value"}
    },
    source_code=(
        "@client.register_tool(function_name='kw', params=['a', 'b'], required_params=['a'], "
        "description='d', auth_provider=None, auth_type=None, auth_with=None)\n"
        'def kw(**kwargs):\n    return {"got": dict(sorted(kwargs.items()))}\n'
    ),
    code_hash="0510cd4061718a8809202d2d3a80ba2d1a9fcefedfefc94eca737a1f8e1bdedc",
)
KW_TEXT = (
    '{"function_id": "kw", "api_key": "TESTKEY", "app_name": "oracle_app", '
    '"programming_language": "Python", '
    '"code_hash": "0510cd4061718a8809202d2d3a80ba2d1a9fcefedfefc94eca737a1f8e1bdedc", '
    '"metadata": {"params": ["a", "b"], "required_params": ["a"], "description": "d", '
    '"auth_provider": null, "auth_type": null, "auth_with": null, '
    '"sample_response": {"got": {"a": "sample_value", "auth_token": "sample_token", '
    '"b": "sample_value"}}, "source_code": "@client.register_tool(function_name=\'kw\', '
    "params=['a', 'b'], required_params=['a'], description='d', auth_provider=None, "
    'auth_type=None, auth_with=None)\\ndef kw(**kwargs):\\n    return {\\"got\\": '
    'dict(sorted(kwargs.items()))}\\n"}}'
)
UNICODE = replace(
    KW,
    function_id="unicode_é",
    params=["名"],
    required_params=[],
    sample_response="✓ 😀",
    source_code=(
        "@client.register_tool(function_name='unicode_é', params=['名'], required_params=[], "
        "description='d', auth_provider=None, auth_type=None, auth_with=None)\n"
        'def uni(**kwargs):\n    return "✓ 😀"\n'
    ),
    code_hash="b4526b19429c9e3b0f0cfb952783b90b58165e555d8e132437a578179793ba2c",
)
UNICODE_TEXT = (
    '{"function_id": "unicode_\\u00e9", "api_key": "TESTKEY", "app_name": "oracle_app", '
    '"programming_language": "Python", '
    '"code_hash": "b4526b19429c9e3b0f0cfb952783b90b58165e555d8e132437a578179793ba2c", '
    '"metadata": {"params": ["\\u540d"], "required_params": [], "description": "d", '
    '"auth_provider": null, "auth_type": null, "auth_with": null, '
    '"sample_response": "\\u2713 \\ud83d\\ude00", "source_code": '
    "\"@client.register_tool(function_name='unicode_\\u00e9', params=['\\u540d'], "
    "required_params=[], description='d', auth_provider=None, auth_type=None, "
    'auth_with=None)\\ndef uni(**kwargs):\\n    return \\"\\u2713 \\ud83d\\ude00\\"\\n"}}'
)


def entry(name: str, source: str = "source") -> RegistrationEntry:
    digest = hashlib.sha256(source.encode()).hexdigest()
    return replace(KW, function_id=name, source_code=source, code_hash=digest)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b'{"exchange_token": "xt"}'
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None


@dataclass
class Post:
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def tool(self) -> str:
        return str(json.loads(self.body)["function_id"])


class Backend:
    """Answers posts as scripted, with success when the script is over, and keeps them."""

    def __init__(self) -> None:
        self.script: list[Answer | None] = []
        """None: hang up without an answer."""
        self.posts: list[Post] = []
        backend = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                backend.posts.append(Post(self.path, list(self.headers.items()), body))
                self._answer()

            def do_GET(self) -> None:
                backend.posts.append(Post("GET " + self.path, [], b""))
                self._answer()

            def _answer(self) -> None:
                answer = backend.script.pop(0) if backend.script else Answer()
                if answer is None:
                    self.close_connection = True
                    return
                if answer.hold is not None:
                    answer.hold.wait(PATIENCE_S)
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                with suppress(OSError):  # a client that has given up
                    self.end_headers()
                    self.wfile.write(answer.body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Registration:
    """A registrar on a loop, with everything that it reported."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.events: list[RegistrationEvent] = []
        self.first_rounds = 0
        self.registrar: Registrar | None = None

    def start(
        self,
        url: str,
        *entries: RegistrationEntry,
        generation: str = "0.1",
        key: str = KEY,
        timings: RegistrationTimings = FAST,
        after: Registrar | None = None,
    ) -> Registrar:
        self.registrar = Registrar(
            self.loop,
            url,
            key,
            generation,
            entries,
            after=after,
            on_first_round=self._on_first_round,
            on_event=self.events.append,
            timings=timings,
            jitter=lambda _low, high: high,
        )
        self.registrar.start()
        return self.registrar

    def until(self, condition: Callable[[], object]) -> None:
        assert self.loop.run_until(lambda: bool(condition()), PATIENCE_S), self.events

    def until_events(self, count: int) -> list[RegistrationEvent]:
        self.until(lambda: len(self.events) >= count)
        return self.events

    def _on_first_round(self) -> None:
        self.first_rounds += 1


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend()
    yield made
    made.close()


@pytest.fixture
def registration() -> Iterator[Registration]:
    loop = Loop()
    made = Registration(loop)
    yield made
    if made.registrar is not None:
        made.registrar.stop()
    loop.close()


# --- the body


@pytest.mark.parametrize(("tool", "text"), [(KW, KW_TEXT), (UNICODE, UNICODE_TEXT)])
def test_the_body_on_the_wire_is_the_sdks_to_the_byte(
    backend: Backend, registration: Registration, tool: RegistrationEntry, text: str
) -> None:
    registration.start(backend.url, tool, key="TESTKEY")
    registration.until_events(1)
    assert backend.posts[0].body == text.encode("ascii")


def test_the_headers_are_those_of_requests_and_hold_no_credentials(
    backend: Backend,
    registration: Registration,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login u password p\n")
    monkeypatch.setenv("NETRC", str(netrc))
    registration.start(backend.url + "/prefix//", KW)
    registration.until_events(1)
    post = backend.posts[0]
    assert post.path == "/prefix/api/v1/register_tool"
    assert [name for name, _ in post.headers] == [
        "Host",
        "User-Agent",
        "Accept-Encoding",
        "Accept",
        "Connection",
        "Content-Type",
        "Content-Length",
    ]
    assert dict(post.headers)["Content-Type"] == "application/json"


def test_the_later_generation_names_the_toolkits_hash() -> None:
    body = registration_body(KW, KEY, "0.2", "HASH")
    assert list(body) == [
        "function_id",
        "api_key",
        "app_name",
        "programming_language",
        "code_hash",
        "toolkit_hash",
        "metadata",
    ]
    assert body["toolkit_hash"] == "HASH"
    assert "toolkit_hash" not in registration_body(KW, KEY, "0.1", "HASH")


def test_the_toolkits_hash_is_over_the_sources_by_tool_name() -> None:
    tools = [entry("zeta", "Z"), entry("alpha", "old"), entry("alpha", "A")]
    assert toolkit_hash(tools) == hashlib.sha256(b"AZ").hexdigest()


def test_the_toolkits_hash_is_sent(backend: Backend, registration: Registration) -> None:
    tools = [entry("zeta", "Z"), entry("alpha", "A")]
    registration.start(backend.url, *tools, generation="0.2")
    registration.until_events(2)
    for post in backend.posts:
        assert json.loads(post.body)["toolkit_hash"] == hashlib.sha256(b"AZ").hexdigest()


# --- answers


def test_tools_are_registered_in_source_order(backend: Backend, registration: Registration) -> None:
    names = ["zeta", "alpha", "kw", "kw"]
    registration.start(backend.url, *map(entry, names))
    registration.until(lambda: registration.first_rounds)
    assert [post.tool for post in backend.posts] == names
    assert registration.events == [Registered(name) for name in names]


def test_an_empty_object_is_success(backend: Backend, registration: Registration) -> None:
    backend.script = [Answer(body=b"{}")]
    registration.start(backend.url, KW)
    assert registration.until_events(1) == [Registered("kw")]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"ok", b"null", b"\xff", b"[" * 100_000, b'"' + b"x" * (2 << 20) + b'"']
)
def test_200_without_an_object_is_a_failure_not_retried(
    backend: Backend, registration: Registration, body: bytes
) -> None:
    backend.script = [Answer(body=body)]
    registration.start(backend.url, KW, entry("next"))
    registration.until(lambda: registration.first_rounds)
    assert registration.events == [
        RegistrationFailed("kw", 200, "the answer is not a JSON object", None),
        Registered("next"),
    ]


@pytest.mark.parametrize("status", [201, 202, 204, 304, 400, 401, 403, 404, 409, 422])
def test_other_final_answers_are_reported_and_not_retried(
    backend: Backend, registration: Registration, status: int
) -> None:
    backend.script = [Answer(status, b"")]
    registration.start(backend.url, KW)
    registration.until(lambda: registration.first_rounds)
    failed = registration.events[0]
    assert isinstance(failed, RegistrationFailed)
    assert (failed.status, failed.retry_in_s) == (status, None)
    assert len(backend.posts) == 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_passing_failures_are_retried_until_they_pass(
    backend: Backend, registration: Registration, status: int
) -> None:
    backend.script = [Answer(status)] * 4
    registration.start(backend.url, KW)
    events = registration.until_events(5)
    waits = [event.retry_in_s for event in events[:4] if isinstance(event, RegistrationFailed)]
    assert waits == [0.02, 0.04, 0.08, 0.08]
    assert events[4] == Registered("kw")
    assert registration.first_rounds == 1


def test_a_connection_without_an_answer_is_retried(
    backend: Backend, registration: Registration
) -> None:
    backend.script = [None]
    registration.start(backend.url, KW)
    events = registration.until_events(2)
    assert isinstance(events[0], RegistrationFailed)
    assert events[0].status is None
    assert events[1] == Registered("kw")


def test_a_refused_connection_is_retried(registration: Registration) -> None:
    with socket.socket() as deaf:  # bound, so that nobody else listens there
        deaf.bind(("127.0.0.1", 0))
        registration.start(f"http://127.0.0.1:{deaf.getsockname()[1]}", KW)
        events = registration.until_events(2)
    assert events[0] == RegistrationFailed("kw", None, "Connection refused", 0.02)


def test_a_silent_backend_is_left_after_the_timeout_and_retried(
    backend: Backend, registration: Registration
) -> None:
    hold = threading.Event()
    backend.script = [Answer(hold=hold)]
    registration.start(backend.url, KW, timings=replace(FAST, read_s=1.0))
    events = registration.until_events(2)
    hold.set()
    assert events == [RegistrationFailed("kw", None, "no answer in time", 0.02), Registered("kw")]


def test_retry_after_is_honoured(backend: Backend, registration: Registration) -> None:
    backend.script = [Answer(503, headers={"Retry-After": "1"})]
    began = time.monotonic()
    registration.start(backend.url, KW)
    events = registration.until_events(2)
    assert isinstance(events[0], RegistrationFailed)
    assert events[0].retry_in_s == 1.0
    assert time.monotonic() - began > 0.9


@pytest.mark.parametrize(("status", "method"), [(302, "GET "), (307, "")])
def test_redirects_are_followed_as_requests_does(
    backend: Backend, registration: Registration, status: int, method: str
) -> None:
    backend.script = [Answer(status, headers={"Location": "/moved"})]
    registration.start(backend.url, KW)
    assert registration.until_events(1) == [Registered("kw")]
    assert backend.posts[1].path == f"{method}/moved"


def test_an_entry_that_cannot_be_sent_does_not_stop_the_rest(
    backend: Backend, registration: Registration
) -> None:
    registration.start(backend.url, replace(KW, sample_response=float("nan")), entry("next"))
    registration.until(lambda: registration.first_rounds)
    failed, passed = registration.events
    assert isinstance(failed, RegistrationFailed)
    assert failed.retry_in_s is None
    assert passed == Registered("next")


# --- first round and end


def test_the_first_round_waits_for_one_attempt_of_each_not_for_success(
    backend: Backend, registration: Registration
) -> None:
    backend.script = [Answer(500), Answer(200), Answer(400)]
    slow = replace(FAST, backoff_first_s=1000.0, backoff_cap_s=1000.0)
    registration.start(backend.url, *map(entry, "abc"), timings=slow)
    registration.until(lambda: registration.first_rounds)
    assert len(registration.events) == 3


def test_the_first_round_ends_after_a_while_even_with_a_silent_backend(
    backend: Backend, registration: Registration
) -> None:
    hold = threading.Event()
    backend.script = [Answer(hold=hold)]
    registration.start(backend.url, KW, timings=replace(FAST, first_round_s=0.1))
    registration.until(lambda: registration.first_rounds)
    assert registration.events == []
    hold.set()
    registration.until_events(1)
    registration.loop.run_until(lambda: False, 0.1)
    assert registration.first_rounds == 1


def test_no_tools_end_the_first_round_at_once(registration: Registration) -> None:
    registration.start("http://127.0.0.1:9")
    registration.until(lambda: registration.first_rounds)


def test_without_a_thread_it_begins_later(
    backend: Backend, registration: Registration, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start
    refused: list[threading.Thread] = []

    def refuse_once(thread: threading.Thread) -> None:
        if thread.name == "atp-registration" and not refused:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_once)
    registration.start(backend.url, KW)
    assert refused
    assert registration.until_events(1) == [Registered("kw")]
    registration.until(lambda: registration.first_rounds)


def test_stop_ends_retries_and_callbacks(backend: Backend, registration: Registration) -> None:
    backend.script = [Answer(500)]
    before = threading.enumerate()  # one of the test before may still be on its way out
    registrar = registration.start(backend.url, KW, timings=RegistrationTimings())
    registration.until_events(1)
    (thread,) = [
        t for t in threading.enumerate() if t.name == "atp-registration" and t not in before
    ]
    registrar.stop()
    registrar.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_nothing_is_called_after_stop(backend: Backend, registration: Registration) -> None:
    hold = threading.Event()
    backend.script = [Answer(hold=hold)]
    registrar = registration.start(backend.url, KW, timings=replace(FAST, first_round_s=0.05))
    registrar.stop()
    hold.set()
    registration.loop.run_until(lambda: False, 0.2)
    assert (registration.events, registration.first_rounds) == ([], 0)


def test_what_follows_waits_for_the_post_at_hand_and_only_for_that(
    backend: Backend, registration: Registration
) -> None:
    """An old registration that arrives after a new one would be what the backend believes."""
    hold = threading.Event()
    backend.script = [Answer(hold=hold)]
    first = registration.start(backend.url, entry("a", "old"), entry("b"))
    wait_until(lambda: backend.posts, "the first post")
    first.stop()
    registration.start(backend.url, entry("a", "new"), after=first)
    registration.loop.run_until(lambda: False, 0.2)
    assert [post.tool for post in backend.posts] == ["a"]
    hold.set()
    assert registration.until_events(1) == [Registered("a")]
    assert [post.tool for post in backend.posts] == ["a", "a"]
    assert b'"source_code": "new"' in backend.posts[1].body


# --- secrets


def test_the_key_is_in_no_log_line_and_no_event(
    backend: Backend, registration: Registration, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "atp_sandbox")
    backend.script = [
        Answer(307, headers={"Location": f"http://127.0.0.1:1/{KEY}"}),
        Answer(307, headers={"Location": f"nowhere://{KEY}"}),
        Answer(),
    ]
    registration.start(backend.url, *map(entry, "abc"), timings=RegistrationTimings())
    registration.until(lambda: registration.first_rounds)
    assert len(registration.events) == 3
    names = [record.__dict__["event"] for record in caplog.records]
    assert names == ["registration_failed", "registration_failed", "tool_registered"]
    shown = repr(registration.events) + repr([record.__dict__ for record in caplog.records])
    assert "S3CRET" not in shown
