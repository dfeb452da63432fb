"""`python -m benchmarks`: what it concludes from samples, and that it runs at all.

How fast anything is, is not asserted here.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generator import PeerGone, WrongAnswer
from benchmarks.loads import TEXT, echo, frame, unmasked
from benchmarks.measured import Measured
from benchmarks.peer import Peer
from benchmarks.statistics import Section, Spread, ratio, spread, table
from benchmarks.system import ROOT
from benchmarks.targets import Target, judge, verdicts_table

SMOKE_S = 90
THIS = ("part", "ours", "64 outstanding", "calls_per_s")
THAT = ("part", "theirs", "64 outstanding", "calls_per_s")


def section(ours: list[float], theirs: list[float]) -> dict[str, Section]:
    found = Section("part", "of it all")
    for arm, samples in (("ours", ours), ("theirs", theirs)):
        for sample in samples:
            found.row(arm, "64 outstanding").add(calls_per_s=sample)
    return {"part": found}


def test_a_percentile_is_the_latency_that_so_many_calls_did_not_exceed() -> None:
    measured = Measured(100, 2.0, [number / 1e3 for number in range(1, 101)])
    assert measured.rate == 50
    assert measured.percentile_ms(0.5) == pytest.approx(51)
    assert measured.percentile_ms(0.99) == pytest.approx(100)
    assert measured.percentile_ms(1.0) == pytest.approx(100)
    assert Measured(0, 0.0).rate == Measured(0, 0.0).percentile_ms(0.5) == 0


def test_ratios_are_taken_within_a_round_so_that_drift_cancels_out() -> None:
    assert ratio([100, 50, 10], [200, 100, 20]) == Spread(0.5, 0.5, 0.5)
    assert ratio([100, 50], [100, 200, 300]) == Spread(0.375, 0.25, 0.5)
    assert spread([3, 1, 2]) == Spread(2, 1, 3)


@pytest.mark.parametrize(
    ("ours", "bound", "at_most", "is_met"),
    [
        ([10, 10, 10], 2.0, False, True),
        ([9, 9, 10], 2.0, False, False),
        ([5, 5, 5], 1.0, True, True),
        ([6, 6, 5], 1.0, True, False),
        ([], 1.0, False, None),
    ],
)
def test_a_target_is_met_by_the_median_and_never_by_what_was_not_measured(
    ours: list[float], bound: float, at_most: bool, is_met: bool | None
) -> None:
    target = Target("ours against theirs", bound, THIS, THAT, at_most=at_most)
    verdict = judge(target, section(ours, [5, 5, 5]))
    assert verdict.is_met is is_met
    word = {True: "met", False: "missed", None: "not measured"}[is_met]
    assert verdicts_table([verdict]).endswith(f"| {word} |")


def test_a_target_without_a_peer_is_the_value_itself() -> None:
    target = Target("ours", 25.0, THIS, at_most=True, unit=" µs")
    assert judge(target, section([20, 22, 90], [])).found == Spread(22, 20, 90)
    assert judge(target, {}).is_met is None


def test_a_table_says_why_a_row_is_empty() -> None:
    found = section([1234.0, 1300.0], [])["part"]
    found.row("theirs", "").remark = "not measured: not installed"
    text = table(found)
    assert "1,267 (1,234–1,300)" in text
    assert "not measured: not installed" in text


@pytest.mark.parametrize("size", [1, 100, 300, 70_000])
def test_a_request_is_one_frame_and_its_answer_is_compared_to_the_byte(size: int) -> None:
    load = echo(1, size)
    request = load.request(17)
    text = request[request.index(b"{") :]
    assert request == frame(TEXT, text)
    payload = json.loads(text)["payload"]
    assert payload == {
        "request_id": "r000000017",
        "tool_name": "echo",
        "params": {"value": "x" * size},
    }
    answer = {"type": "tool_response", "request_id": "r000000017", "result": "x" * size}
    due = json.dumps(answer).encode()
    assert load.is_answer(due)
    assert not load.is_answer(due.replace(b"x", b"y", 1))
    assert not load.is_answer(due[:-1])


def test_unmasking_is_its_own_inverse() -> None:
    assert unmasked(unmasked(b"seven b", b"\x01\xff\x00\x7f"), b"\x01\xff\x00\x7f") == b"seven b"
    assert unmasked(b"", b"\x01\xff\x00\x7f") == b""


@pytest.fixture
def null_peer(tmp_path: Path) -> Iterator[Peer]:
    """Of echoes with 300 bytes, whatever it is asked."""
    peer = Peer(tmp_path, lambda url: [sys.executable, "-m", "benchmarks.null_peer", url, "300"])
    try:
        peer.start()
        yield peer
    finally:
        peer.stop()


def test_the_generator_counts_what_was_answered(null_peer: Peer) -> None:
    measured = null_peer.measure(0.2, echo(64))
    assert measured.calls >= 64
    assert len(measured.latencies_s) == measured.calls
    assert measured.latencies_s == sorted(measured.latencies_s)
    assert measured.generator_cpu_s > 0
    few, many = null_peer.measure_all(0.2, echo(1), echo(63))
    assert 0 < few.calls < many.calls


def test_one_wrong_answer_ends_a_measurement(null_peer: Peer) -> None:
    with pytest.raises(WrongAnswer, match="not the answer that was due"):
        null_peer.measure(0.2, echo(4, size=299))


def test_a_peer_that_ends_is_told_with_the_last_lines_of_its_log(tmp_path: Path) -> None:
    peer = Peer(tmp_path, lambda _: [sys.executable, "-c", "raise SystemExit('out of luck')"])
    try:
        with pytest.raises(PeerGone, match="never connected\nout of luck"):
            peer.start()
    finally:
        peer.stop()


@pytest.mark.alone
@pytest.mark.slow
def test_the_benchmark_runs_and_keeps_every_sample(tmp_path: Path) -> None:
    told, found = run(tmp_path, "throughput", "storms")
    assert [each["name"] for each in found["sections"]] == ["throughput", "storms"]
    assert found["is_quick"]
    assert found["surroundings"]["python"]
    rows = {(row["arm"], row["case"]): row for row in found["sections"][0]["rows"]}
    assert all(len(row["samples"]["calls_per_s"]) == 1 for row in rows.values())
    assert ("calls:1000", "64 outstanding") in rows
    assert "### throughput" in told
    assert "### targets" in told


def run(folder: Path, *names: str) -> tuple[str, dict[str, Any]]:
    """A quick run of these parts: what it printed, and its JSON."""
    file = folder / "figures.json"
    command = [sys.executable, "-m", "benchmarks", *names, "--quick", "--json", str(file)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SMOKE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(file.read_text())
