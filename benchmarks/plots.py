"""Plots of what was measured, as PNG and SVG. Each is left out if its part was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.settings import OUTSTANDING
from benchmarks.statistics import Row, Section, spread


def draw(sections: Mapping[str, Section], folder: Path) -> list[Path]:
    """The files that were written."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures, the same bytes
    drawn = {
        "throughput": _throughput,
        "latency": _latency,
        "peers": _peers,
        "toolkits": _toolkits,
        "zygotes": _zygotes,
        "storms": _storms,
    }
    files = []
    for name, draw_one in drawn.items():
        section = sections.get({"latency": "throughput"}.get(name, name))
        if section is None:
            continue
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        draw_one(axes, section)
        axes.grid(True, alpha=0.3)
        for suffix in ("png", "svg"):
            files.append(folder / f"{name}.{suffix}")
            figure.savefig(files[-1], dpi=130, metadata={"Date": None} if suffix == "svg" else None)
        plt.close(figure)
    return files


def _throughput(axes: Any, section: Section) -> None:
    for arm, rows in _by_arm(section, " outstanding").items():
        found = [spread(row.samples["calls_per_s"]) for row in rows]
        outstanding = [int(row.case.split()[0]) for row in rows]
        medians = [each.median for each in found]
        errors = [
            [each.median - each.low for each in found],
            [each.high - each.median for each in found],
        ]
        axes.errorbar(outstanding, medians, yerr=errors, marker="o", capsize=3, label=arm)
    axes.set(xscale="log", yscale="log", xlabel="calls outstanding", ylabel="calls per second")
    axes.set_xticks(OUTSTANDING, [str(each) for each in OUTSTANDING])
    axes.set_title("Throughput (median, lowest and highest round)")
    axes.legend()


def _latency(axes: Any, section: Section) -> None:
    """p50, p95 and p99 by lifetime."""
    for arm, rows in _by_arm(section, " outstanding").items():
        outstanding = [int(row.case.split()[0]) for row in rows]
        (line,) = axes.plot(
            outstanding, [row.median("p50_ms") for row in rows], marker="o", label=f"{arm}: p50"
        )
        for metric, style in (("p95_ms", "--"), ("p99_ms", ":")):
            medians = [row.median(metric) for row in rows]
            label = f"{arm}: {metric[:3]}"
            axes.plot(outstanding, medians, style, color=line.get_color(), label=label)
    axes.set(xscale="log", yscale="log", xlabel="calls outstanding", ylabel="latency, ms")
    axes.set_xticks(OUTSTANDING, [str(each) for each in OUTSTANDING])
    axes.set_title("Latency (medians of the rounds)")
    axes.legend(fontsize="small")


def _peers(axes: Any, section: Section) -> None:
    rows = [row for row in section.rows if "calls_per_s" in row.samples]
    rows.sort(key=lambda row: row.median("calls_per_s"))
    names = [f"{row.arm}, {row.case}" for row in rows]
    colours = ["C1" if row.arm.startswith("sandbox") else "C0" for row in rows]
    axes.figure.set_size_inches(8, 1.2 + 0.28 * len(rows))
    axes.barh(names, [row.median("calls_per_s") for row in rows], color=colours)
    axes.set(xscale="log", xlabel="calls per second")
    axes.set_title("The sandbox, its peers and its floors")


def _toolkits(axes: Any, section: Section) -> None:
    counts = [int(row.arm.split()[0]) for row in section.rows]
    axes.plot(counts, [row.median("calls_per_s") for row in section.rows], marker="o")
    axes.set(xscale="log", xlabel="toolkits registered", ylabel="calls per second of one of them")
    axes.set_ylim(bottom=0)
    axes.set_title("Scaling with toolkits")


def _zygotes(axes: Any, section: Section) -> None:
    for case in dict.fromkeys(row.case for row in section.rows):
        rows = [row for row in section.rows if row.case == case]
        sizes = [int(row.arm.split()[0]) for row in rows]
        rates = [row.median("calls_per_s") for row in rows]
        axes.plot(sizes, rates, marker="o", label=case)
    axes.set(xlabel="MB held after the import", ylabel="calls per second, `call`")
    axes.set_ylim(bottom=0)
    axes.set_title("Scaling with the zygote's size")
    axes.legend()


def _storms(axes: Any, section: Section) -> None:
    names = [row.case for row in section.rows]
    places = range(len(names))
    for number, metric in enumerate(("p50_ms", "p95_ms", "p99_ms")):
        heights = [row.median(metric) for row in section.rows]
        axes.bar([place + 0.25 * number for place in places], heights, 0.25, label=metric[:3])
    axes.set_xticks([place + 0.25 for place in places], names)
    axes.set(yscale="log", ylabel="latency of a quiet toolkit, ms")
    axes.set_title("A bystander beside a hostile neighbour")
    axes.legend()


def _by_arm(section: Section, suffix: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in section.rows:
        if row.case.endswith(suffix) and row.samples:
            found.setdefault(row.arm, []).append(row)
    return found
