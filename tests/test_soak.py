"""The short form of `python -m benchmarks.soak`: nothing is lost, and nothing stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.soak import run_soak

MIN_CALLS = 200


@pytest.mark.slow
def test_thousand_mixed_calls_are_answered_once_each_and_leave_nothing() -> None:
    report = run_soak(1_000, concurrency=16, seconds=40.0)
    assert report.faults == []
    assert report.before == report.after
    assert report.calls >= MIN_CALLS
    assert sum(report.endings.values()) == report.calls
    assert {"success", "tool_error", "crashed", "output_limit"} <= report.endings.keys()
