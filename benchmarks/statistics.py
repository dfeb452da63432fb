"""Medians with their spread, of what several rounds gave. PURE."""

from __future__ import annotations

import statistics as _statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from benchmarks.measured import Measured


@dataclass(frozen=True, slots=True)
class Spread:
    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample."""
    return Spread(_statistics.median(samples), min(samples), max(samples))


def ratio(these: Sequence[float], those: Sequence[float]) -> Spread:
    """Of each round to the same round; where their numbers differ, of all to the median."""
    if len(these) == len(those):
        return spread([a / b for a, b in zip(these, those, strict=True)])
    middle = _statistics.median(those)
    return spread([each / middle for each in these])


@dataclass(slots=True)
class Row:
    """What one system under test gave in one case, round by round."""

    arm: str
    case: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    """By metric, whose name ends with its unit."""
    remark: str = ""
    """Instead of samples, why there are none."""

    def add(self, **values: float) -> None:
        for metric, value in values.items():
            self.samples.setdefault(metric, []).append(value)

    def add_measured(self, measured: Measured) -> None:
        self.add(calls_per_s=measured.rate)
        if measured.latencies_s:
            self.add(
                p50_ms=measured.percentile_ms(0.5),
                p95_ms=measured.percentile_ms(0.95),
                p99_ms=measured.percentile_ms(0.99),
            )
        if measured.cpu_s and measured.calls:
            self.add(cpu_us_per_call=measured.cpu_s / measured.calls * 1e6)
        if measured.generator_cpu_s and measured.calls:
            self.add(generator_us_per_call=measured.generator_cpu_s / measured.calls * 1e6)

    def median(self, metric: str) -> float:
        return spread(self.samples[metric]).median


@dataclass(slots=True)
class Section:
    """The table of one NAME."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def row(self, arm: str, case: str) -> Row:
        """That row, a new one if there is none yet."""
        for row in self.rows:
            if (row.arm, row.case) == (arm, case):
                return row
        self.rows.append(Row(arm, case))
        return self.rows[-1]

    def samples(self, arm: str, case: str, metric: str) -> list[float]:
        """Empty where that was not measured."""
        for row in self.rows:
            if (row.arm, row.case) == (arm, case):
                return row.samples.get(metric, [])
        return []


def table(section: Section) -> str:
    """As Markdown, readable as it stands: medians, and the spread of the first metric."""
    metrics = list(dict.fromkeys(metric for row in section.rows for metric in row.samples))
    lines = [["", "", *(_heading(metric) for metric in metrics)]]
    for row in section.rows:
        cells = [row.arm, row.case]
        for metric in metrics:
            samples = row.samples.get(metric)
            cells.append(shown(samples, is_wide=metric == metrics[0]) if samples else "")
        if row.remark:
            cells = [row.arm, row.remark]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    lines.insert(1, ["-" * width for width in widths])
    text = []
    for cells in lines:
        padded = zip_longest(cells, widths, fillvalue="")
        text.append("| " + " | ".join(str(cell).ljust(int(width)) for cell, width in padded) + " |")
    return "\n".join([f"### {section.name}: {section.title}", "", *text, *_notes(section.notes)])


def shown(samples: Sequence[float], is_wide: bool = True) -> str:
    """A median, with its spread if wanted and there is one."""
    found = spread(samples)
    text = number(found.median)
    if is_wide and len(samples) > 1:
        text += f" ({number(found.low)}–{number(found.high)})"
    return text


def number(value: float) -> str:
    """With three digits, or all before the point."""
    if abs(value) >= 100 or value == 0:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _heading(metric: str) -> str:
    return {
        "calls_per_s": "calls/s",
        "cpu_us_per_call": "CPU µs/call",
        "generator_us_per_call": "generator µs/call",
    }.get(metric, metric.replace("_", " "))


def _notes(notes: list[str]) -> list[str]:
    return ["", *notes] if notes else []
