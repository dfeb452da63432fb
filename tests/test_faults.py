"""Short forms of `python -m benchmarks.faults`: one answer, at most one execution, come what may.

Connections are cut in every way and the supervisor is killed while calls run. The published SDK
loses answers under the same faults of its connection: so the check finds what there is to find.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from test_backend import sdk_python

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.faults import Report, run_faults
from benchmarks.history import FaultKind

SEEDS = [13]
RECONNECTS, KILLS = 20, 2


def told(report: Report) -> str:
    """What there is to know of a run that failed, its seed first of all."""
    stories = ["\n  ".join(story) for story in report.stories]
    return "\n".join([f"seed {report.seed}", *report.faults[:20], *stories, *report.log])


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_each_request_has_one_answer_and_one_execution_under_faults(seed: int) -> None:
    report = run_faults(seed, reconnects=RECONNECTS, kills=KILLS)
    assert report.faults == [], told(report)
    assert report.reconnects >= RECONNECTS
    assert report.kills >= KILLS
    # On two cores with nothing beside it, ten times as many.
    assert report.requests > 30
    assert report.executions > 15
    assert report.kinds["ok"] > 5
    assert report.copies > 0  # what was not confirmed in time is sent again


def test_published_sdk_loses_answers_under_the_same_faults() -> None:
    report = run_faults(
        1,
        reconnects=12,
        kills=0,
        sdk_python=sdk_python("0.1.0", (3, 11), "websocket-client", "requests"),
    )
    assert report.reconnects >= 12, told(report)
    assert report.by_kind[FaultKind.LOST] > 0, told(report)
    assert report.kinds["ok"] > 0
