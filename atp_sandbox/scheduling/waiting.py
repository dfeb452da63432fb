"""The calls of one toolkit that wait, and whose turn it is. PURE: no I/O, no clock.

Round robin between tools, so that a burst on one delays no other by more than a round; first come,
first served within a tool. All calls of a toolkit have the same time to live, so each tool's own
queue is in the order of deadlines.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from atp_sandbox.outcome import Limit
from atp_sandbox.scheduling.shares import Shares


class Call:
    """One call as the pool sees it; `payload` is the shell's."""

    __slots__ = ("deadline", "payload", "received_at", "size_bytes", "tool")

    def __init__(
        self,
        payload: object,
        *,
        tool: str,
        received_at: float,
        deadline: float,
        size_bytes: int,
    ) -> None:
        self.payload = payload
        self.tool = tool
        self.received_at = received_at
        self.deadline = deadline
        self.size_bytes = size_bytes


class WaitingCalls:
    """Bounded twice: by the toolkit's own queue and by that of all toolkits."""

    def __init__(self, own: Shares, total: Shares, toolkit: str) -> None:
        """`own` is shared between tools; `total` between toolkits, of which this is `toolkit`."""
        self._own = own
        self._total = total
        self._toolkit = toolkit
        self._tools: OrderedDict[str, deque[Call]] = OrderedDict()
        """Those of which calls wait; the first has the next turn."""
        self._count = 0
        self._earliest = math.inf
        """No call's deadline is before it. Exact when a look was taken, too early afterwards."""

    def __len__(self) -> int:
        return self._count

    @property
    def next_deadline(self) -> float | None:
        """When it is time to `take_expired`, at the latest; None if nothing waits."""
        return self._earliest if self._count else None

    def missing(self, call: Call) -> Limit | None:
        """The bound that keeps `call` from waiting; None if there is room."""
        return self._own.missing(call.tool, call.size_bytes) or self._total.missing(
            self._toolkit, call.size_bytes
        )

    def add(self, call: Call) -> None:
        """Only where nothing is `missing`."""
        self._own.take(call.tool, call.size_bytes)
        self._total.take(self._toolkit, call.size_bytes)
        if call.tool not in self._tools:
            self._tools[call.tool] = deque()
        self._tools[call.tool].append(call)
        self._count += 1
        self._earliest = min(self._earliest, call.deadline)

    def put_back(self, call: Call) -> None:
        """A call that was taken and did not begin waits again, before all others.

        It was within the bounds before, so it may go beyond them now.
        """
        self._own.take(call.tool, call.size_bytes)
        self._total.take(self._toolkit, call.size_bytes)
        if call.tool not in self._tools:
            self._tools[call.tool] = deque()
        self._tools[call.tool].appendleft(call)
        self._tools.move_to_end(call.tool, last=False)
        self._count += 1
        self._earliest = min(self._earliest, call.deadline)

    def take_next(self) -> Call:
        """The call whose turn it is; KeyError if none waits."""
        tool = next(iter(self._tools), "")
        self._tools.move_to_end(tool)
        return self._take_first(tool)

    def take_expired(self, now: float) -> list[Call]:
        """All whose deadline is over, the first of them first."""
        if now < self._earliest:
            return []
        expired = []
        for tool, calls in list(self._tools.items()):
            while calls and calls[0].deadline <= now:
                expired.append(self._take_first(tool))
        heads = (calls[0].deadline for calls in self._tools.values())
        self._earliest = min(heads, default=math.inf)
        expired.sort(key=lambda call: call.deadline)
        return expired

    def _take_first(self, tool: str) -> Call:
        calls = self._tools[tool]
        call = calls.popleft()
        if not calls:
            del self._tools[tool]
        self._count -= 1
        if not self._count:
            self._earliest = math.inf
        self._own.give_back(tool, call.size_bytes)
        self._total.give_back(self._toolkit, call.size_bytes)
        return call
