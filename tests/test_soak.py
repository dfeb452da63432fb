"""The short form of `python -m benchmarks.soak`: nothing is lost, and nothing stays behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import soak

MIN_CALLS = 200
TIME_LIMIT_S = 10.0
"""For sixteen calls at once beside other tests; the benchmark's own is for a machine of its own."""


@pytest.mark.slow
def test_hundreds_of_mixed_calls_are_answered_once_each_and_leave_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(soak, "TIME_LIMIT_S", TIME_LIMIT_S)
    report = soak.run_soak(600, concurrency=16, seconds=20.0)
    assert report.faults == []
    assert report.before == report.after
    assert report.calls >= MIN_CALLS
    assert sum(report.endings.values()) == report.calls
    assert {"success", "tool_error", "crashed", "output_limit"} <= report.endings.keys()
