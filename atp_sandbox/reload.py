"""What a reload changes, and whose turn it is. PURE.

Settings are the operator's: a toolkit's code decides what it registers, and nothing of what it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from atp_sandbox.settings import ServeSettings

_SHOWN = {
    "base_url": "url",
    "grace_s": "grace",
    "reloads": "reload",
}
"""Fields whose key in the configuration is another word."""
_UNSAID = frozenset({"api_key", "only_client"})
"""Of the backend: the key itself is read once, from what may be a pipe."""
_TAKEN_OVER = frozenset({"grace_s", "reloads"})
"""Of the options: they are looked at when they are needed."""


def needs_restart(old: ServeSettings, new: ServeSettings) -> tuple[str, ...]:
    """What differs and cannot be taken over while serving, as the configuration calls it."""
    found = []
    for table, before, after, left_out in (
        ("backend", old.backend, new.backend, _UNSAID),
        ("serve", old.options, new.options, _TAKEN_OVER),
    ):
        for one in fields(before):
            if one.name in left_out or getattr(before, one.name) == getattr(after, one.name):
                continue
            key = _SHOWN.get(one.name, one.name).replace("_", "-")
            found.append(f"[{table}] {key}")
    return tuple(found)


@dataclass(frozen=True, slots=True)
class ToolChanges:
    """Names of the tools that differ between two versions of one toolkit, each sorted."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    @property
    def to_register(self) -> frozenset[str]:
        """What the backend does not know, or knows otherwise."""
        return frozenset(self.added + self.changed)


def tool_changes(before: Mapping[str, object], after: Mapping[str, object]) -> ToolChanges:
    """From tool to what the backend is told of it, before and after."""
    return ToolChanges(
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(sorted(n for n in after.keys() & before.keys() if after[n] != before[n])),
    )


@dataclass(slots=True)
class _Turn:
    tells_unchanged: bool
    is_asked_again: bool = False
    tells_unchanged_again: bool = False


class Turns:
    """Whose reload may begin: one at a time for each toolkit, and what was asked last counts.

    However often a reload is asked for while one runs, one more follows it.
    """

    def __init__(self) -> None:
        self._running: dict[str, _Turn] = {}

    def ask(self, name: str, *, tells_unchanged: bool) -> bool:
        """Whether the reload of `name` is to begin now; otherwise `end` will say so."""
        turn = self._running.get(name)
        if turn is None:
            self._running[name] = _Turn(tells_unchanged)
            return True
        turn.is_asked_again = True
        turn.tells_unchanged_again |= tells_unchanged
        return False

    def tells_unchanged(self, name: str) -> bool:
        """Whether somebody waits to hear that nothing has changed."""
        return self._running[name].tells_unchanged

    def end(self, name: str) -> bool:
        """The reload of `name` is over; whether the next one is to begin."""
        turn = self._running.pop(name)
        if turn.is_asked_again:
            self._running[name] = _Turn(turn.tells_unchanged_again)
        return turn.is_asked_again
