"""A tool with work of its own: what a fresh process for each call takes from it."""

from __future__ import annotations

import os
from functools import partial

from benchmarks.loads import cpu
from benchmarks.pools import measure_pool
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Measures, Settings, in_turn, running
from benchmarks.statistics import Section

WORK_S = 0.01
CASE = "10 ms"
POOL = "mp.Pool warm"


def measure(settings: Settings) -> Section:
    cores = len(os.sched_getaffinity(0))
    section = Section("work", f"10 ms of processor time a call, {cores} at once on {cores} cores")
    options = ("--concurrency", str(cores))
    arms = {
        f"sandbox {lifetime}": sandbox(settings.folder / lifetime[:5], lifetime, *options)
        for lifetime in ("call", "calls:1000")
    }
    measures: Measures = {
        (arm, CASE): partial(peer.measure, settings.seconds, cpu(cores, WORK_S))
        for arm, peer in arms.items()
    }
    measures[POOL, CASE] = partial(measure_pool, POOL, f"cpu:{WORK_S}", cores, settings.seconds)
    with running(settings, *arms.values()):
        in_turn(settings, section, measures)
    return section
