"""More calls than can be served: every one has its answer at once, and nobody else notices."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from backends import FakeBackend, FakeLink, Serving
from conftest import processes_named, toolkit_text, wait_until

from atp_sandbox.limits import MIB

BURST = 10_000
ROUNDS = 10
MEMORY_BYTES = 64 * MIB
"""What a burst may add to the supervisor."""
OVERLOADED_S = 0.05

BODY = """
    import ctypes, time

    @tool
    def echo(**kw):
        return kw

    @tool
    def nap(**_):
        time.sleep(0.05)
        return "slept"

    @tool
    def hang(comm, **_):
        ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)  # to be seen from outside
        time.sleep(1000)
"""


@pytest.fixture
def backends() -> Iterator[tuple[FakeBackend, FakeBackend]]:
    with ExitStack() as stack:
        yield stack.enter_context(FakeBackend()), stack.enter_context(FakeBackend())


def write_kit(folder: Path, name: str, backend: FakeBackend) -> Path:
    """A toolkit that says itself where it belongs, so that each has a link of its own."""
    where = f'app_name="{name}", base_url="{backend.url}"'
    path = folder / f"{name}.py"
    path.write_text(toolkit_text(BODY).replace('app_name="tests"', where))
    return path


def most_resident_bytes(process: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) * 1024


def kind_of(result: object) -> str:
    return str(result.get("error_type", "ok")) if isinstance(result, dict) else "ok"


def test_burst_on_one_link_is_fully_answered_while_another_toolkit_is_served(
    tmp_path: Path, backends: tuple[FakeBackend, FakeBackend]
) -> None:
    kits = [write_kit(tmp_path, n, b) for n, b in zip(("busy", "other"), backends, strict=True)]
    options = ("--as-written", "--total-queue", 100)
    with Serving(*kits, *options, state_dir=tmp_path / "state") as serve:
        busy, other = (backend.accept() for backend in backends)
        assert busy.call("first", "echo") == other.call("first", "echo") == {}
        before = psutil.Process(serve.process.pid).memory_info().rss
        for number in range(BURST):
            busy.request(number, "nap")
            if number % (BURST // ROUNDS) == 0:
                # More at once than it has workers, so some of them have to wait, too.
                asked = [f"{number}-{n}" for n in range(10)]
                for request_id in asked:
                    other.request(request_id, "echo")
                assert [other.result(request_id) for request_id in asked] == [{}] * 10
        wait_until(lambda: len(busy.texts) >= BURST + 1, "an answer to each request")
        after = most_resident_bytes(serve.process.pid)
        assert after - before < MEMORY_BYTES
        ids = Counter(json.dumps(answer["request_id"]) for answer in busy.answers)
        assert len(ids) == len(busy.texts) == BURST + 1
        results = [answer["result"] for answer in busy.answers]
        assert {kind_of(result) for result in results} == {"ok", "overloaded"}
        limits = [result["limit"] for result in results if kind_of(result) == "overloaded"]
        assert all(hit == {"name": "total-queue", "value": 100, "unit": "calls"} for hit in limits)
        serve.wait_for(r"calls were refused because too many wait  toolkit=busy")
        assert len(serve.lines) < 200, "a line for each call that was refused"


def fill(link: FakeLink, comm: str) -> None:
    """One call at work, and as many waiting as may."""
    link.request("running", "hang", comm=comm)
    wait_until(lambda: processes_named(comm), "a call at work")
    for number in range(10):
        link.request(f"waiting-{number}", "hang", comm=comm)
    wait_until(lambda: len(link.texts) >= 10 - 3, "a full queue")


@pytest.mark.alone
def test_overloaded_comes_within_50_ms(
    tmp_path: Path, backends: tuple[FakeBackend, FakeBackend]
) -> None:
    backend = backends[0]
    kit = write_kit(tmp_path, "kit", backend)
    # Half of the queue is shared out among the four tools, so one of them may have three places.
    options = ("--as-written", "--concurrency", 1, "--queue", 4, "--time", "100s")
    with Serving(kit, *options, state_dir=tmp_path / "state") as serve:
        link = backend.accept()
        fill(link, "atp-full-queue")
        seconds = []
        for number in range(100):
            began = time.monotonic()
            result = link.call(number, "hang", comm="x")
            seconds.append(time.monotonic() - began)
            assert result["error_type"] == "overloaded"
            assert result["limit"] == {"name": "queue", "value": 4, "unit": "calls"}
            assert result["retry_after_s"] >= 0.1
        assert sorted(seconds)[-2] < OVERLOADED_S
        serve.process.kill()
