"""What one connection may move and how long it may rest: counted here, ended by raising."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.meter import Meter
from atp_sandbox.limits import format_duration, format_size
from atp_sandbox.policy import EgressLimits


class Bounds:
    """The limits of a connection, and what of them is used up."""

    def __init__(self, limits: EgressLimits, meter: Meter) -> None:
        self._limits = limits
        self._meter = meter

    def count_sent(self, size: int) -> None:
        """Before they are sent on; Denied beyond the limit."""
        self._meter.sent_bytes += size
        self._check()

    def count_received(self, size: int) -> None:
        self._meter.received_bytes += size
        self._check()

    def _check(self) -> None:
        if self._moved > self._limits.bytes:
            raise Denied(f"took more than {format_size(self._limits.bytes)} on one connection")

    @property
    def _moved(self) -> int:
        return self._meter.sent_bytes + self._meter.received_bytes

    async def keep(self, *ways: Coroutine[Any, Any, None], until_all: bool = True) -> None:
        """Run both ways of a connection until all, or the last, has ended, or it rests too long.

        The first Denied or Failed of any ends them; else the first OSError.
        """
        try:
            async with asyncio.TaskGroup() as group:
                watch = group.create_task(self._end_when_idle())
                tasks = [group.create_task(way) for way in ways]
                await asyncio.wait(tasks if until_all else tasks[-1:])
                for task in (watch, *tasks):
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise _telling(errors) from None

    async def _end_when_idle(self) -> None:
        seen = -1
        while seen != (seen := self._moved):
            await asyncio.sleep(self._limits.idle_s)
        raise Failed(f"was idle for {format_duration(self._limits.idle_s)}")


def _telling(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one that says why: ours before the kernel's."""
    ours = (error for error in errors.exceptions if isinstance(error, (Denied, Failed)))
    return next(ours, errors.exceptions[0])
