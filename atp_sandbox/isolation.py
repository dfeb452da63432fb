"""How a toolkit is confined: the level, and the layers that its operator does without. PURE values.

`strict` is the default and what SECURITY.md's claim is about. `container` is for inside an ordinary
container, where namespaces are forbidden: Landlock, system call filters, resource limits, and a
user of its own for root. `none` is for development: plain processes with timeouts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    STRICT = "strict"
    CONTAINER = "container"
    NONE = "none"


class Waivable(StrEnum):
    """A layer that an operator may do without, by name."""

    LANDLOCK = "landlock"
    SECCOMP = "seccomp"
    CGROUP = "cgroup"


WITHOUT = {
    Waivable.LANDLOCK: "one wall less between the calls of one toolkit",
    Waivable.SECCOMP: "every system call of the kernel is open to the toolkit",
    Waivable.CGROUP: "memory of calls is sampled every 20 ms, processes are limited per jail only",
}
"""What is lost with a layer, as half a sentence."""
_MAY_BE_WAIVED = {
    Level.STRICT: frozenset(Waivable),
    # Nothing but these two stands there between the toolkit and the machine's files and network.
    Level.CONTAINER: frozenset({Waivable.CGROUP}),
    Level.NONE: frozenset({Waivable.CGROUP}),
}


@dataclass(frozen=True, slots=True)
class Isolation:
    """A level and what is waived of it; ValueError if that level cannot do without it."""

    level: Level = Level.STRICT
    waived: frozenset[Waivable] = frozenset()

    def __post_init__(self) -> None:
        for layer in sorted(self.waived - _MAY_BE_WAIVED[self.level]):
            allowed = ", ".join(sorted(_MAY_BE_WAIVED[self.level]))
            raise ValueError(f"{layer} cannot be waived at isolation {self.level}, only {allowed}")

    def __str__(self) -> str:
        """`strict`, `strict without cgroup and seccomp`: for log lines and people."""
        return self.level + (f" without {' and '.join(sorted(self.waived))}" if self.waived else "")

    @property
    def has_namespaces(self) -> bool:
        return self.level is Level.STRICT

    @property
    def has_landlock(self) -> bool:
        return self.level is not Level.NONE and Waivable.LANDLOCK not in self.waived

    @property
    def has_seccomp(self) -> bool:
        return self.level is not Level.NONE and Waivable.SECCOMP not in self.waived

    @property
    def is_confined(self) -> bool:
        """Whether processes are unprivileged and limited: at all levels but `none`."""
        return self.level is not Level.NONE

    @property
    def may_use_cgroups(self) -> bool:
        return Waivable.CGROUP not in self.waived

    def requires_cgroups(self, *, is_root: bool) -> bool:
        """Whether a start without control groups fails: for root, who can have them, at `strict`.

        An ordinary user, and whoever is in a container already, gets samples instead; that is said.
        """
        return is_root and self.level is Level.STRICT and self.may_use_cgroups

    def layers(self, landlock_abi: int, cgroup_version: int) -> list[str]:
        """What confines the toolkit, for people; 0 for an ABI or version that is not there."""
        found = []
        if self.has_namespaces:
            found += ["namespaces", "a root directory of its own"]
        if self.is_confined:
            found += ["no capabilities", "resource limits"]
        if self.has_landlock:
            found.append(f"Landlock (ABI {landlock_abi})")
        if self.has_seccomp:
            found.append("seccomp")
        if cgroup_version:
            found.append(f"control groups (version {cgroup_version})")
        else:
            found.append("memory sampled every 20 ms")
        return found

    def warnings(self) -> list[str]:
        """What is not protected, a sentence each; empty for `strict` with nothing waived."""
        found = [f"waived {layer}: {WITHOUT[layer]}" for layer in sorted(self.waived)]
        if self.level is Level.CONTAINER:
            found.insert(
                0,
                "isolation container: no namespaces; Landlock and seccomp alone keep the toolkit "
                "from this machine",
            )
        elif self.level is Level.NONE:
            found.insert(
                0,
                "isolation NONE: the toolkit's code runs as this user and can do all that this "
                "user can; for development only",
            )
        return found


def parse_level(text: str) -> Level:
    """ValueError names the levels that there are."""
    try:
        return Level(text)
    except ValueError:
        raise ValueError(f"{text!r} is no isolation; write strict, container or none") from None


def parse_waived(names: Iterable[str]) -> frozenset[Waivable]:
    """ValueError names the layers that can be waived."""
    found = set()
    for name in names:
        try:
            found.add(Waivable(name))
        except ValueError:
            allowed = ", ".join(sorted(Waivable))
            raise ValueError(f"{name!r} cannot be waived; what can: {allowed}") from None
    return frozenset(found)
