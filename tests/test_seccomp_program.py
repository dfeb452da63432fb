"""The compiled filters against their tables, in an interpreter of classic BPF of our own. PURE."""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.confinement import seccomp_profiles
from workers.confinement.seccomp import compile_profile
from workers.confinement.seccomp_rules import (
    ALLOW,
    EPERM,
    KILL_PROCESS,
    OWN_PID,
    Arg,
    Group,
    Profile,
    at_least,
    equals,
    fails_with,
    when,
)
from workers.confinement.syscall_numbers import NUMBERS

PROFILES = {
    profile.name: profile
    for profile in (
        seccomp_profiles.ZYGOTE,
        seccomp_profiles.SUBPROCESS,
        seccomp_profiles.WORKER,
        seccomp_profiles.LONE,
        *(
            seccomp_profiles.without_namespaces(base, has_signal_scope=has_scope)
            for base in (seccomp_profiles.ZYGOTE, seccomp_profiles.SUBPROCESS)
            for has_scope in (True, False)
        ),
    )
}
ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
I386 = 0x40000003
MANY = 700
"""Further than any number that a kernel has given out."""

Arguments = tuple[int, ...]
NONE: Arguments = (0,) * 6


def run(program: bytes, number: int, arch: int, arguments: Arguments) -> int:
    """What the kernel would do: filter.rst, and seccomp_check_filter's subset of it."""
    data = struct.pack("<IIQ6Q", number, arch, 0, *(a & (1 << 64) - 1 for a in arguments))
    code = list(struct.iter_unpack("<HBBI", program))
    at, word = 0, 0
    while True:
        operation, yes, no, value = code[at]
        at += 1
        if operation == 0x06:
            return int(value)
        if operation == 0x20:
            assert value % 4 == 0
            (word,) = struct.unpack_from("<I", data, value)
        elif operation == 0x54:
            word &= value
        elif operation == 0x05:
            at += value
        elif operation == 0x15:
            at += yes if word == value else no
        elif operation == 0x35:
            at += yes if word >= value else no
        else:
            raise AssertionError(f"not a filter's instruction: {operation:#x}")


def action_in_table(profile: Profile, machine: str, number: int, arguments: Arguments) -> int:
    """The answer as the data states it, without any of the compiler."""
    names = {name for name, n in NUMBERS[machine].items() if n == number}
    for group in profile.groups:
        if names & set(group.calls.split()):
            for case in group.cases:
                if all(holds(test, arguments[test.position]) for test in case.tests):
                    return case.action
            return group.action
    return profile.unlisted


def holds(test: Arg, argument: int) -> bool:
    argument &= (1 << 64) - 1
    low = argument & 0xFFFFFFFF & test.mask
    if test.whole and argument >> 32:
        return False
    return low >= test.values[0] if test.least else low in test.values


def numbers_of(group: Group, machine: str) -> set[int]:
    return {NUMBERS[machine][n] for n in group.calls.split() if n in NUMBERS[machine]}


def telling_arguments(profile: Profile, number: int, machine: str) -> list[Arguments]:
    """Arguments at, beside and above (in the upper half) each value that the group looks at."""
    vectors = [NONE, (-1,) * 6]
    for group in profile.groups:
        if number not in numbers_of(group, machine):
            continue
        for case in group.cases:
            fitting = list(NONE)
            for test in case.tests:
                fitting[test.position] = test.values[0]
            for test in case.tests:
                for value in test.values:
                    for near in (value, value - 1, value + 1, value | 1 << 32, value | -1 << 32):
                        vector = list(fitting)
                        vector[test.position] = near
                        vectors.append(tuple(vector))
    return vectors


@pytest.mark.parametrize("machine", ARCHES)
@pytest.mark.parametrize("name", PROFILES)
def test_every_number_gets_the_action_of_the_table(name: str, machine: str) -> None:
    profile = PROFILES[name]
    program = compile_profile(profile, machine)
    for number in range(MANY):
        for arguments in telling_arguments(profile, number, machine):
            expected = action_in_table(profile, machine, number, arguments)
            got = run(program, number, ARCHES[machine], arguments)
            assert got == expected, (number, arguments, hex(got), hex(expected))


words = st.one_of(
    st.integers(0, 64), st.integers(0, (1 << 64) - 1), st.integers(0, 63).map(lambda bit: 1 << bit)
)


@given(
    st.sampled_from(sorted(PROFILES)),
    st.sampled_from(sorted(ARCHES)),
    st.integers(0, MANY),
    st.tuples(words, words, words, words, words, words),
)
def test_any_arguments_get_the_action_of_the_table(
    name: str, machine: str, number: int, arguments: Arguments
) -> None:
    profile = PROFILES[name]
    program = compile_profile(profile, machine)
    expected = action_in_table(profile, machine, number, arguments)
    assert run(program, number, ARCHES[machine], arguments) == expected


@pytest.mark.parametrize("machine", ARCHES)
@pytest.mark.parametrize("name", PROFILES)
def test_a_call_of_another_architecture_ends_the_process(name: str, machine: str) -> None:
    program = compile_profile(PROFILES[name], machine)
    others = {I386, 0x40000028, *ARCHES.values()} - {ARCHES[machine]}
    for arch in others:
        for number in (0, 20, 39, 172, MANY):
            assert run(program, number, arch, NONE) == KILL_PROCESS


@pytest.mark.parametrize("name", PROFILES)
def test_x32_numbers_end_the_process(name: str) -> None:
    program = compile_profile(PROFILES[name], "x86_64")
    for number in (0x40000000, 0x40000000 | 39, 0x40000000 | 520, 0x7FFFFFFF, 0xFFFFFFFF):
        assert run(program, number, ARCHES["x86_64"], NONE) == KILL_PROCESS


@pytest.mark.parametrize("name", ["zygote", "subprocess"])
def test_a_call_that_does_not_exist_yet_is_unknown(name: str) -> None:
    for machine in ARCHES:
        program = compile_profile(PROFILES[name], machine)
        newest = max(NUMBERS[machine].values())
        for number in (newest + 1, 600, 0x3FFFFFFF):
            assert run(program, number, ARCHES[machine], NONE) == fails_with(errno.ENOSYS)


def test_an_ioctl_is_known_by_its_lower_half() -> None:
    program = compile_profile(seccomp_profiles.ZYGOTE, "x86_64")
    ioctl = NUMBERS["x86_64"]["ioctl"]
    for request in (0x5412, 0x5412 | 1 << 32, 0x5412 | -1 << 32):  # TIOCSTI
        assert run(program, ioctl, ARCHES["x86_64"], (0, request, 0, 0, 0, 0)) == EPERM


def test_a_pointer_is_looked_at_whole() -> None:
    program = compile_profile(seccomp_profiles.ZYGOTE, "x86_64")
    prlimit = NUMBERS["x86_64"]["prlimit64"]
    assert run(program, prlimit, ARCHES["x86_64"], (5, 0, 0, 0, 0, 0)) == ALLOW
    assert run(program, prlimit, ARCHES["x86_64"], (5, 0, 1 << 32, 0, 0, 0)) == EPERM


def test_no_group_gives_a_call_a_second_treatment() -> None:
    twice = Profile("twice", (Group("a", "", "read"), Group("b", "", "write read")), ALLOW, ())
    with pytest.raises(ValueError, match="repeats a call"):
        compile_profile(twice, "x86_64")


def test_a_misspelt_call_is_not_skipped() -> None:
    with pytest.raises(ValueError, match="no such call"):
        compile_profile(Profile("typo", (Group("a", "", "raed"),), ALLOW, ()), "x86_64")


def test_an_unknown_machine_is_said_to_be_one() -> None:
    with pytest.raises(OSError, match="machine riscv64") as caught:
        compile_profile(seccomp_profiles.WORKER, "riscv64")
    assert caught.value.errno == errno.ENOSYS


def test_jumps_over_more_than_a_byte_can_say_arrive() -> None:
    cases = tuple(when(fails_with(1 + n), equals(n % 6, n, mask=0xFFFF)) for n in range(400))
    groups = tuple(
        Group(call, "", call, ALLOW, cases[:n]) for n, call in ((400, "read"), (1, "open"))
    )
    profile = Profile(
        "long",
        (*groups, Group("kill", "", "kill", EPERM, (when(ALLOW, at_least(0, 9)),))),
        ALLOW,
        (),
    )
    program = compile_profile(profile, "x86_64")
    for n in (0, 1, 77, 300, 399):
        arguments = tuple(n if i == n % 6 else 0xFFFFF for i in range(6))
        assert run(program, 0, ARCHES["x86_64"], arguments) == fails_with(1 + n)
    assert run(program, 62, ARCHES["x86_64"], (8, 0, 0, 0, 0, 0)) == EPERM


def test_every_group_says_why() -> None:
    for profile in PROFILES.values():
        assert all(group.name and group.why for group in profile.groups)


def test_layers_stay_small() -> None:
    """A worker's layer is installed for each call; the kernel takes at most 4,096 instructions."""
    sizes = {name: len(compile_profile(p, "x86_64")) // 8 for name, p in PROFILES.items()}
    assert sizes["worker"] <= 64
    assert sizes["zygote"] <= 400


def test_the_place_of_the_own_pid_is_never_a_real_pid() -> None:
    assert OWN_PID > 1 << 22  # PID_MAX_LIMIT


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_numbers_are_those_of_the_kernel_headers(machine: str, header: str) -> None:
    if not os.path.exists(header):
        pytest.skip(f"no {header}: Debian's linux-libc-dev is not installed for this machine")
    text = Path(header).read_text(encoding="utf-8")
    listed: list[tuple[str, str]] = re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", text)
    # Left out: 32-bit machines' calls with 64-bit times, and names that only number a range.
    skipped = {"syscalls", "arch_specific_syscall", "sync_file_range2"}
    renamed = {"fstatat": "newfstatat"} if machine == "aarch64" else {}
    newest = max(NUMBERS[machine].values())
    compared = 0
    for name, number in listed:
        if name not in skipped and not 403 <= int(number) <= 423 and int(number) <= newest:
            assert NUMBERS[machine][renamed.get(name, name)] == int(number), name
            compared += 1
    assert compared > 300
