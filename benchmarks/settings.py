"""How long and how often is measured, and the measuring in turn that all parts share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from benchmarks.loads import echo
from benchmarks.measured import Measured
from benchmarks.peer import Peer
from benchmarks.statistics import Section

Measures = dict[tuple[str, str], Callable[[], Measured]]
"""By arm and case."""
OUTSTANDING = (1, 16, 64, 256)
LIFETIMES = ("call", "calls:1000", "jail")


@dataclass(frozen=True, slots=True)
class Settings:
    folder: Path
    """For the state of the systems under test; removed by whoever made it."""
    is_quick: bool = False
    """Only see that everything works; the figures say nothing."""
    on_progress: Callable[[str], None] = lambda _line: None

    @property
    def rounds(self) -> int:
        return 1 if self.is_quick else 3

    @property
    def seconds(self) -> float:
        """Of one measurement."""
        return 0.1 if self.is_quick else 1.5

    @property
    def outstanding(self) -> tuple[int, ...]:
        return (1, 64) if self.is_quick else OUTSTANDING


@contextlib.contextmanager
def running(settings: Settings, *peers: Peer, tools: Sequence[str] = ()) -> Iterator[None]:
    """The peers, connected and warm; ended afterwards. `tools`: which one each has to echo."""
    with contextlib.ExitStack() as stack:
        for peer, tool in zip_longest(peers, tools, fillvalue="echo"):
            assert isinstance(peer, Peer)
            stack.callback(peer.stop)
            peer.start()
            peer.measure(0.05 if settings.is_quick else 0.7, echo(16, tool=str(tool)))
        yield


def in_turn(settings: Settings, section: Section, measures: Measures) -> None:
    """Each (arm, case) once a round, and back again in the next: drift then meets all alike."""
    for number in range(settings.rounds):
        order = list(measures) if number % 2 == 0 else list(reversed(measures))
        for arm, case in order:
            measured = measures[arm, case]()
            section.row(arm, case).add_measured(measured)
            settings.on_progress(
                f"{section.name} {number + 1}/{settings.rounds}: {arm}, {case}: "
                f"{measured.rate:,.0f} calls/s"
            )
    order = list(measures)
    section.rows.sort(key=lambda row: order.index((row.arm, row.case)))
