"""Our side of one worker process, and how it ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from atp_sandbox.jails.cgroups import CallEvidence, CallGroup
from atp_sandbox.jails.channel import Channel
from atp_sandbox.jails.output import OutputPipe
from atp_sandbox.jails.permits import Permits
from atp_sandbox.jails.processes import ProcessHandle


@dataclass(frozen=True, slots=True)
class Exited:
    """How a process ended, from the one who reaped it. `status` as of waitpid(2)."""

    status: int
    cpu_s: float
    peak_bytes: int
    scratch_was_full: bool = False
    """Known only of a process that ended without an answer."""
    counted: CallEvidence | None = None
    """What its control group counted for the call that it did not answer; else None."""


class Worker:
    """Our side of one worker process; owns its channel, output pipe and handle."""

    def __init__(self, number: int, slot: int, output: OutputPipe, *, is_zygote: bool) -> None:
        self.number = number
        self.slot = slot
        self.is_zygote = is_zygote
        self.output = output
        self.channel: Channel | None = None
        self.handle: ProcessHandle | None = None
        self.inner_pid = 0
        self.group: CallGroup | None = None
        self.is_gone = False
        """It spoke, and had ended before it could be identified."""
        self.exited: Exited | None = None
        self.permits: Permits | None = None
        """Only of a worker for more than one call."""
        self.due: list[bytes] = []
        """Frames of calls that leave at the end of this turn."""
        self.handed: deque[bytes] = deque()
        """Ids of the calls that it has, or that are due."""
        self.has_served = False
        """Whether it was given a call; its group counts from its first word on."""
        self.on_measured: list[Callable[[bool], None]] = []

    @property
    def owes_answer(self) -> bool:
        return bool(self.handed)

    def take_back(self) -> int:
        """How many of the last calls it has not begun, and never will."""
        count = len(self.due)
        self.due.clear()
        for _ in range(count):
            self.handed.pop()
        if self.permits is not None and self.handed:
            not_begun = self.permits.take_back(list(self.handed))
            for _ in range(not_begun):
                self.handed.pop()
            count += not_begun
        return count

    def close(self) -> None:
        self.output.close()
        if self.permits is not None:
            self.permits.close()
        if self.channel is not None:
            self.channel.close()
        if self.handle is not None:
            self.handle.close()
