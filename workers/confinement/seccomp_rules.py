"""The words in which a system call filter is written down: actions, argument tests, groups. PURE.

A `Profile` is a list of groups; a `Group` names system calls that are treated alike, and why. For a
call, the group's cases are tried in order, then the group's action holds; a call that no group
names gets the profile's `unlisted` action. `seccomp.compile_profile` makes the kernel's program.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

ALLOW = 0x7FFF0000
KILL_PROCESS = 0x80000000
_ERRNO = 0x00050000

LOW_HALF = 0xFFFFFFFF
OWN_PID = 0x64697021
"""Stands in an `Arg` for the id of the process that installs the filter; above any real one."""


def fails_with(number: int) -> int:
    """The action that skips the call and gives it this errno."""
    return _ERRNO | number


EPERM = fails_with(errno.EPERM)
ENOSYS = fails_with(errno.ENOSYS)


class Arg(NamedTuple):
    """A test of one argument: its lower 32 bits under `mask` are one of `values`.

    Most arguments are C ints, of which the kernel drops the upper half itself: comparing that half
    too would let `value | 1 << 32` slip past (CVE-2019-10063). `whole` is for longs and pointers:
    the upper half must be zero. `least` asks for at least the one value instead.
    """

    position: int
    values: tuple[int, ...]
    mask: int = LOW_HALF
    whole: bool = False
    least: bool = False


def equals(position: int, *values: int, mask: int = LOW_HALF, whole: bool = False) -> Arg:
    """The argument at `position`, an int (a long if `whole`), under `mask`, is one of `values`."""
    return Arg(position, tuple(v & LOW_HALF for v in values), mask & LOW_HALF, whole)


def at_least(position: int, value: int) -> Arg:
    """The argument at `position`, taken as unsigned int, is `value` or more."""
    return Arg(position, (value & LOW_HALF,), least=True)


class Case(NamedTuple):
    """What is done if all tests hold."""

    action: int
    tests: tuple[Arg, ...]


def when(action: int, *tests: Arg) -> Case:
    """`action`, if all `tests` hold."""
    return Case(action, tests)


class Group(NamedTuple):
    """System calls that are treated alike, and why."""

    name: str
    why: str
    calls: str
    """Their names, separated by blanks; those that a machine lacks are skipped there."""
    action: int = ALLOW
    cases: tuple[Case, ...] = ()


class Probe(NamedTuple):
    """A harmless call whose errno tells that the filter is there; without it, another errno."""

    call: str
    arguments: tuple[int, ...]
    errno: int


class Profile(NamedTuple):
    """One layer: what a process may ask of the kernel from the moment it is installed."""

    name: str
    groups: tuple[Group, ...]
    unlisted: int
    probes: tuple[Probe, ...]
