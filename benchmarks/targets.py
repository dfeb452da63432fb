"""What is promised, as ratios of one run, and whether it held. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.statistics import Section, Spread, number, ratio, spread

Source = tuple[str, str, str, str]
"""Section, arm, case, metric."""


@dataclass(frozen=True, slots=True)
class Target:
    text: str
    bound: float
    this: Source
    that: Source | None = None
    """What it is compared with; None if the value itself is the promise."""
    at_most: bool = False
    unit: str = "×"


@dataclass(frozen=True, slots=True)
class Verdict:
    target: Target
    found: Spread | None
    """None if it could not be measured."""

    @property
    def is_met(self) -> bool | None:
        """By the median."""
        if self.found is None:
            return None
        bound, median = self.target.bound, self.found.median
        return median <= bound if self.target.at_most else median >= bound


def judge(target: Target, sections: Mapping[str, Section]) -> Verdict:
    these = _samples(target.this, sections)
    if target.that is None:
        return Verdict(target, spread(these) if these else None)
    those = _samples(target.that, sections)
    return Verdict(target, ratio(these, those) if these and those and all(those) else None)


def _samples(source: Source, sections: Mapping[str, Section]) -> list[float]:
    name, arm, case, metric = source
    return sections[name].samples(arm, case, metric) if name in sections else []


APART = "one, 20 ms apart"
"""A worker is ready for each call then; its calls per second leave the pauses out."""
RATE, P50, CPU = "calls_per_s", "p50_ms", "cpu_us_per_call"
AT_1, AT_16, AT_64 = "1 outstanding", "16 outstanding", "64 outstanding"

TARGETS = (
    Target(
        "`calls:1000`, 64 outstanding, strict: throughput against the SDK in its own process",
        5.0,
        ("peers", "sandbox calls:1000", AT_64, RATE),
        ("peers", "published SDK 0.1.0", AT_64, RATE),
    ),
    Target(
        "… against the minimal loop without checks",
        0.5,
        ("peers", "sandbox calls:1000", AT_64, RATE),
        ("peers", "unchecked loop", AT_64, RATE),
    ),
    Target(
        "`call`, 64 outstanding: throughput against the bare raw-fork loop",
        0.8,
        ("peers", "sandbox call", AT_64, RATE),
        ("peers", "raw fork loop", "one after the other", RATE),
    ),
    Target(
        "… against `ProcessPoolExecutor(max_tasks_per_child=1)`",
        20.0,
        ("peers", "sandbox call", AT_64, RATE),
        ("peers", "ProcessPoolExecutor one task", AT_16, RATE),
    ),
    Target(
        "… against pebble, `max_tasks=1`",
        20.0,
        ("peers", "sandbox call", AT_64, RATE),
        ("peers", "pebble one task", AT_16, RATE),
    ),
    Target(
        "… against `multiprocessing.Pool(maxtasksperchild=1)`",
        3.0,
        ("peers", "sandbox call", AT_64, RATE),
        ("peers", "mp.Pool one task", AT_16, RATE),
    ),
    Target(
        "`calls:1000`, 16 outstanding, by websocket, against warm billiard called directly",
        1.5,
        ("peers", "sandbox calls:1000", AT_16, RATE),
        ("peers", "billiard warm", AT_16, RATE),
    ),
    Target(
        "… against warm `multiprocessing.Pool` called directly",
        1.5,
        ("peers", "sandbox calls:1000", AT_16, RATE),
        ("peers", "mp.Pool warm", AT_16, RATE),
    ),
    Target(
        "… against warm billiard without callers that wait (callbacks)",
        1.5,
        ("peers", "sandbox calls:1000", AT_16, RATE),
        ("peers", "billiard warm, callbacks", AT_16, RATE),
    ),
    Target(
        "`call` p50 with one outstanding and a worker ready, against `calls:1000`",
        1.3,
        ("throughput", "call", APART, P50),
        ("throughput", "calls:1000", APART, P50),
        at_most=True,
    ),
    Target(
        "supervisor CPU per call, `calls:1000`, 64 outstanding",
        25.0,
        ("throughput", "calls:1000", AT_64, CPU),
        at_most=True,
        unit=" µs",
    ),
    Target(
        "10 ms of own work, concurrency = cores: throughput of `call` against warm processes",
        0.9,
        ("work", "sandbox call", "10 ms", RATE),
        ("work", "mp.Pool warm", "10 ms", RATE),
    ),
    Target(
        "strict against `none`, `call`: throughput",
        0.75,
        ("isolation", "strict", AT_64, RATE),
        ("isolation", "none", AT_64, RATE),
    ),
    Target(
        "… p50 with a worker ready",
        1.15,
        ("isolation", "strict", APART, P50),
        ("isolation", "none", APART, P50),
        at_most=True,
    ),
    Target(
        "idle toolkit (jail and zygote), PSS beyond the interpreter's shared pages",
        12.0,
        ("memory", "idle toolkit", "1 at once", "beyond_mb"),
        at_most=True,
        unit=" MB",
    ),
    Target(
        "100 toolkits registered: throughput on one of them against one alone",
        0.9,
        ("toolkits", "100 toolkits", AT_64, RATE),
        ("toolkits", "1 toolkit", AT_64, RATE),
    ),
    Target(
        "journal on against off, `call`",
        0.9,
        ("journal", "call, journal on", AT_64, RATE),
        ("journal", "call, journal off", AT_64, RATE),
    ),
    Target(
        "journal on against off, `calls:1000`",
        0.75,
        ("journal", "calls:1000, journal on", AT_64, RATE),
        ("journal", "calls:1000, journal off", AT_64, RATE),
    ),
)


def verdicts_table(verdicts: list[Verdict]) -> str:
    lines = ["### targets", "", "| | target | measured | |", "|---|---|---|---|"]
    for verdict in verdicts:
        target, found = verdict.target, verdict.found
        word = {True: "met", False: "missed", None: "not measured"}[verdict.is_met]
        measured = ""
        if found is not None:
            low, high = number(found.low), number(found.high)
            measured = f"{number(found.median)}{target.unit} ({low}–{high})"
        sign = "≤" if target.at_most else "≥"
        lines.append(
            f"| {target.text} | {sign} {number(target.bound)}{target.unit} | {measured} | {word} |"
        )
    return "\n".join(lines)
