"""What one option costs: the same calls through several `serve` that differ in it alone."""

from __future__ import annotations

from functools import partial

from benchmarks.floors import measure_fork_loop
from benchmarks.generator import PeerGone
from benchmarks.loads import echo
from benchmarks.peer import Peer
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Measures, Settings, in_turn, running
from benchmarks.statistics import Section
from benchmarks.targets import APART, AT_64

LEVELS = ("none", "container", "strict")


def isolation(settings: Settings) -> Section:
    section = Section("isolation", "the levels, lifetime `call`, echo of 300 bytes")
    arms = {
        level: sandbox(settings.folder / level, "call", "--isolation", level) for level in LEVELS
    }
    why = _why_not(sandbox(settings.folder / "try", "call", "--isolation", "container"))
    if why:
        del arms["container"]
    section = _measured(settings, section, arms, apart=True)
    if why:
        section.row("container", "").remark = f"not measured: {why}"
    return section


def journal(settings: Settings) -> Section:
    section = Section("journal", "with and without, strict, echo of 300 bytes")
    arms = {
        f"{lifetime}, journal {mode}": sandbox(
            settings.folder / f"{lifetime.replace(':', '-')}-{mode}", lifetime, "--journal", mode
        )
        for lifetime in ("call", "calls:1000")
        for mode in ("off", "on")
    }
    return _measured(settings, section, arms, apart=False)


def toolkits(settings: Settings) -> Section:
    section = Section("toolkits", "calls of one of several, `calls:1000`, strict")
    counts = (1, 3) if settings.is_quick else (1, 10, 100)
    arms = {
        f"{count} toolkit{'s' if count > 1 else ''}": sandbox(
            settings.folder / str(count), "calls:1000", toolkits=count
        )
        for count in counts
    }
    loads = {arm: "echo" if arm == "1 toolkit" else "echo_0" for arm in arms}
    with running(settings, *arms.values(), tools=list(loads.values())):
        in_turn(
            settings,
            section,
            {
                (arm, AT_64): partial(peer.measure, settings.seconds, echo(64, tool=loads[arm]))
                for arm, peer in arms.items()
            },
        )
    return section


def zygotes(settings: Settings) -> Section:
    section = Section(
        "zygotes", "`call`, 64 outstanding, by what the toolkit holds after its import"
    )
    sizes = (0, 32) if settings.is_quick else (0, 32, 96)
    arms = {
        f"{size} MB": sandbox(settings.folder / str(size), "call", megabytes=size) for size in sizes
    }
    measures: Measures = {
        (arm, AT_64): partial(peer.measure, settings.seconds, echo(64))
        for arm, peer in arms.items()
    }
    for arm, size in zip(arms, sizes, strict=True):
        measures[arm, "raw fork loop"] = partial(measure_fork_loop, settings.seconds, size)
    with running(settings, *arms.values()):
        in_turn(settings, section, measures)
    return section


def payloads(settings: Settings) -> Section:
    section = Section("payloads", "echo of various sizes, 16 outstanding, strict")
    sizes = (100, 100_000) if settings.is_quick else (100, 1_000, 10_000, 100_000, 1_000_000)
    arms = {name: sandbox(settings.folder / name[:5], name) for name in ("call", "calls:1000")}
    with running(settings, *arms.values()):
        in_turn(
            settings,
            section,
            {
                (name, f"{size:,} bytes"): partial(peer.measure, settings.seconds, echo(16, size))
                for name, peer in arms.items()
                for size in sizes
            },
        )
    return section


def _why_not(peer: Peer) -> str:
    """Try whether this machine can do this; "" if it can."""
    try:
        peer.start()
    except PeerGone as error:
        lines = [line for line in str(error).splitlines() if line.startswith("error: ")]
        return (lines or ["it does not start"])[0].removeprefix("error: ")
    else:
        return ""
    finally:
        peer.stop()


def _measured(settings: Settings, section: Section, arms: dict[str, Peer], apart: bool) -> Section:
    cases: Measures = {}
    for arm, peer in arms.items():
        if apart:
            cases[arm, APART] = partial(peer.measure_apart, settings.seconds, echo(1))
        cases[arm, AT_64] = partial(peer.measure, settings.seconds, echo(64))
    with running(settings, *arms.values()):
        in_turn(settings, section, cases)
    return section
