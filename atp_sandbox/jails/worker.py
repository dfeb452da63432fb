"""Our side of one worker process, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atp_sandbox.jails.cgroups import CallEvidence, CallGroup
from atp_sandbox.jails.channel import Channel
from atp_sandbox.jails.output import OutputPipe
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
        self.owes_answer = False
        self.has_served = False
        """Whether it was given a call; its group counts from its first word on."""
        self.on_measured: list[Callable[[bool], None]] = []

    def close(self) -> None:
        self.output.close()
        if self.channel is not None:
            self.channel.close()
        if self.handle is not None:
            self.handle.close()
