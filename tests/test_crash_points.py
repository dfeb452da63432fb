"""The supervisor kills itself at each point of a call's way; its successor owes the one answer.

Each case is served over the same state directory before and after. What has no answer is asked for
again, as a backend would; what ran is counted outside the jail, by the network.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from backends import FakeBackend, FakeLink, Serving
from conftest import PATIENCE_S, wait_until

from atp_sandbox.crash_points import POINTS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.history import INTERRUPTED, NOT_STARTED, OK, History
from benchmarks.load import kind_of, write_toolkit
from benchmarks.system import configuration

COUNTER_HOST = "counter.test"
LIFETIMES = {"call_": "call", "calls_": "calls:8"}
UNKNOWN = "unknown_tool"

KINDS = {
    "after-accept": {OK},  # nothing was written down, so it is a new request
    "after-journal": {INTERRUPTED, NOT_STARTED},
    "after-start": {INTERRUPTED},
    "after-result": {INTERRUPTED},
    "before-send": {OK},
    "after-send": {OK},
}
"""Of a tool's call that meets the point, in the end."""
CASES = ["quick", "slow", "nosuch", "duplicate"]
PASSED_BY = {("after-start", "nosuch")}
"""A tool that is not there is not started."""


class Counter:
    """Counts executions: a connection, a key, a line's end; answers `ok`."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client, contextlib.suppress(OSError):
                    key = client.makefile("rb").readline()
                    if key.endswith(b"\n"):  # else it died before it could report
                        self._history.executed(time.monotonic(), key.decode().rstrip("\n"))
                        client.sendall(b"ok")


@dataclass
class Stage:
    """One state directory, one backend, and whoever serves them."""

    folder: Path
    backend: FakeBackend
    counter: Counter
    history: History
    links: list[FakeLink] = field(default_factory=list)
    calls: dict[str, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    _taken: dict[int, int] = field(default_factory=dict)
    _number: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def serve(self, **environment: str) -> Serving:
        place = f"{COUNTER_HOST}:{self.counter.port}"
        reach = {"egress": [place], "private-ok": [COUNTER_HOST]}
        for prefix in LIFETIMES:
            path = str(self.folder / f"{prefix}.py")
            write_toolkit(path, prefix=prefix, url="", host=COUNTER_HOST, port=self.counter.port)
        key = self.folder / "key"
        key.write_text("crash-points")
        key.chmod(0o600)
        config = self.folder / "atp-sandbox.toml"
        toolkits: dict[str, dict[str, object]] = {
            prefix: {"path": f"{prefix}.py", "lifetime": lifetime, **reach}
            for prefix, lifetime in LIFETIMES.items()
        }
        config.write_text(configuration(self.backend.url, key, {}, toolkits))
        return Serving(
            *("--config", config, "--reroute", f"{place}=127.0.0.1:{self.counter.port}"),
            *("--journal", "required"),
            state_dir=self.folder / "state",
            cwd=self.folder,
            **environment,
        )

    def accept(self) -> FakeLink:
        link = self.backend.accept()
        self.links.append(link)
        return link

    def ask(self, content: str, tool: str, link: FakeLink) -> None:
        """For the first time or again."""
        self.calls[content] = (tool, {"key": content, "seconds": 0.3})
        number = self.links.index(link) + 1
        self.history.sent(
            time.monotonic(), number, next(self._number), json.dumps(content), content
        )
        with contextlib.suppress(Exception):  # whoever has died takes no more requests
            link.request(content, tool, **self.calls[content][1])

    def take_answers(self) -> None:
        for number, link in enumerate(self.links, 1):
            texts = link.texts
            for text in texts[self._taken.get(number, 0) :]:
                answer = json.loads(text)
                request_id = json.dumps(answer["request_id"])
                digest = hashlib.sha256(text.encode()).hexdigest()
                kind = kind_of(answer["result"])
                self.history.received(
                    time.monotonic(), number, request_id, digest, kind, answer["request_id"]
                )
                self._taken[number] = self._taken.get(number, 0) + 1

    def is_answered(self, *contents: str) -> bool:
        self.take_answers()
        return all(map(self.history.is_answered, contents))

    def kind(self, content: str) -> str:
        (kind,) = {
            kind_of(answer["result"])
            for link in self.links
            for answer in link.answers
            if answer["request_id"] == content
        }
        return kind


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    history = History(time_limit_s=PATIENCE_S, slack_s=PATIENCE_S)
    counter = Counter(history)
    with FakeBackend() as backend:
        yield Stage(tmp_path, backend, counter, history)
    counter.close()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("point", POINTS)
def test_successor_gives_the_one_answer_wherever_the_supervisor_died(
    stage: Stage, point: str, case: str
) -> None:
    # Each point meets both lifetimes first, in one case or another.
    first, second = sorted(LIFETIMES, reverse=CASES.index(case) % 2 == 1)
    count = 2 if case == "duplicate" else 1
    with stage.serve(ATP_SANDBOX_CRASH_AT=f"{point}:{count}") as serve:
        link = stage.accept()
        tool = "slow" if case == "duplicate" else case
        stage.ask("first", first + tool, link)
        wait_until(lambda: serve.process.poll() is not None or stage.is_answered("first"), "an end")
        if case == "duplicate" and serve.process.poll() is None:
            link.cut()
            with contextlib.suppress(AssertionError):  # it may have died meanwhile
                link = stage.accept()
            stage.ask("first", first + tool, link)
            stage.ask("second", second + tool, link)
        if (point, case) in PASSED_BY:
            serve.process.kill()
        assert serve.process.wait(PATIENCE_S) == -signal.SIGKILL
        wait_until(lambda: all(link.is_closed for link in stage.links), "the end of its links")
        stage.take_answers()
        stage.history.died(time.monotonic())
    with stage.serve() as serve:
        link = stage.accept()
        stage.history.restarted(time.monotonic())
        for content in stage.history.unanswered():
            stage.ask(content.key, stage.calls[content.key][0], link)
        wait_until(lambda: stage.is_answered(*stage.calls), "an answer to each request")
        stage.ask("last", "call_quick", link)
        wait_until(lambda: stage.is_answered("last"), "an answer to a new request")
        assert serve.stop() == 0
        stage.take_answers()
        assert stage.history.faults() == []
    assert stage.kind("last") == OK
    if case == "nosuch":
        assert stage.kind("first") == UNKNOWN
    elif case != "duplicate":
        assert stage.kind("first") in KINDS[point]
