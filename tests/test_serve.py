"""`serve` from end to end, as a process: what the backend, the operator and the machine see."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from backends import FakeBackend, Serving, is_janitor, wait_until_gone
from conftest import PATIENCE_S, processes_named, toolkit_text, wait_until, write_tree
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection

KEY = "S3CRET-key-of-the-operator"
TOKEN = "T0KEN-of-a-user"

KIT = """
    import ctypes, os, random, time

    @tool
    def echo(**kw):
        return kw

    @tool
    def slow(value, comm="", **_):
        if comm:  # to be seen from outside, as of prctl(PR_SET_NAME)
            ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
        time.sleep(value)
        return ["slept", random.random(), os.getpid()]

    @tool
    def crash(**_):
        os._exit(9)

    @tool
    def hang(**_):
        while True:
            time.sleep(1)

    @client.register_tool(
        function_name="private", params=[], required_params=[], description="d",
        auth_provider="hubspot", auth_type="OAuth2", auth_with="access_token",
    )
    def private(**kw):
        raise ValueError("denied by the service")
"""


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (tmp_path / "kit").mkdir()
    path = tmp_path / "kit" / "kit.py"
    path.write_text(toolkit_text(KIT))
    return path


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def serving(*arguments: object, backend: FakeBackend, tmp_path: Path, **more: str) -> Serving:
    return Serving(
        *arguments,
        "--base-url",
        backend.url,
        state_dir=tmp_path / "state",
        **{"ATP_API_KEY": KEY, **more},
    )


# -- with the embedded backend ---------------------------------------------------------------------


def test_embedded_backend_serves_tools_over_http_until_interrupted(
    kit: Path, tmp_path: Path
) -> None:
    with Serving(kit, "--embedded", state_dir=tmp_path / "state") as serve:
        url = serve.wait_for(r"curl (http://127\.0\.0\.1:\d+)/tools\n")[1]
        serve.wait_for(r"Stop:   Ctrl-C")
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            names = {tool["name"] for tool in client.get("/tools").json()}
            assert names == {"probe", "echo", "slow", "crash", "hang", "private"}

            def call(tool: str, **body: Any) -> Any:
                return client.post(f"/tools/{tool}", json=body).json()["result"]

            assert call("echo", params={"value": [1, None]}) == {"value": [1, None]}
            assert call("crash")["error_type"] == "crashed"
            assert call("private")["error_type"] == "auth_required"
            assert call("private", auth_token=TOKEN) == {
                "error": "denied by the service",
                "error_type": "tool_error",
                "retryable": False,
            }
            assert call("echo", params={"value": 2}) == {"value": 2}
        family = serve.family()
        assert serve.stop(signal.SIGINT) == 0
        wait_until_gone(family, timeout_s=1.0)
    assert TOKEN not in serve.log


# -- registration and where the key comes from -----------------------------------------------------


@pytest.mark.parametrize("source", ["environment", "file", "standard input", "configuration"])
def test_key_and_address_reach_the_backend_from_each_place(
    kit: Path, tmp_path: Path, backend: FakeBackend, source: str
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    key_file.chmod(0o600)
    state = tmp_path / "state"
    config = f'[backend]\nurl = "{backend.url}"\napi-key-file = "key"\n'
    config += f'[toolkit.mine]\npath = "{kit}"\n'
    write_tree(tmp_path, {"atp-sandbox.toml": config})
    where = ("--base-url", backend.url)
    match source:
        case "environment":
            serve = Serving(kit, *where, state_dir=state, ATP_API_KEY=KEY)
        case "file":
            serve = Serving(kit, *where, "--api-key-file", key_file, state_dir=state)
        case "standard input":
            serve = Serving(kit, *where, "--api-key-file", "-", state_dir=state, stdin=KEY + "\n")
        case _:
            serve = Serving(state_dir=state, cwd=tmp_path)
    with serve:
        link = backend.accept()
        assert link.call("1", "echo", value=1) == {"value": 1}
        assert KEY not in " ".join(psutil.Process(serve.process.pid).cmdline())
        assert serve.stop() == 0
    assert backend.paths == [f"/ws/v1/atp/toolkit-client/{KEY}/"]
    assert [body["function_id"] for body in backend.registered] == [
        *("probe", "echo", "slow", "crash", "hang", "private")
    ]
    private = backend.registered[-1]
    assert (private["api_key"], private["app_name"]) == (KEY, "tests")
    assert private["metadata"]["auth_with"] == "access_token"
    assert private["metadata"]["sample_response"] == ""
    assert "def private(**kw):" in private["metadata"]["source_code"]
    assert KEY not in serve.log


# -- requests --------------------------------------------------------------------------------------


def test_every_request_is_answered_whatever_its_neighbours_do(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, "--time", "6s", backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        tools = ["echo", "crash", "nosuch", "private", "hang"]
        for number in range(40):
            link.request(number, tools[number % 4 if number % 20 else 4], value=number)
        wait_until(lambda: len(link.answers) >= 40, "40 answers")
        by_id = {answer["request_id"]: answer["result"] for answer in link.answers}
        assert len(link.answers) == len(by_id) == 40
        kinds = {number: by_id[number].get("error_type") for number in by_id}
        expected = [None, "crashed", "unknown_tool", "auth_required"]
        for number, kind in kinds.items():
            assert kind == (expected[number % 4] if number % 20 else "timeout")
        assert serve.stop() == 0


def test_repeated_request_id_runs_once_and_has_the_same_answer(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        for _ in range(3):
            link.request("same", "slow", value=1.5)
        first = link.result("same")
        link.request("same", "slow", value=1.5)  # asked again after its answer: sent again
        wait_until(lambda: len(link.texts) == 2, "the answer again")
        assert link.texts[0] == link.texts[1]
        link.request("same", "slow", value=0.2)  # the same id with other content is a new call
        wait_until(lambda: len(link.texts) == 3, "the other answer")
        assert link.answers[2]["result"] != first
        assert link.call("last", "echo") == {}
        assert len(link.texts) == 4
        assert serve.stop() == 0


def test_answer_of_a_call_that_outlives_its_connection_goes_over_the_next(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend=backend, tmp_path=tmp_path) as serve:
        first = backend.accept()
        first.request("long", "slow", value=3.0)
        assert first.call("short", "echo") == {}
        first.settle()
        first.cut()
        second = backend.accept()
        assert second.result("long")[0] == "slept"
        second.request("long", "slow", value=3.0)
        wait_until(lambda: len(second.texts) == 2, "the same answer, without a second run")
        assert second.texts[0] == second.texts[1]
        assert len(first.texts) == 1
        assert serve.stop() == 0


# -- several toolkits ------------------------------------------------------------------------------


def test_first_toolkit_keeps_a_name_and_a_broken_one_is_named_while_others_serve(
    tmp_path: Path, backend: FakeBackend
) -> None:
    one = "@tool\ndef which(**_):\n    return {!r}\n@tool\ndef only_{}(**_):\n    return 1\n"
    write_tree(
        tmp_path,
        {
            "a.py": toolkit_text(one.format("a", "a")),
            "b.py": toolkit_text(one.format("b", "b")),
            "broken.py": "raise RuntimeError('no licence')\n",
        },
    )
    paths = [tmp_path / name for name in ("a.py", "b.py", "broken.py", "missing.py")]
    with serving(*paths, "--log-format", "json", backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        assert link.call(1, "which") == "a"
        assert [link.call(2, "only_a"), link.call(3, "only_b")] == [1, 1]
        assert serve.stop() == 0
    names = [body["function_id"] for body in backend.registered]
    assert names == ["probe", "which", "only_a", "only_b"]
    events = serve.events()
    assert {event["toolkit"] for event in events if event["event"] == "toolkit_failed"} == {
        *("broken", "missing")
    }
    assert any("RuntimeError: no licence" in event["message"] for event in events)
    refused = [event for event in events if event["event"] == "tool_refused"]
    assert {(event["toolkit"], event["tool"]) for event in refused} == {
        *(("b", "probe"), ("b", "which"))
    }
    (ready,) = (event for event in events if event["event"] == "ready")
    assert (ready["tools"], ready["toolkits"], ready["links"]) == (4, 2, 1)
    for event in events:
        assert {"time", "level", "event", "message"} <= event.keys()


class LateRefusal(FakeBackend):
    """Refuses its link, but not before `may_refuse`."""

    def __init__(self) -> None:
        super().__init__()
        self.refuse_with = 403
        self.may_refuse = threading.Event()

    def _on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.may_refuse.wait(PATIENCE_S)
        return super()._on_request(connection, request)


def test_link_that_is_refused_keeps_the_others_neither_from_being_ready_nor_from_reloads(
    tmp_path: Path, backend: FakeBackend
) -> None:
    with LateRefusal() as other:
        for name, url in (("mine", backend.url), ("theirs", other.url)):
            where = f'app_name="{name}", base_url="{url}"'
            text = toolkit_text().replace('app_name="tests"', where)
            (tmp_path / f"{name}.py").write_text(text)
        kits = (tmp_path / "mine.py", tmp_path / "theirs.py")
        options = ("--as-written", "--log-format", "json")
        with Serving(*kits, *options, state_dir=tmp_path / "state") as serve:
            backend.accept()
            wait_until(lambda: '"event": "link_connected"' in serve.log, "the link that is taken")
            assert '"event": "ready"' not in serve.log
            other.may_refuse.set()
            wait_until(lambda: '"event": "ready"' in serve.log, "the other one given up")
            (ready,) = (event for event in serve.events() if event["event"] == "ready")
            assert ready["links"] == 1
            serve.process.send_signal(signal.SIGHUP)
            wait_until(lambda: '"event": "reload_unchanged"' in serve.log, "a reload")
            assert serve.stop() == 0


# -- starts that fail ------------------------------------------------------------------------------


def test_serve_ends_with_1_if_no_toolkit_can_be_used(tmp_path: Path, backend: FakeBackend) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_package\n")
    with serving(broken, backend=backend, tmp_path=tmp_path) as serve:
        assert serve.wait() == 1
    assert "No module named 'no_such_package'" in serve.log
    assert "error: No toolkit can be served." in serve.log
    assert backend.paths == []


@pytest.mark.parametrize("status", [401, 403])
def test_key_that_is_refused_at_first_ends_with_1(
    kit: Path, tmp_path: Path, backend: FakeBackend, status: int
) -> None:
    backend.refuse_with = status
    with serving(kit, backend=backend, tmp_path=tmp_path) as serve:
        assert serve.wait() == 1
    assert "error: The backend refused the connection: ws://127.0.0.1" in serve.log
    assert f"cause: HTTP {status}" in serve.log
    assert "tip: Check the API key" in serve.log
    assert KEY not in serve.log
    assert len(backend.paths) == 1


def test_second_supervisor_for_the_same_key_and_backend_is_refused(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend=backend, tmp_path=tmp_path) as first:
        link = backend.accept()
        with serving(kit, backend=backend, tmp_path=tmp_path) as second:
            assert second.wait() in (1, 2)
        assert "error: " in second.log
        assert str(first.process.pid) in second.log
        assert link.call(1, "echo") == {}
        assert first.stop() == 0


# -- ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_drains_running_calls_finish_and_new_ones_are_unavailable(
    kit: Path, tmp_path: Path, backend: FakeBackend, number: int
) -> None:
    with serving(kit, "--concurrency", "1", backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        comm = f"slow-{os.getpid()}"
        link.request("running", "slow", value=3.0, comm=comm)
        wait_until(lambda: processes_named(comm), "the tool to run")
        link.request("waiting", "slow", value=3.0)
        link.request("refused", "nosuch")
        link.result("refused")  # so the call before it has arrived
        serve.process.send_signal(number)
        serve.wait_for("draining|no new calls")
        link.request("late", "echo")
        assert link.result("late")["error_type"] == "unavailable"
        assert link.result("late")["retryable"] is True
        assert link.result("waiting")["error_type"] == "unavailable"
        assert link.result("running")[0] == "slept"
        assert serve.wait() == 0
        wait_until(lambda: link.is_closed, "the end of the link")
        assert link.close_code == 1000
        assert len(link.texts) == 4


def test_second_signal_ends_at_once_and_leaves_nothing(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        link.request("hangs", "hang")
        assert link.call("other", "echo") == {}
        serve.process.send_signal(signal.SIGINT)
        serve.wait_for("draining|no new calls")
        family = serve.family()
        serve.stop(signal.SIGINT, timeout_s=3.0)
        wait_until_gone(family, timeout_s=1.0)


def test_killed_supervisor_leaves_no_process_of_ours(kit: Path, tmp_path: Path) -> None:
    with Serving(kit, "--embedded", "--lifetime", "jail", state_dir=tmp_path / "state") as serve:
        serve.wait_for("Stop:   Ctrl-C")

        def is_complete() -> bool:
            """The jail's builder is gone, which would notice only at its next word."""
            supervisor, *others = serve.family()
            mine = [p for p in others if not is_janitor(p)]
            below = [p for p in supervisor.children() if p in mine]
            return len(mine) == 4 and len(below) == 3

        wait_until(is_complete, "backend, egress process, warden and zygote, and nobody else")
        family = serve.family()
        os.kill(serve.process.pid, signal.SIGKILL)
        wait_until_gone(family, timeout_s=1.0)


def test_killed_supervisor_takes_running_tools_and_their_daemons_along(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        for number in range(3):
            link.request(number, "hang")
        assert link.call("other", "echo") == {}
        family = serve.family()
        assert len(family) >= 5  # supervisor, warden, zygote and workers
        os.kill(serve.process.pid, signal.SIGKILL)
        wait_until_gone(family, timeout_s=1.0)


# -- the log ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_no_key_token_parameter_or_result_is_ever_logged(
    kit: Path, tmp_path: Path, backend: FakeBackend, log_format: str
) -> None:
    with serving(kit, "--log-format", log_format, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        secret = "P4RAMETER"
        assert link.call("a", "echo", value=secret, auth_token=TOKEN)["auth_token"] == TOKEN
        link.call("b", "private", value=secret, auth_token=TOKEN)
        link.call("c", "crash", value=secret, auth_token=TOKEN)
        link.call("d", "nosuch", value=secret, auth_token=TOKEN)
        link.request("a", "echo", value=secret, auth_token=TOKEN)
        link._connection.send("not JSON " + secret)
        link._connection.send(json.dumps({"message_type": "atp_tool_request", "payload": [secret]}))
        link.cut()
        backend.accept().call("e", "echo")
        assert serve.stop() == 0
    for text in (KEY, TOKEN, secret, "key-in-the-toolkit"):
        assert text not in serve.log
    if log_format == "json":
        assert {"ready", "call_failed", "request_rejected", "draining"} <= {
            event["event"] for event in serve.events()
        }
