"""A bound on what waits, of which every member is sure of a part. PURE: no I/O, no clock.

Half of the bound is set aside in equal parts for the members; the other half is common. What a
member takes comes from its own part first, the rest from the common half. So:

- never more than the bound waits, and a single member may have all of it;
- however much the others take, a member's part is there for it;
- one call may take as much as is left of its member's part and of the common half together;
- a part is at least one call. With more members than the set-aside half has calls, those that come
  first have one each, for as long as that half lasts.
"""

from __future__ import annotations

from atp_sandbox.outcome import Limit

OWN_QUEUE = "queue"
"""What may wait of one toolkit; its tools are the members."""
TOTAL_QUEUE = "total-queue"
"""What may wait of all toolkits; they are the members."""


class _Bound:
    """One quantity, shared out."""

    __slots__ = (
        "_common",
        "_common_used",
        "_from_common",
        "_from_part",
        "_part",
        "_parts_used",
        "_set_aside",
        "most",
    )

    def __init__(self, most: int) -> None:
        self.most = most
        self._from_part: dict[str, int] = {}
        """What each member has of its part, and of the common half."""
        self._from_common: dict[str, int] = {}
        self._parts_used = 0
        self._common_used = 0
        self.divide(1)

    def divide(self, members: int) -> None:
        half = self.most // 2
        self._part = max(1, half // members)
        self._set_aside = min(half, members * self._part)
        self._common = self.most - self._set_aside

    def has_room(self, member: str, amount: int) -> bool:
        if self._parts_used + self._common_used + amount > self.most:
            return False  # what was taken of larger parts, before they were divided anew
        rest = amount - self._own(member, amount)
        return self._common_used + rest <= self._common

    def take(self, member: str, amount: int) -> None:
        own = self._own(member, amount)
        self._from_part[member] = self._from_part.get(member, 0) + own
        self._parts_used += own
        rest = amount - own
        if rest:
            self._from_common[member] = self._from_common.get(member, 0) + rest
            self._common_used += rest

    def give_back(self, member: str, amount: int) -> None:
        # The common half first: it is of use to all.
        own, rest = amount, 0
        if common := self._from_common.get(member, 0):
            rest = min(amount, common)
            own = amount - rest
            self._from_common[member] = common - rest
            self._common_used -= rest
        self._from_part[member] = self._from_part.get(member, 0) - own
        self._parts_used -= own

    def _own(self, member: str, amount: int) -> int:
        """How much of `amount` comes from the member's part."""
        left = self._part - self._from_part.get(member, 0)
        aside = self._set_aside - self._parts_used
        if left > aside:
            left = aside
        if left >= amount:
            return amount
        return left if left > 0 else 0


class Shares:
    """A bound on calls and on their bytes."""

    def __init__(self, name: str, calls: int, size_bytes: int) -> None:
        """`name`: as an answer calls the bound that was hit. One member, until `divide`."""
        self._name = name
        self._calls = _Bound(calls)
        self._bytes = _Bound(size_bytes)

    def divide(self, members: int) -> None:
        """Share out among so many, at least one; what is taken stays taken."""
        self._calls.divide(members)
        self._bytes.divide(members)

    def missing(self, member: str, size_bytes: int) -> Limit | None:
        """The bound that keeps one more call of `member` out; None if there is room."""
        if not self._calls.has_room(member, 1):
            return Limit(self._name, self._calls.most, "calls")
        if not self._bytes.has_room(member, size_bytes):
            return Limit(self._name, self._bytes.most, "bytes")
        return None

    def take(self, member: str, size_bytes: int) -> None:
        """One call of `member` waits; only where nothing is `missing`."""
        self._calls.take(member, 1)
        self._bytes.take(member, size_bytes)

    def give_back(self, member: str, size_bytes: int) -> None:
        """A call that was taken waits no longer."""
        self._calls.give_back(member, 1)
        self._bytes.give_back(member, size_bytes)
