"""The published SDK's own traffic, case by case, against `serve` in its place.

`golden/transcripts` is what the real SDK 0.1.0 put on the wire in each scenario of `golden/oracle`.
Here the same scenarios run with `serve` as the interpreter of the toolkit, and what they record is
compared: exactly where INDEX.json says `match`, and where it says `improve`
with what it asks for instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from atp_sandbox.outcome import RETRYABLE, Kind

HERE = Path(__file__).resolve().parent
TRANSCRIPTS = HERE / "golden" / "transcripts"
INDEX = {case["scenario"]: case for case in json.loads((TRANSCRIPTS / "INDEX.json").read_text())}

SERVE_OPTIONS = (
    *("--as-written", "--env", "ATP_BASE_URL", "--ws-path", "0.1"),
    *("--sample-responses", "--output", "16M"),
)
SCENARIO_S = 190
GONE_S = 5.0
"""For the kernel to take the jails down after their supervisor was killed; about 50 ms if idle."""
FIRST_CONNECTION_S = 40.0
ANSWER_S = 20.0
"""For an answer that is due: a scenario gives some a second, enough where nothing else runs."""
LOOK_S = 0.3
SAMPLE_UNAVAILABLE = {"error": "Sample response unavailable"}

# -- what we do otherwise --------------------------------------------------------------------------


@dataclass(frozen=True)
class Answered:
    """An answer that is meant to differ from the recorded one; `kind` None: there is none."""

    why: str
    kind: Kind | None
    error: str | None = None
    """The exact sentence, where it is ours to promise."""


STRICT_JSON = "NaN and Infinity are no JSON: nothing invalid is taken in or sent out"
ALWAYS_ANSWERED = "each request has exactly one answer, whatever the tool does"

DIFFERENT_ANSWERS: dict[str, dict[str, Answered]] = {
    "call_normal": {
        '"s"': Answered("a lone surrogate is no character", Kind.INVALID_RESULT),
    },
    "call_exceptions": {
        '"empty"': Answered(
            "an exception without a text is named by its type", Kind.TOOL_ERROR, "RuntimeError"
        ),
        '"badstr"': Answered(ALWAYS_ANSWERED, Kind.TOOL_ERROR, "E"),
        '"genexit"': Answered(ALWAYS_ANSWERED, Kind.TOOL_ERROR, "ge"),
    },
    "call_huge": {
        '"64MB"': Answered("a result has a largest size, here 16 MiB", Kind.OUTPUT_LIMIT),
    },
    "call_malformed_frames": {
        "null": Answered("a request without an id is logged only: nobody could match it", None),
        '"p10"': Answered(STRICT_JSON, Kind.INVALID_PARAMS),
    },
    "call_return_values": {
        '"nan"': Answered(STRICT_JSON, Kind.INVALID_RESULT),
        '"inf"': Answered(STRICT_JSON, Kind.INVALID_RESULT),
    },
}
"""By scenario and request id. What else differs:

- `call_normal`: a repeated request is not run again but sent the same answer again. The wire is the
  same; the log shows it.
- `register_api_key_parameter_name`: a script that never calls `start()` is served all the same.
- `two_clients_one_process`: a tool of the other client is an error, as any unknown one.
- `register_http_*`: a registration that failed in a way that may pass is tried again.
- Each reconnect waits for its back-off.
"""

FREE_WORDING: dict[str, set[str]] = {
    "call_malformed_frames": {'"p1"', '"p2"', '"p3"', '"p4"', '"p5"'},
    "call_exceptions": {'"recursion"'},
    "call_return_values": {'"deep"'},
}
"""Errors whose sentence is Python's own and changes with its version."""

APPLICATION_ERRORS = {"call_return_values": {'"error_dict"'}}
"""Results that only look like a failure: the tool returned them."""

DIFFERENT_CLOSES: dict[str, list[tuple[int, str]]] = {
    # RFC 6455, section 7.4.1: whoever fails a connection says why. 0.1.0 said 1000, "normal".
    "call_malformed_frames": [(1007, ""), (1002, "")],
    # 0.1.0 hung up because GeneratorExit ended its thread.
    "call_exceptions": [],
}

RETRIED_REGISTRATIONS = {f"register_http_{status}" for status in (429, 500, 502, 503)}

REQUESTS_ONLY = {"register_api_key_parameter_name"}
"""There is no connection in the transcript, and there is one here."""
ANSWERS_APART = {"two_clients_one_process"}
"""Which connection comes first decides what is answered: see the case's own check."""

# -- documents -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: str


@dataclass(frozen=True)
class Document:
    """What one scenario recorded: the SDK's transcript, or ours."""

    content: dict[str, Any] = field(repr=False)

    @property
    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = self.content["result"]
        return result

    @property
    def log(self) -> list[str]:
        log: list[str] = self.content["client_log"]
        return log

    @property
    def log_text(self) -> str:
        return "\n".join(self.log)

    @property
    def events(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = self.content["events"]
        return events

    def _from_client(self, channel: str, *frames: str) -> list[dict[str, Any]]:
        return [
            event
            for event in self.events
            if event.get("dir") == "c2s"
            and event.get("chan") == channel
            and (not frames or event["frame"] in frames)
        ]

    @cached_property
    def requests(self) -> list[Request]:
        return [
            Request(
                event["method"],
                event["target"],
                tuple(_headers(event["headers"])),
                event["body"]["text"],
            )
            for event in self._from_client("http")
        ]

    @property
    def first_request_ms(self) -> int:
        return int(self._from_client("http")[0]["t_ms"])

    @property
    def registrations(self) -> list[dict[str, Any]]:
        return [
            json.loads(request.body)
            for request in self.requests
            if request.target.endswith("/register_tool")
        ]

    @property
    def samples(self) -> dict[str, Any]:
        return {r["function_id"]: r["metadata"]["sample_response"] for r in self.registrations}

    @property
    def handshakes(self) -> list[tuple[str, list[tuple[str, str]]]]:
        return [
            (event["target"], [(name, value) for name, value in event["headers"]])
            for event in self._from_client("ws", "handshake")
        ]

    @cached_property
    def answers(self) -> list[tuple[str, str]]:
        """(request id, text) of each message of the client, ids as spelled there."""
        return [(_request_id(text), text) for text in map(_text, self._from_client("ws", "text"))]

    def results(self) -> dict[str, Any]:
        """Each answer's `result`; no id may have been answered twice."""
        ids = [request_id for request_id, _ in self.answers]
        assert len(set(ids)) == len(ids), f"answered twice: {ids}"
        return {json.loads(i): json.loads(text)["result"] for i, text in self.answers}

    @property
    def closes(self) -> list[tuple[int, str]]:
        return [(event["code"], event["reason"]) for event in self._from_client("ws", "close")]

    @property
    def pongs(self) -> list[str]:
        return [event["payload"]["text"] for event in self._from_client("ws", "pong")]

    @property
    def pings(self) -> list[dict[str, Any]]:
        return self._from_client("ws", "ping")

    @property
    def frames(self) -> list[dict[str, Any]]:
        """All frames of the client, whatever their kind."""
        return [e for e in self._from_client("ws") if e["frame"] not in ("handshake", "tcp_eof")]


def _headers(pairs: list[list[str]]) -> Iterator[tuple[str, str]]:
    """Names and values, without what says which library was used; the length is checked apart."""
    for name, value in pairs:
        if name == "User-Agent":
            value = re.sub(r"^python-requests/[\d.]+$", "python-requests/*", value)
        elif name == "Accept-Encoding":
            assert value in ("gzip, deflate", requests.utils.default_headers()["Accept-Encoding"])
            value = "*"
        yield name, value


def _text(event: dict[str, Any]) -> str:
    """The frame's text; of a long one its ends and its digest, as it was recorded."""
    payload = event["payload"]
    if "text" in payload:
        return str(payload["text"])
    return f"{payload['text_head']}…{payload['text_tail']} {payload['bytes']} {payload['sha256']}"


def _request_id(text: str) -> str:
    found = re.match(r'\{"type": "tool_response", "request_id": (.*?), "result": ', text)
    assert found, f"no tool_response: {text}"
    return found[1]


def transcript(name: str) -> Document:
    """What the published SDK did."""
    return Document(json.loads((TRANSCRIPTS / f"{name}.json").read_text()))


# -- running ---------------------------------------------------------------------------------------

Scenario = Callable[[Any], Coroutine[Any, Any, None]]


def oracle(name: str) -> Any:
    """A module of the recorded oracle."""
    folder = str(HERE / "golden" / "oracle")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def scenario(name: str) -> Scenario:
    function: Scenario = oracle("scenarios").S[name][0]
    return function


def play(
    name: str,
    folder: Path,
    *options: str,
    function: Scenario | None = None,
) -> Document:
    """Run a scenario with `serve` as the toolkit's interpreter; everything ends with it."""
    return asyncio.run(_play(name, function or scenario(name), folder, options))


async def _play(name: str, function: Scenario, folder: Path, options: tuple[str, ...]) -> Document:
    run = oracle("harness").Run(name, "0.1.0", _interpreter(folder, options), folder / "run")
    (folder / "run").mkdir()
    run.b = await oracle("fake_backend").Backend().start()
    held = socket.socket()
    run.client = _patient_client(run)
    run.b.next_ws = _patient_next_ws(run)
    run.b.stop_listening = _holding_its_port(run, held)
    family: set[psutil.Process] = set()
    looking = asyncio.create_task(_look_for_family(run, family))
    try:
        await asyncio.wait_for(function(run), SCENARIO_S)
        looking.cancel()
        _add_family(run, family)
    finally:
        looking.cancel()
        await run.finish()
        await _disconnect(run)
        held.close()
        document = Document(run.document())
        run.logf.close()
    _assert_gone(family, folder)
    return document


def _interpreter(folder: Path, options: tuple[str, ...]) -> str:
    """A script that takes a toolkit's path, as an interpreter does."""
    path = folder / "serve.sh"
    words = [sys.executable, "-m", "atp_sandbox", "serve", *SERVE_OPTIONS, *options]
    words += ["--state-dir", str(folder / "state")]
    quoted = " ".join(f"'{word}'" for word in words)
    path.write_text(f"#!/bin/sh\nPYTHONPATH='{HERE.parent}' exec {quoted} \"$@\"\n")
    path.chmod(0o755)
    return str(path)


Patient = Callable[..., Coroutine[Any, Any, Any]]


async def _until(run: Any, condition: Callable[[], bool]) -> None:
    """Give a first step the time that a busy machine needs, unless `serve` ends before it."""
    deadline = time.monotonic() + FIRST_CONNECTION_S
    while not condition() and run.proc.returncode is None and time.monotonic() < deadline:
        await asyncio.sleep(0.02)


def _patient_client(run: Any) -> Patient:
    """`run.client`, from which a scenario's times run: interpreter and jail have started then."""
    client = run.client

    async def patient_client(*arguments: Any, **options: Any) -> None:
        await client(*arguments, **options)
        await _until(run, lambda: run.b.nconn > 0 or "the backend" in run.log())

    return patient_client


def _patient_next_ws(run: Any) -> Patient:
    next_ws = run.b.next_ws

    async def patient_next_ws(timeout: float = 10) -> Any:
        await _until(run, lambda: run.b.ws_attempts > 0)
        ws = await next_ws(timeout if run.proc.returncode is None else 0.1)
        if ws is not None:
            _wait_for_due_answers(ws)
        return ws

    return patient_next_ws


def _wait_for_due_answers(ws: Any) -> None:
    """Each request has an answer, so what follows one is waited for."""
    request, recv = ws.request, ws.recv
    due: list[int] = []

    async def counting_request(*arguments: Any, **options: Any) -> None:
        due.append(1)
        await request(*arguments, **options)

    async def patient_recv(timeout: float = 5.0, *arguments: Any) -> Any:
        found = await recv(max(timeout, ANSWER_S) if due else timeout, *arguments)
        del due[-1:]
        return found

    ws.request, ws.recv = counting_request, patient_recv


def _holding_its_port(run: Any, held: socket.socket) -> Patient:
    """The backend's `stop_listening`; `held` keeps others from listening there instead."""
    stop_listening = run.b.stop_listening

    async def stop_and_hold() -> None:
        await stop_listening()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for when it listens again
        held.bind((run.b.host, run.b.port))

    return stop_and_hold


async def _disconnect(run: Any) -> None:
    """End what the oracle leaves to its process's end: its socket, its tasks."""
    if run.b.server:
        run.b.server.close()
    tasks = [*run.b._tasks, run.watching]
    _, late = await asyncio.wait(tasks, timeout=1.0)
    for task in late:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _look_for_family(run: Any, family: set[psutil.Process]) -> None:
    while True:
        await asyncio.sleep(LOOK_S)
        _add_family(run, family)


def _add_family(run: Any, family: set[psutil.Process]) -> None:
    if run.proc is not None and run.proc.returncode is None:
        with contextlib.suppress(psutil.Error):
            own = psutil.Process(run.proc.pid)
            family.update((own, *own.children(recursive=True)))


def _assert_gone(family: set[psutil.Process], folder: Path) -> None:
    """Nothing of the session is left: nobody seen below `serve`, nobody on the test's folder."""
    deadline = time.monotonic() + GONE_S
    while True:
        left = [p.pid for p in family if _is_alive(p)] + _processes_on(folder)
        if not left:
            return
        assert time.monotonic() < deadline, f"left behind: {left}"
        time.sleep(0.02)


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _processes_on(folder: Path) -> list[int]:
    """Processes whose command line or mounts (a jail's toolkit comes from there) name `folder`."""
    name = "/".join(folder.parts[-3:]).encode() + b"/"
    found = []
    for entry in os.listdir("/proc"):
        for file in ("cmdline", "mountinfo"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and name in Path("/proc", entry, file).read_bytes():
                    found.append(int(entry))
    return found


# -- comparing -------------------------------------------------------------------------------------


def assert_well_formed(ours: Document) -> None:
    """What holds for every scenario."""
    assert "HARNESS ERROR" not in str(ours.content["notes"])
    for frame in ours.frames:
        assert frame["frame"] in ("text", "ping", "pong", "close"), frame
        assert frame["masked"], frame
        assert frame["fin"], frame
        if frame["frame"] == "close":
            continue
        size = frame["payload"]["bytes"]
        assert frame["len_field"] == (size if size < 126 else 126 if size < 65536 else 127), frame
    for request in ours.requests:
        length = dict(request.headers).get("Content-Length", "0")
        assert int(length) == len(request.body.encode()), request
    for body in ours.registrations:
        source = body["metadata"]["source_code"]
        assert body["code_hash"] == hashlib.sha256(source.encode()).hexdigest()
    for line in ours.log:
        assert not line.startswith("Traceback"), ours.log_text
        assert "TESTKEY" not in line, line
        assert "/ey with space" not in line, line


def assert_same_wire(name: str, golden: Document, ours: Document) -> None:
    """Requests, handshakes, answers, pongs and closes as recorded, but for what is listed."""
    assert_same_requests(name, golden, ours)
    if name in REQUESTS_ONLY:
        return
    assert_same_handshakes(golden, ours)
    if name not in ANSWERS_APART:
        assert_same_answers(name, golden, ours)
    assert ours.pongs == golden.pongs
    assert ours.closes == DIFFERENT_CLOSES.get(name, golden.closes)


def assert_same_requests(name: str, golden: Document, ours: Document) -> None:
    """Two clients of one process are independent, so only the order within each counts."""
    wanted, got = _by_target(golden.requests), _by_target(ours.requests)
    if name in RETRIED_REGISTRATIONS:
        got = {target: list(dict.fromkeys(of_one)) for target, of_one in got.items()}
    assert got == wanted


def _by_target(found: list[Request]) -> dict[str, list[Request]]:
    """By target and key; a scenario's clients differ in one of them."""
    groups: dict[str, list[Request]] = {}
    for request in found:
        key = json.loads(request.body)["api_key"] if request.body else ""
        groups.setdefault(f"{request.method} {request.target} {key}", []).append(request)
    return groups


def assert_same_handshakes(golden: Document, ours: Document) -> None:
    assert sorted(ours.handshakes) == sorted(golden.handshakes)


def assert_same_answers(name: str, golden: Document, ours: Document) -> None:
    """Texts byte for byte and in order; of a failure `error`, beside which we say more."""
    different = DIFFERENT_ANSWERS.get(name, {})
    of_sdk = [answer for answer in golden.answers if answer[0] not in different]
    assert [i for i, _ in ours.answers if i not in different] == [i for i, _ in of_sdk]
    same_ids = [answer for answer in ours.answers if answer[0] not in different]
    for (request_id, wanted), (_, got) in zip(of_sdk, same_ids, strict=True):
        assert_same_answer(name, request_id, wanted, got)
    for request_id, expected in different.items():
        found = [json.loads(text)["result"] for i, text in ours.answers if i == request_id]
        if expected.kind is None:
            assert not found, expected.why
        else:
            assert len(found) == 1, expected.why
            assert_failure(found[0], expected.kind, expected.error)


def assert_same_answer(name: str, request_id: str, wanted: str, got: str) -> None:
    recorded = None if "…" in wanted else json.loads(wanted)["result"]
    is_failure = (
        type(recorded) is dict
        and list(recorded) == ["error"]
        and request_id not in APPLICATION_ERRORS.get(name, set())
    )
    if not is_failure:
        assert got == wanted
        return
    assert recorded is not None
    is_free = request_id in FREE_WORDING.get(name, set())
    assert_failure(json.loads(got)["result"], None, None if is_free else recorded["error"])
    # Up to the members that we add, the text is the recorded one.
    assert is_free or got.startswith(wanted.removesuffix("}}") + ", "), got


def assert_failure(result: Any, kind: Kind | None, error: str | None = None) -> None:
    """`result` is a failure of our closed vocabulary."""
    assert type(result) is dict, result
    assert type(result["error"]) is str, result
    assert result["error"], result
    found = Kind(result["error_type"])
    assert result["retryable"] is (found in RETRYABLE)
    assert kind is None or found is kind, result
    assert error is None or result["error"] == error, result


SAME_RESULTS = (
    "client_alive_at_end",
    "client_close_frame",
    "client_spoke_first",
    "close_frames",
    "execute_function_posts",
    "exit",
    "ping_payloads",
    "pongs",
    "re_registered",
    "reconnected_after_stop",
    "register_requests",
    "registered",
    "returncode_if_exited",
    "start_returned",
    "ws_path",
)
"""Measured by the scenarios beside the wire, and not a matter of timing or of log lines."""

DIFFERENT_RESULTS: dict[str, set[str]] = {
    # Without start() the SDK's script ends; `serve` says so and serves it.
    "register_api_key_parameter_name": {"exit", "client_alive_at_end", "returncode_if_exited"},
    **{name: {"register_requests"} for name in RETRIED_REGISTRATIONS},
}


def assert_same_results(name: str, golden: Document, ours: Document) -> None:
    keys = set(SAME_RESULTS) - DIFFERENT_RESULTS.get(name, set())
    assert {k: v for k, v in ours.result.items() if k in keys} == {
        k: v for k, v in golden.result.items() if k in keys
    }


# -- match -----------------------------------------------------------------------------------------

Check = Callable[[Document, Document], None]
"""(the SDK's transcript, ours)"""
BESIDE_THE_WIRE: dict[str, Check] = {}
"""What a `match` case promises that is not to be seen in the bytes."""
IMPROVED: dict[str, Check] = {}
SURVIVED: dict[str, Check] = {}


def checks(table: dict[str, Check], *names: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        for name in names:
            assert name not in table
            table[name] = check
        return check

    return add


CLOSES = [name for name in INDEX if name.startswith("close_by_server_")]


@checks(BESIDE_THE_WIRE, *CLOSES)
def reconnects_after_a_short_back_off(_golden: Document, ours: Document) -> None:
    assert 0.2 <= ours.result["reconnected_after_s"] <= 5.0


@checks(BESIDE_THE_WIRE, "call_normal")
def repeated_request_is_not_run_again(_golden: Document, ours: Document) -> None:
    assert ours.log_text.count("asked again: its answer is sent again") == 1
    assert ours.result["same_request_id_again"] == ours.result["first"]


@checks(BESIDE_THE_WIRE, "call_malformed_frames")
def undecodable_frames_are_ignored_and_logged(golden: Document, ours: Document) -> None:
    silent = {label for label, answer in golden.result["responses"].items() if answer is None}
    # A greeting is understood even without its message; a request without an id is not answered.
    silent = silent - {"connected_without_message", "connected_without_payload"} | {"no_request_id"}
    assert ours.log_text.count("a message was ignored") == len(silent)
    for label in ("invalid_utf8", "reserved_opcode"):
        assert ours.result["responses"][label] == "client reconnected"


@checks(BESIDE_THE_WIRE, "call_huge")
def large_messages_are_one_frame(golden: Document, ours: Document) -> None:
    for document in (golden, ours):
        assert document.result["result_8MB"]["bytes"] == 8388675
        assert document.result["result_8MB"]["frames"] == 1


@checks(BESIDE_THE_WIRE, "ping_client_schedule")
def pings_come_at_the_recorded_times(golden: Document, ours: Document) -> None:
    found, wanted = ours.result["client_pings_at_s"], golden.result["client_pings_at_s"]
    assert found == pytest.approx(wanted, abs=3.0)


@checks(BESIDE_THE_WIRE, "base_url_forms")
def unusable_base_url_is_named(_golden: Document, ours: Document) -> None:
    assert "the base URL needs http:// or https://" in ours.log_text


@checks(BESIDE_THE_WIRE, "register_api_key_parameter_name")
def parameter_names_are_free_and_a_missing_start_is_told(golden: Document, ours: Document) -> None:
    said = "\n".join(ours.log)
    assert all(printed in said for printed in golden.result["printed"])
    assert "never called start()" in ours.log_text


@checks(BESIDE_THE_WIRE, "stop_before_start")
def stop_before_start_returns_quietly(_golden: Document, ours: Document) -> None:
    assert "stop returned" in ours.log_text
    assert " error " not in ours.log_text


@checks(BESIDE_THE_WIRE, "two_clients_one_process")
def each_client_has_its_own_connection(golden: Document, ours: Document) -> None:
    assert ours.result["paths"] == golden.result["paths"]
    # The oracle asks the first connection for tool `one` and the second for `two`, whosever it is.
    served = {"a": ("/ws/v1/atp/TESTKEY/", 1), "b": ("/ws/v1/atp/KEY2/", 2)}
    for place, (owner, result) in served.items():
        path, answer = ours.result[place]
        assert answer["request_id"] == "q"
        if path == owner:
            assert answer["result"] == result
        else:
            assert_failure(answer["result"], Kind.UNKNOWN_TOOL)


@checks(BESIDE_THE_WIRE, *(n for n in INDEX if n.startswith("register_http_") and n[14:].isdigit()))
def failed_registration_is_told(_golden: Document, ours: Document) -> None:
    assert "the backend was not told of the tool; it is served all the same" in ours.log_text


# -- improve ---------------------------------------------------------------------------------------


def assert_registered_as_recorded(golden: Document, ours: Document) -> None:
    assert ours.requests == golden.requests


BAD_TOOLS: dict[str, Answered | str] = {
    "sysexit": Answered("exit status", Kind.CRASHED),
    "sysexit0": Answered("exit status", Kind.CRASHED),
    "osexit": Answered("exit status", Kind.CRASHED),
    "abort": Answered("SIGABRT", Kind.CRASHED),
    "killself": Answered("SIGTERM", Kind.CRASHED),
    "kbd": Answered("SIGINT", Kind.CRASHED),
    "sigint_main": Answered("SIGINT", Kind.CRASHED),
    "segv": Answered("SIGSEGV", Kind.CRASHED),
    "stop": Answered("", Kind.TOOL_ERROR, "stop() cannot be called from inside a tool"),
    "close_fds": "closed fds",
    "print": "printed",
    "delmod": "cleared",
}
"""A failure (and what its sentence names), or the result of a tool that harmed only itself."""
EXIT_STATUSES = {"sysexit": 3, "sysexit0": 0, "osexit": 7}


@checks(IMPROVED, *(f"bad_tool_{name}" for name in BAD_TOOLS))
def tool_harms_only_its_own_call(golden: Document, ours: Document) -> None:
    name = ours.content["scenario"].removeprefix("bad_tool_")
    results = ours.results()
    expected = BAD_TOOLS[name]
    if isinstance(expected, Answered):
        assert_failure(results["bad"], expected.kind, expected.error)
        assert expected.why in results["bad"]["error"]
        assert results["bad"].get("exit_status") == EXIT_STATUSES.get(name)
    else:
        assert results["bad"] == expected
    assert results["next"] == {"echo": "x"}
    assert ours.result["process_alive"]
    assert not ours.result["new_connection"]
    assert ours.handshakes == golden.handshakes[:1]
    assert not ours.closes
    assert_registered_as_recorded(golden, ours)
    assert ("tool printed this" in ours.log_text) is (name == "print")


@checks(IMPROVED, "call_auth_token")
def token_reaches_every_signature_that_takes_it(golden: Document, ours: Document) -> None:
    recorded, results = dict(golden.answers), ours.results()
    for tool in ("kw_auth", "sig_auth", "sig_auth_req"):
        for label in ("absent", "null", "empty"):
            failure = results[f"{tool}:{label}"]
            assert_failure(failure, Kind.AUTH_REQUIRED)
            assert tool in failure["error"]
    given = {"present": "TOK", "object": {"a": 1}, "inparams": "OUTER"}
    for label, token in given.items():
        assert results[f"kw_auth:{label}"] == {"kwargs": {"auth_token": token, "q": 1}}
    ours_by_id = dict(ours.answers)
    for tool in ("sig_auth", "sig_auth_req"):
        for label in given:
            request_id = f'"{tool}:{label}"'
            assert ours_by_id[request_id] == recorded[request_id]
    for label in ("present", "absent", "null", "empty", "object"):
        assert ours_by_id[f'"strict:{label}"'] == recorded[f'"strict:{label}"']
    assert_failure(results["strict:inparams"], Kind.TOOL_ERROR)
    assert "auth_token" in results["strict:inparams"]["error"]
    assert_registered_as_recorded(golden, ours)


@checks(IMPROVED, "call_missing_required_param")
def missing_parameters_are_named_before_the_call(golden: Document, ours: Document) -> None:
    results = ours.results()
    for tool in ("kwtool", "sigtool", "subscr"):
        failure = results[f"{tool}:missing"]
        assert_failure(failure, Kind.INVALID_PARAMS)
        assert tool in failure["error"]
        assert failure["missing"] == ["name"]
    for (request_id, wanted), (_, got) in zip(golden.answers, ours.answers, strict=True):
        if "unknown_extra" in request_id and "sigtool" in request_id:
            assert_failure(json.loads(got)["result"], Kind.TOOL_ERROR)
            assert "zzz" in got
        elif "missing" not in request_id:
            assert got == wanted


@checks(IMPROVED, "call_unknown_tool")
def unknown_tool_is_an_error_answer(_golden: Document, ours: Document) -> None:
    results = ours.results()
    assert list(results) == ["a", "b", "c", "d", "e", "alive"]
    for request_id in "abcde":
        assert_failure(results[request_id], Kind.UNKNOWN_TOOL)
    assert "nope" in results["a"]["error"]
    assert "echo" in results["e"]["error"]
    assert results["alive"] == {"echo": "still there"}


@checks(IMPROVED, "call_parallel_slow")
def slow_calls_run_at_once(golden: Document, ours: Document) -> None:
    assert sorted(ours.answers) == sorted(golden.answers)
    (first, _), (_, begun), _, (_, ended) = ours.result["arrivals"]
    assert first == "fast"
    # One after the other, the first and the last of the slow ones are 2 s apart.
    assert ended - begun < 1.9


@checks(IMPROVED, "close_mid_call")
def result_of_a_lost_connection_goes_out_on_the_next(golden: Document, ours: Document) -> None:
    assert ours.results() == {"lost": {"tag": "lost"}, "again": {"echo": 1}}
    assert 0.2 <= ours.result["reconnected_after_s"] <= 5.0
    assert ours.handshakes == golden.handshakes
    assert_registered_as_recorded(golden, ours)


@checks(IMPROVED, "ping_during_slow_tool")
def ping_is_answered_while_a_tool_runs(golden: Document, ours: Document) -> None:
    assert ours.pongs == golden.pongs == ["are-you-there"]
    assert ours.result["pong_after_s"] < 3.0 < golden.result["pong_after_s"]
    assert [frame["frame"] for frame in ours.frames if frame["frame"] != "ping"] == ["pong", "text"]
    assert ours.answers == golden.answers


@checks(IMPROVED, "ping_not_answered")
def connection_without_pongs_is_dropped_and_made_again(golden: Document, ours: Document) -> None:
    assert ours.result["reconnected"]
    assert ours.handshakes == golden.handshakes * 2
    connected, again = (e["t_ms"] for e in ours.events if e.get("frame") == "handshake_accepted")
    ping = ours.pings[0]["t_ms"]
    assert 58_000 <= ping - connected <= 65_000
    # 20 s without a pong, then the first back-off of at most 0.5 s.
    assert 20_000 <= again - ping <= 25_000
    assert "no pong within 20 s" in ours.log_text


@checks(IMPROVED, "register_http_200_json_list", "register_http_200_not_json")
def senseless_answer_is_a_failed_registration(golden: Document, ours: Document) -> None:
    assert_registered_as_recorded(golden, ours)
    assert "the answer is not a JSON object" in ours.log_text
    assert ours.results() == {"q1": {"echo": "hi"}}
    assert ours.result["client_alive_at_end"]


@checks(IMPROVED, "register_no_source_exec")
def tool_without_source_is_named(_golden: Document, ours: Document) -> None:
    assert ours.result["exit"] == 1
    assert "tool 'f': its source cannot be read" in ours.log_text
    assert not ours.requests
    assert not ours.handshakes


@checks(IMPROVED, "register_sample_async_def")
def coroutine_is_awaited(_golden: Document, ours: Document) -> None:
    assert ours.samples == {"a": 1}
    assert ours.results() == {"q1": 1}


@checks(
    IMPROVED,
    "register_sample_keyboardinterrupt",
    "register_sample_returns_unserializable",
    "register_sample_sys_exit",
)
def sample_that_fails_is_registered_as_unavailable(_golden: Document, ours: Document) -> None:
    assert [*ours.samples.values()] == [SAMPLE_UNAVAILABLE]
    assert len(ours.handshakes) == 1
    assert ours.result["exit"] is None
    assert ours.result["client_alive_at_end"]


@checks(IMPROVED, "register_sample_slow")
def slow_sample_is_waited_for_within_its_limit(golden: Document, ours: Document) -> None:
    assert_registered_as_recorded(golden, ours)
    assert ours.samples == {"slow": "done"}


@checks(IMPROVED, "register_seed_toolkit_with_fake_hubspot")
def seed_toolkit_gets_its_token_or_an_error(golden: Document, ours: Document) -> None:
    # There is no network in a jail yet, so what the tools make of the token is not to be seen here:
    # `call_auth_token` shows that it arrives.
    recorded, found = dict(golden.answers), dict(ours.answers)
    results = ours.results()
    assert found['"q1"'] == recorded['"q1"']
    assert found['"q2"'] == recorded['"q2"']
    for request_id in ("q3", "q4", "q6"):
        assert_failure(results[request_id], Kind.TOOL_ERROR)
    assert_failure(results["q5"], Kind.AUTH_REQUIRED)
    assert "get_contacts" in results["q5"]["error"]
    assert [_without_sample(b) for b in ours.registrations] == [
        _without_sample(b) for b in golden.registrations
    ]
    assert ours.samples["create_company"] == ours.samples["get_contacts"] == SAMPLE_UNAVAILABLE
    assert ours.samples["echo"] == golden.samples["echo"]
    assert not any("/crm/" in request.target for request in ours.requests)


def _without_sample(body: dict[str, Any]) -> str:
    metadata = {k: v for k, v in body["metadata"].items() if k != "sample_response"}
    return json.dumps({**body, "metadata": metadata})


@checks(IMPROVED, "register_server_down")
def backend_that_is_down_is_tried_again(_golden: Document, ours: Document) -> None:
    assert ours.result["exit"] is None
    assert "Connection refused" in ours.log_text
    attempts = ours.log_text.count("connecting to the backend")
    assert 2 <= attempts <= 8


@checks(IMPROVED, "register_server_drops_connection")
def dropped_registration_is_sent_again(golden: Document, ours: Document) -> None:
    assert ours.result["exit"] is None
    assert re.search(r"retry_in_s=[2-5]\.", ours.log_text)
    watched_ms = ours.events[-1]["t_ms"] - ours.first_request_ms
    # After a back-off of 2.5 to 5 s, where the scenario's 8 s left so much.
    assert len(ours.requests) >= (2 if watched_ms > 6_000 else 1)
    assert len(ours.requests) <= 3
    assert set(ours.requests) == set(golden.requests)
    assert len(ours.handshakes) == 1


@checks(IMPROVED, "register_server_hangs")
def silent_backend_is_given_up_in_time(golden: Document, ours: Document) -> None:
    assert ours.result == {
        "exit_within_20s": None,
        "ws_opened": True,
        "client_alive_at_end": True,
        "returncode_if_exited": None,
    }
    assert "no answer in time" in ours.log_text
    assert set(ours.requests) == set(golden.requests)


@checks(IMPROVED, "seed_import_path")
def import_path_of_the_documentation_exists(_golden: Document, ours: Document) -> None:
    # The script imports and does no more, and that is what it is told.
    assert "ModuleNotFoundError" not in ours.log_text
    assert "registers no tools" in ours.log_text
    assert ours.result["exit"] == 1


@checks(IMPROVED, "stop_from_other_thread")
def stop_returns_and_start_returns_and_nothing_reconnects(
    _golden: Document, ours: Document
) -> None:
    assert ours.result["exit_within_16s"] == 0
    assert ours.result["stop_returned"]
    assert ours.result["start_returned"]
    # With its thread the toolkit takes a jail a call, so a stop after 1 s may come before the link.
    assert ours.result["connections"] <= 1
    assert ours.closes == [(1000, "")] * ours.result["connections"]


@checks(IMPROVED, "stop_sigterm")
def sigterm_says_good_bye(golden: Document, ours: Document) -> None:
    assert ours.result["exit"] == 0
    assert ours.closes == [(1000, "")]
    assert_registered_as_recorded(golden, ours)


@checks(IMPROVED, "ws_handshake_401", "ws_handshake_403")
def denied_key_ends_with_the_reason(golden: Document, ours: Document) -> None:
    status = ours.content["scenario"].removeprefix("ws_handshake_")
    assert ours.result["returncode_if_exited"] == 1
    assert ours.result["handshake_attempts_in_about_4s"] == 1
    assert not ours.result["recovers"]
    assert "error: The backend refused the connection: ws://" in ours.log_text
    assert f"cause: HTTP {status}" in ours.log_text
    assert ours.handshakes == golden.handshakes[:1]


@checks(IMPROVED, "ws_handshake_404", "ws_handshake_500")
def refused_handshake_backs_off_and_recovers(_golden: Document, ours: Document) -> None:
    assert 2 <= ours.result["handshake_attempts_in_about_4s"] <= 6
    assert ours.result["recovers"]
    assert ours.result["client_alive_at_end"]
    status = ours.content["scenario"].removeprefix("ws_handshake_")
    assert f"status={status}" in ours.log_text


@checks(IMPROVED, "ws_handshake_429", "ws_handshake_503")
def retry_after_is_honoured(golden: Document, ours: Document) -> None:
    # 30 s, and the scenario watches for 12.
    assert ours.result["handshake_attempts_in_about_4s"] == 1
    assert not ours.result["recovers"]
    assert ours.result["client_alive_at_end"]
    assert "retry_in_s=30" in ours.log_text
    assert ours.handshakes == golden.handshakes[:1]


@checks(IMPROVED, "ws_server_down_after_registration")
def connection_outlives_the_listening_socket(golden: Document, ours: Document) -> None:
    # `serve` registers after the import and then connects at once, so here it is connected before
    # the backend stops listening; `test_backend_that_goes_down…` is about the attempts.
    assert ours.result["recovers"]
    assert ours.results() == {"q": {"echo": "x"}}
    assert_registered_as_recorded(golden, ours)


# -- free ------------------------------------------------------------------------------------------


@checks(SURVIVED, "register_class_instance_and_partial")
def callables_without_source_are_refused_by_name(_golden: Document, ours: Document) -> None:
    for tool in ("inst", "part", "builtin"):
        assert f"RAISED {tool} TypeError register_tool: tool '{tool}'" in ours.log_text
    assert "DONE" in ours.log_text


@checks(SURVIVED, "ws_handshake_302")
def redirected_handshake_is_not_followed(_golden: Document, ours: Document) -> None:
    assert set(ours.result["targets"]) == {"/ws/v1/atp/TESTKEY/"}
    assert 1 <= ours.result["attempts"] <= 5
    assert ours.result["client_alive_at_end"]


# -- the tests -------------------------------------------------------------------------------------

LONG = {"ping_client_schedule", "ping_not_answered"}
"""130 s each."""
SLOW = {
    "register_api_key_parameter_name",
    "register_sample_returns_unserializable",
    "register_server_down",
    "register_server_hangs",
    "ws_handshake_429",
    "ws_handshake_503",
    "ws_server_down_after_registration",
}


def cases(kind: str) -> list[Any]:
    """The cases of one class, the shortest behind the longest: xdist gives one worker both."""
    names = [name for name, case in INDEX.items() if case["class"] == kind]
    names.sort(key=lambda name: (name not in LONG, transcript(name).events[-1]["t_ms"]))
    return [pytest.param(name, id=name, marks=_marks(name)) for name in names]


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name in LONG:
        return [pytest.mark.slow, pytest.mark.timeout(200)]
    return [pytest.mark.slow] if name in SLOW else []


@pytest.mark.parametrize("name", cases("match"))
def test_wire_is_as_recorded(name: str, tmp_path: Path) -> None:
    golden, ours = transcript(name), play(name, tmp_path)
    assert_well_formed(ours)
    assert ours.content["toolkit_source"] == golden.content["toolkit_source"]
    assert_same_wire(name, golden, ours)
    assert_same_results(name, golden, ours)
    if name in BESIDE_THE_WIRE:
        BESIDE_THE_WIRE[name](golden, ours)


@pytest.mark.parametrize("name", cases("improve"))
def test_fault_of_the_sdk_is_improved_on(name: str, tmp_path: Path) -> None:
    ours = play(name, tmp_path)
    assert_well_formed(ours)
    IMPROVED[name](transcript(name), ours)


@pytest.mark.parametrize("name", cases("free"))
def test_accident_of_the_sdk_is_survived(name: str, tmp_path: Path) -> None:
    ours = play(name, tmp_path)
    assert_well_formed(ours)
    SURVIVED[name](transcript(name), ours)


def test_every_case_of_the_index_is_checked() -> None:
    of_class = {
        kind: {name for name, case in INDEX.items() if case["class"] == kind}
        for kind in ("match", "improve", "free")
    }
    assert set().union(*of_class.values()) == set(INDEX) == set(oracle("scenarios").S)
    assert set(IMPROVED) == of_class["improve"]
    assert set(SURVIVED) == of_class["free"]
    listed = {*BESIDE_THE_WIRE, *DIFFERENT_ANSWERS, *DIFFERENT_CLOSES, *FREE_WORDING}
    assert listed | set(DIFFERENT_RESULTS) | set(APPLICATION_ERRORS) <= of_class["match"]


def test_backend_that_goes_down_after_registration_is_tried_with_growing_delays(
    tmp_path: Path,
) -> None:
    async def down_between_registration_and_link(run: Any) -> None:
        answer = run.b.default_http
        down = asyncio.Event()

        async def stop_listening_first(*request: Any) -> Any:
            await run.b.stop_listening()
            down.set()
            return await answer(*request)

        run.b.http_handler = stop_listening_first
        await run.client(oracle("scenarios").ECHO)
        await asyncio.wait_for(down.wait(), 30)
        await asyncio.sleep(5)
        run.result["attempts"] = run.log().count("connecting to the backend")
        await run.b.start(run.b.port)
        ws = await run.b.next_ws(15)
        await ws.request("q", "echo", {"text": "x"})
        await ws.recv(10)

    ours = play("ws_server_down", tmp_path, function=down_between_registration_and_link)
    assert_well_formed(ours)
    # At 0, then after at most 0.5, 1, 2 and 4 s, and at least half of each.
    assert 2 <= ours.result["attempts"] <= 6
    assert ours.results() == {"q": {"echo": "x"}}
    assert len(ours.registrations) == 1


def test_stop_from_another_thread_closes_the_connection(tmp_path: Path) -> None:
    async def stop_when_told(run: Any) -> None:
        body = """
import threading, time
def later():
    time.sleep(8)
    client.stop()
threading.Thread(target=later, daemon=True).start()
"""
        start = 'client.start()\nprint("start returned", flush=True)\n'
        await run.client(oracle("scenarios").ECHO + body, start=start)
        assert await run.b.next_ws(30)
        run.result["exit"] = await run.wait_exit(30)

    ours = play("stop_after_connecting", tmp_path, function=stop_when_told)
    assert_well_formed(ours)
    assert ours.result["exit"] == 0
    assert ours.closes == [(1000, "")]
    assert len(ours.handshakes) == 1
    assert "start returned" in ours.log_text


def test_sample_call_has_the_time_limit_of_a_call(tmp_path: Path) -> None:
    ours = play("register_sample_slow", tmp_path, "--time", "1s")
    assert_well_formed(ours)
    assert ours.samples == {"slow": SAMPLE_UNAVAILABLE}


def test_quick_start_of_the_documentation_is_served(tmp_path: Path) -> None:
    async def quick_start(run: Any) -> None:
        harness, scenarios = oracle("harness"), oracle("scenarios")
        head = harness.HEADER.format(extra_imports="import requests", ctor="")
        head = head.replace("from atp_sdk.clients", "from atp_sdk.atp_sdk.clients")
        tools = scenarios.SEED.replace("@@HUB@@", "https://api.hubapi.com")
        await run.client(head + tools + "\nclient.start()\n", raw=True)
        ws = await run.b.next_ws(30)
        await ws.request("q", "hello_world", {"name": "Ada"})
        await ws.recv(10)

    ours = play("quick_start", tmp_path, function=quick_start)
    assert_well_formed(ours)
    assert ours.results() == {"q": {"message": "Hello, Ada!"}}
    assert [body["function_id"] for body in ours.registrations] == [
        "hello_world",
        "create_company",
        "echo",
        "get_contacts",
    ]


def test_stopping_one_of_two_clients_leaves_the_other_served(tmp_path: Path) -> None:
    async def stop_the_second(run: Any) -> None:
        body = """
import threading, time
second = ToolKitClient(api_key="KEY2", app_name="app2", base_url=os.environ["ATP_BASE_URL"])
@second.register_tool("two", [], [], "d", None, None, None)
def two(**kw): return 2
def later():
    time.sleep(8)
    second.stop()
threading.Thread(target=client.start, daemon=True).start()
threading.Thread(target=later, daemon=True).start()
"""
        start = 'second.start()\nprint("start returned", flush=True)\n'
        await run.client(oracle("scenarios").ECHO + body, start=start)
        links = [await run.b.next_ws(30), await run.b.next_ws(30)]
        of_path = {ws.path: ws for ws in links}
        await asyncio.wait_for(of_path["/ws/v1/atp/KEY2/"].closed.wait(), 30)
        await of_path["/ws/v1/atp/TESTKEY/"].request("q", "echo", {"text": "x"})
        await of_path["/ws/v1/atp/TESTKEY/"].recv(10)
        # What a toolkit prints outside of calls is logged once a second.
        for _ in range(100):
            if "start returned" in run.log():
                break
            await asyncio.sleep(0.1)

    ours = play("stop_one_of_two", tmp_path, function=stop_the_second)
    assert_well_formed(ours)
    assert ours.closes == [(1000, "")]
    assert ours.results() == {"q": {"echo": "x"}}
    assert ours.result["client_alive_at_end"]
    assert "start returned" in ours.log_text
