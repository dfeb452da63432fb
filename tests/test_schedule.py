"""Which faults `benchmarks.faults` makes: always the same ones for one seed, and of every kind."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.schedule import CONNECTION_FAULTS, DEATHS, MACHINE_FAULTS, Kind, schedule


def test_same_seed_gives_the_same_faults_in_the_same_order() -> None:
    first = schedule(7, reconnects=100, kills=10)
    assert first == schedule(7, reconnects=100, kills=10)
    assert first != schedule(8, reconnects=100, kills=10)


def test_what_cannot_be_made_is_left_out_and_changes_nothing_else() -> None:
    whole = schedule(7, reconnects=200, kills=20)
    without = schedule(7, reconnects=200, kills=20, without=[Kind.FULL_DISK])
    assert without == [planned for planned in whole if planned.kind is not Kind.FULL_DISK]
    assert len(without) < len(whole)


def test_schedule_has_as_many_reconnects_and_deaths_as_wanted_and_every_kind() -> None:
    kinds = [planned.kind for planned in schedule(1, reconnects=1_000, kills=100)]
    assert sum(kind in DEATHS for kind in kinds) == 100
    assert sum(kind in {**CONNECTION_FAULTS, **DEATHS} for kind in kinds) == 1_000
    assert set(kinds) == {*CONNECTION_FAULTS, *DEATHS, *MACHINE_FAULTS} == set(Kind)
