"""System call filters: a profile becomes the kernel's program, is installed, and is seen to hold.

seccomp(2); Documentation/userspace-api/seccomp_filter.rst; for the instructions,
Documentation/networking/filter.rst. What is allowed is said in `seccomp_profiles`.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Sequence

from . import syscalls
from .seccomp_rules import KILL_PROCESS, LOW_HALF, OWN_PID, Arg, Group, Profile
from .syscall_numbers import NUMBERS

_LOAD, _AND, _JUMP, _RETURN = 0x20, 0x54, 0x05, 0x06  # ld abs word, and, ja, ret: constants
_IF_EQUAL, _IF_AT_LEAST = 0x15, 0x35
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_FARTHEST = 255
_X32_BIT = 0x40000000
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

_INSTRUCTION = struct.Struct("<HBBI")
_VALUE = struct.Struct("<I")
_VALUE_OFFSET = 4
_OWN_PID_BYTES = _VALUE.pack(OWN_PID)


def compile_profile(profile: Profile, machine: str) -> bytes:
    """The sock_filter array for `profile` on `machine`. PURE.

    The architecture is checked before the number, which means another call on another one
    (`int 0x80`), and x32's numbers are refused; both end the process. Numbers are then found by
    binary search, in at most ten steps: the kernel runs the program once for every number when it
    is installed, to learn which need never be run again (seccomp_cache_prepare, Linux 5.11).
    """
    if machine not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"seccomp: no system call numbers for machine {machine}")
    code = _Assembler()
    kill = code.do(KILL_PROCESS)
    start = _search(code, _ranges(code, profile, machine))
    if machine == "x86_64":
        start = code.branch(_IF_AT_LEAST, _X32_BIT, kill, start)
    start = code.load(_NUMBER, start)
    start = code.branch(_IF_EQUAL, _AUDIT_ARCH[machine], start, kill)
    return code.finish(code.load(_ARCH, start))


class Prepared:
    """A compiled program, ready for any child: what can be done before the fork is done."""

    def __init__(self, program: bytes) -> None:
        self._program = bytearray(program)
        self._filter = syscalls.SeccompFilter(self._program)
        self._pid_places = [
            place
            for place in range(_VALUE_OFFSET, len(program), _INSTRUCTION.size)
            if program.startswith(_OWN_PID_BYTES, place)
        ]

    def install(self) -> None:
        """Filter this thread, which must be the only one, and its children, for good.

        no_new_privs must be set. Raises OSError, and changes nothing, if the kernel refuses.
        """
        pid = os.getpid()
        for place in self._pid_places:
            _VALUE.pack_into(self._program, place, pid)
        self._filter.install()


def install(program: bytes) -> None:
    """Install a compiled program at once: see `Prepared`."""
    if struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, "seccomp: a 32-bit interpreter would be killed at once")
    Prepared(program).install()


def verify(profile: Profile, filters: int) -> None:
    """See that at least `filters` filters are on this process, `profile` the last; else OSError.

    Linux before 5.10 does not tell the number of filters; there the answers must do.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        status = dict(line.split(":\t", 1) for line in file if line.startswith("Seccomp"))
    mode, count = status.get("Seccomp", "?").strip(), status.get("Seccomp_filters", "").strip()
    if mode != "2" or (count and int(count) < filters):
        raise OSError(errno.EPROTO, f"seccomp: mode {mode} with {count or 'unknown'} filters")
    verify_answers(profile)


def verify_answers(profile: Profile) -> None:
    """See that forbidden calls are refused as `profile` says; else OSError. Needs no /proc."""
    for call, arguments, expected in profile.probes:
        number = NUMBERS[syscalls.MACHINE][call]
        got = syscalls.errno_of(number, *arguments)
        if got != expected:
            found, wanted = (errno.errorcode.get(n, "success") for n in (got, expected))
            text = f"seccomp: {profile.name} answers {call} with {found}, not {wanted}"
            raise OSError(errno.EPROTO, text)


class _Assembler:
    """Builds a program from its end, so that every target of a jump exists before the jump.

    A place is the number of instructions behind it. Equal instructions are made once.
    """

    def __init__(self) -> None:
        self._reversed: list[tuple[int, int, int, int]] = []
        self._known: dict[tuple[int, int, int, int], int] = {}
        self._near: dict[int, int] = {}

    def do(self, action: int) -> int:
        """Return from the program with `action`."""
        return self._place(_RETURN, action, 0, 0)

    def load(self, offset: int, after: int) -> int:
        """Load the 32-bit word at `offset` of seccomp_data, go on at `after`."""
        return self._place(_LOAD, offset, after, 0)

    def mask(self, mask: int, after: int) -> int:
        """Keep only the loaded word's bits in `mask`, go on at `after`."""
        return self._place(_AND, mask, after, 0)

    def branch(self, test: int, value: int, yes: int, no: int) -> int:
        """Go on at `yes` or at `no`, as `test` of the loaded word with `value` says."""
        return yes if yes == no else self._place(test, value, yes, no)

    def finish(self, start: int) -> bytes:
        """The program that begins at `start`, the place made last."""
        assert start == len(self._reversed) - 1
        return b"".join(_INSTRUCTION.pack(*row) for row in reversed(self._reversed))

    def _place(self, code: int, value: int, first: int, second: int) -> int:
        wanted = (code, value, first, second)
        if wanted not in self._known:
            if code in (_LOAD, _AND):
                self._bring_next(first)
                row = (code, 0, 0, value)
            elif code == _RETURN:
                row = (code, 0, 0, value)
            else:
                first, second = self._bring_near(first, 1), self._bring_near(second, 0)
                row = (code, self._distance(first), self._distance(second), value)
            self._known[wanted] = len(self._reversed)
            self._reversed.append(row)
        return self._known[wanted]

    def _distance(self, place: int) -> int:
        return len(self._reversed) - 1 - place

    def _bring_next(self, place: int) -> None:
        if self._distance(place):
            self._reversed.append((_JUMP, 0, 0, self._distance(place)))

    def _bring_near(self, place: int, to_come: int) -> int:
        """A place as good as `place` that `to_come` more instructions do not bring out of reach."""
        near = self._near.get(place, place)
        if self._distance(near) + to_come > _FARTHEST:
            row = self._reversed[place]
            # A return is as short as a jump to it.
            row = row if row[0] == _RETURN else (_JUMP, 0, 0, self._distance(place))
            near = self._near[place] = len(self._reversed)
            self._reversed.append(row)
        return near


def _ranges(code: _Assembler, profile: Profile, machine: str) -> list[tuple[int, int]]:
    """(first number, place of the code for it and those after it), in order, from 0 on."""
    treatment: dict[int, int] = {}
    known_anywhere = set().union(*NUMBERS.values())
    for group in profile.groups:
        names = group.calls.split()
        unknown = [name for name in names if name not in known_anywhere]
        if unknown:
            raise ValueError(f"seccomp profile {profile.name}: no such call: {unknown}")
        numbers = [NUMBERS[machine][name] for name in names if name in NUMBERS[machine]]
        if any(number in treatment for number in numbers):
            raise ValueError(f"seccomp profile {profile.name}: group {group.name} repeats a call")
        if numbers:
            treatment.update(dict.fromkeys(numbers, _group_code(code, group)))
    unlisted = code.do(profile.unlisted)
    ranges: list[tuple[int, int]] = []
    for number in range(max(treatment) + 2):
        place = treatment.get(number, unlisted)
        if not ranges or ranges[-1][1] != place:
            ranges.append((number, place))
    return ranges


def _search(code: _Assembler, ranges: Sequence[tuple[int, int]]) -> int:
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    above = _search(code, ranges[middle:])
    below = _search(code, ranges[:middle])
    return code.branch(_IF_AT_LEAST, ranges[middle][0], above, below)


def _group_code(code: _Assembler, group: Group) -> int:
    place = code.do(group.action)
    for case in reversed(group.cases):
        place = _tests_code(code, case.tests, code.do(case.action), place)
    return place


def _tests_code(code: _Assembler, tests: Iterable[Arg], yes: int, no: int) -> int:
    for test in reversed(tuple(tests)):
        low = _ARGUMENTS + 8 * test.position  # both machines are little-endian
        place = no
        for value in reversed(test.values):
            place = code.branch(_IF_AT_LEAST if test.least else _IF_EQUAL, value, yes, place)
        if test.mask != LOW_HALF:
            place = code.mask(test.mask, place)
        yes = code.load(low, place)
        if test.whole:
            yes = code.load(low + 4, code.branch(_IF_EQUAL, 0, yes, no))
    return yes
