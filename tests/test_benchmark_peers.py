"""Guarantees: every peer that is measured gives right answers, or is named as missing."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import pytest
from test_backend import sdk_python

from benchmarks import floors, pools, published_sdk
from benchmarks.measured import Measured
from benchmarks.system import System
from benchmarks.wire import Backend, Link, request_text
from benchmarks.work import VALUE


@pytest.mark.parametrize("name", pools.POOLS)
def test_peer_echoes_or_says_what_it_needs(name: str) -> None:
    lacks = pools.missing(name)
    if lacks:
        assert lacks in str(pools.main(name))
        return
    measured = pools.measure_pool(name, "echo", 4, 0.2)
    assert measured.calls >= 4
    assert len(measured.latencies_s) == measured.calls
    assert measured.latencies_s == sorted(measured.latencies_s)


def test_wrong_answer_ends_the_measurement() -> None:
    def submit(done: pools.Done) -> None:
        done("another")

    with pytest.raises(AssertionError, match="wrong answer"):
        pools._run(submit, "expected", 1, 0.01)


def test_floors_answer() -> None:
    for measured in (
        floors.measure_fork_loop(0.2),
        floors.measure_fork_loop(0.2, megabytes=8),
        floors.measure_fork_loop_two(0.2),
        floors.measure_pingpong(0.2),
    ):
        assert measured.calls == len(measured.latencies_s) > 0
        assert measured.cpu_s > 0


def test_rates_and_percentiles() -> None:
    measured = Measured(4, 2.0, [0.001, 0.002, 0.003, 0.004])
    assert measured.rate == 2.0
    assert measured.percentile_ms(0.5) == 3.0
    assert measured.percentile_ms(1.0) == 4.0
    assert Measured(0, 0.0).percentile_ms(0.5) == 0.0


class OneCallEach:
    """Asks for each tool once, all at the same time."""

    CALLS = (("echo", {"value": VALUE}), ("sleep", {"seconds": 0.01}), ("cpu", {"seconds": 0.01}))

    def __init__(self) -> None:
        self.results: dict[str, object] = {}
        self.done = asyncio.Event()

    def link_opened(self, link: Link) -> None:
        for tool, params in self.CALLS:
            link.send_text(request_text(tool, tool, params))

    def text_received(self, link: Link, data: bytes) -> None:
        answer = json.loads(data)
        self.results[answer["request_id"]] = answer["result"]
        if len(self.results) == len(self.CALLS):
            self.done.set()

    def link_closed(self, link: Link) -> None: ...
    def pong_received(self, link: Link, payload: bytes) -> None: ...


async def results_of(peer: str, folder: Path) -> dict[str, object]:
    owner = OneCallEach()
    backend = Backend(owner)
    await backend.start()
    if peer == "unchecked":
        command = [sys.executable, "-m", "benchmarks.unchecked", backend.url]
        system = System(command, folder, {})
    else:
        system = System(published_sdk.command(backend.url), folder, {"PYTHONPATH": ""})
    system.start()
    try:
        await asyncio.wait_for(owner.done.wait(), 30)
    finally:
        system.kill()
        backend.close()
    return owner.results


@pytest.mark.parametrize("peer", ["unchecked", "published SDK"])
def test_peer_over_the_websocket_does_the_same_work(peer: str, tmp_path: Path) -> None:
    if peer == "published SDK":
        sdk_python("0.1.0", (3, 11), "websocket-client", "requests")
    assert asyncio.run(results_of(peer, tmp_path)) == {"echo": VALUE, "sleep": 0.01, "cpu": 0.01}
