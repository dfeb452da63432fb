"""Calls per second, latency and supervisor CPU by lifetime and number of outstanding calls."""

from __future__ import annotations

from functools import partial

from benchmarks.loads import echo
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import LIFETIMES, Settings, in_turn, running
from benchmarks.statistics import Section
from benchmarks.targets import APART

JAIL_OUTSTANDING = 16


def measure(settings: Settings) -> Section:
    section = Section("throughput", "echo of 300 bytes through the websocket, strict")
    folder = settings.folder
    arms = {name: sandbox(folder / name.replace(":", "-"), name) for name in LIFETIMES}
    with running(settings, *arms.values()):
        measures = {
            (name, f"{outstanding} outstanding"): partial(
                peer.measure, settings.seconds, echo(outstanding)
            )
            for name, peer in arms.items()
            for outstanding in settings.outstanding
            if name != "jail" or outstanding <= JAIL_OUTSTANDING
        }
        for name in ("call", "calls:1000"):
            apart = partial(arms[name].measure_apart, settings.seconds, echo(1))
            measures[name, APART] = apart
        in_turn(settings, section, measures)
    section.notes.append(
        f"`jail` with at most {JAIL_OUTSTANDING}: a jail takes so long to make that more would "
        "measure the queue alone."
    )
    return section
