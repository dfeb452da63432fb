"""Which faults are made in which order: all of it follows from one seed.

PURE. What is drawn are numbers; who is meant by them (the third of five workers, say) is found out
when the fault is made, since that depends on the machine.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    CUT = "cut"
    RESET = "reset"
    CLOSE = "close"
    STALL = "stall"
    HALF_FRAME = "half a frame"
    SILENCE = "silence"
    REFUSE = "refuse"

    KILL_PROCESS = "kill process"
    STOP_PROCESS = "stop process"
    STOP_SUPERVISOR = "stop supervisor"
    NO_DESCRIPTORS = "no descriptors"
    NO_PROCESSES = "no processes"
    FULL_DISK = "full disk"
    CLOCK = "clock"
    DRAIN = "drain"

    KILL_SUPERVISOR = "kill supervisor"
    CRASH_POINT = "crash point"


CONNECTION_FAULTS = {
    Kind.CUT: 5,
    Kind.RESET: 5,
    Kind.CLOSE: 4,
    Kind.STALL: 3,
    Kind.HALF_FRAME: 2,
    Kind.SILENCE: 2,
    Kind.REFUSE: 1,
}
"""Each costs one connection; with weights."""
MACHINE_FAULTS = {
    Kind.KILL_PROCESS: 8,
    Kind.STOP_PROCESS: 4,
    Kind.STOP_SUPERVISOR: 3,
    Kind.NO_DESCRIPTORS: 2,
    Kind.NO_PROCESSES: 2,
    Kind.FULL_DISK: 2,
    Kind.CLOCK: 2,
    Kind.DRAIN: 2,
}
DEATHS = {Kind.KILL_SUPERVISOR: 2, Kind.CRASH_POINT: 1}
PER_MACHINE_FAULT = 6
"""Reconnects and deaths to one machine fault."""
CLOSE_CODES = (1000, 1001, 1002, 1008, 1011, 1012, 1013, 4000)
ROLES = ("worker", "worker", "worker", "worker", "zygote", "warden", "egress")
CRASH_POINTS = (
    "after-accept",
    "after-journal",
    "after-start",
    "after-result",
    "before-send",
    "after-send",
)
CLOCK_JUMPS_S = (-86_400.0, -3_600.0, -5.0, 5.0, 3_600.0, 86_400.0 * 40)


@dataclass(frozen=True, slots=True)
class Planned:
    """One fault; a kind uses those of the numbers that it needs."""

    kind: Kind
    gap_s: float
    """Without any fault before it."""
    seconds: float
    """How long it lasts."""
    pick: float
    """From 0 to 1: which one of those there are."""
    code: int = 1000
    role: str = "worker"
    point: str = "after-accept"
    count: int = 1
    jump_s: float = 0.0

    def __str__(self) -> str:
        detail = {
            Kind.CLOSE: str(self.code),
            Kind.KILL_PROCESS: self.role,
            Kind.STOP_PROCESS: self.role,
            Kind.CRASH_POINT: f"{self.point}:{self.count}",
            Kind.CLOCK: f"{self.jump_s:+.0f} s",
        }.get(self.kind, "")
        return f"{self.kind} {detail}".rstrip()


def schedule(
    seed: int, *, reconnects: int, kills: int, without: Sequence[Kind] = ()
) -> list[Planned]:
    """So many lost connections and deaths of the supervisor, and machine faults among them.

    `without`: what cannot be made here, left out without changing anything else.
    """
    draw = random.Random(seed)
    connection_faults = max(0, reconnects - kills)
    kinds = draw.choices(
        list(CONNECTION_FAULTS), list(CONNECTION_FAULTS.values()), k=connection_faults
    )
    kinds += draw.choices(list(DEATHS), list(DEATHS.values()), k=kills)
    machine_faults = (connection_faults + kills) // PER_MACHINE_FAULT
    kinds += draw.choices(list(MACHINE_FAULTS), list(MACHINE_FAULTS.values()), k=machine_faults)
    draw.shuffle(kinds)
    return [planned for kind in kinds if (planned := _draw(draw, kind)).kind not in without]


def _draw(draw: random.Random, kind: Kind) -> Planned:
    return Planned(
        kind,
        gap_s=draw.choice((0.0, 0.02, 0.05, 0.1, 0.2, 0.4)),
        seconds=draw.choice((0.05, 0.1, 0.3, 0.6)),
        pick=draw.random(),
        code=draw.choice(CLOSE_CODES),
        role=draw.choice(ROLES),
        point=draw.choice(CRASH_POINTS),
        count=draw.choice((1, 1, 2, 5, 20)),
        jump_s=draw.choice(CLOCK_JUMPS_S),
    )
