"""System call filters on this kernel, by trying: what a confined process is refused, and what works.

Each attempt runs in a child of its own, once under the filter and once without, where it has to end
otherwise: else something other than the filter refused it, and the case proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import http.server
import importlib.util
import json
import mmap
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from workers.confinement import seccomp, seccomp_profiles, syscalls
from workers.confinement.seccomp_profiles import LONE_WORKER, SUBPROCESS, WORKER, ZYGOTE
from workers.confinement.seccomp_rules import ALLOW, Group, Profile
from workers.confinement.syscall_numbers import NUMBERS

MACHINE = platform.machine()
pytestmark = [
    pytest.mark.skipif(MACHINE not in NUMBERS, reason=f"no filters for machine {MACHINE}"),
    # The children only make system calls and end with _exit; nothing of another thread is used.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]
only_x86_64 = pytest.mark.skipif(MACHINE != "x86_64", reason="an entry that only x86-64 has")

Profiles = Sequence[Profile]
BASE: Profiles = (ZYGOTE,)
FREER: Profiles = (SUBPROCESS,)
BOTH: Profiles = (ZYGOTE, WORKER)
LONE: Profiles = (ZYGOTE, LONE_WORKER)
OPEN: Profiles = ()
DIED = -1


def in_child(profiles: Profiles, attempt: Callable[[], Any]) -> Any:
    """What `attempt` returns, as JSON, in a child under `profiles`; minus the signal that ended it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            for profile in profiles:
                seccomp.install(seccomp.compile_profile(profile, MACHINE))
            answer = attempt()
        except OSError as error:
            answer = error.errno
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        text = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return json.loads(text) if text else status


def call(name: str, *arguments: int) -> int:
    """The errno of one system call by name; 0 for success."""
    return syscalls.errno_of(NUMBERS[MACHINE][name], *arguments)


def refused(profiles: Profiles, attempt: Callable[[], Any], expected: int, bites: bool = True) -> None:
    """`attempt` ends in errno `expected` under `profiles`, and (`bites`) otherwise without."""
    assert in_child(profiles, attempt) == expected
    if bites:
        assert in_child(OPEN, attempt) != expected


# -- the table, call by call -----------------------------------------------------------------------

UNREFUSED = {"fork", "vfork"}
"""Refused like the rest, but not to be tried with senseless arguments: they would succeed."""
GENTLE: dict[str, tuple[int, ...]] = {
    "msgget": (0x7A7A7A7A, 0),  # all bits set would make a queue
    "sync": (),
}


def refused_by_name(profile: Profile) -> list[tuple[str, int]]:
    """(call, errno) of every group that refuses whatever the arguments."""
    found = []
    for group in profile.groups:
        if not group.cases and group.action != ALLOW:
            found += [(name, group.action & 0xFFFF) for name in group.calls.split()]
    return [row for row in found if row[0] in NUMBERS[MACHINE] and row[0] not in UNREFUSED]


def answers_of(profiles: Profiles, names: Sequence[str]) -> dict[str, int]:
    """The errno of each call with all bits set in each argument, which no call can make sense of."""

    def attempt() -> dict[str, int]:
        return {name: call(name, *GENTLE.get(name, (-1,) * 6)) for name in names}

    answer = in_child(profiles, attempt)
    assert isinstance(answer, dict), answer
    return answer


@pytest.mark.parametrize(("profiles", "layer"), [(BASE, ZYGOTE), (FREER, SUBPROCESS), (BOTH, WORKER)])
def test_every_call_that_is_refused_by_name_is_refused(profiles: Profiles, layer: Profile) -> None:
    expected = dict(refused_by_name(layer))
    assert answers_of(profiles, list(expected)) == expected


def test_no_refusal_by_name_is_only_the_kernels_own() -> None:
    if os.geteuid() != 0:
        pytest.skip("without root many of them are EPERM anyway: nothing could be told apart")
    expected = {**dict(refused_by_name(ZYGOTE)), **dict(refused_by_name(WORKER))}
    unfiltered = answers_of(OPEN, list(expected))
    # Taken out of the kernel, or out of this one.
    gone = {name for name, number in unfiltered.items() if number == errno.ENOSYS}
    assert {name for name in expected if unfiltered[name] == expected[name]} - gone == set()
    assert len(expected) > 80


@pytest.mark.parametrize("profile", [ZYGOTE, SUBPROCESS])
def test_an_unknown_call_answers_as_an_older_kernel_would(profile: Profile) -> None:
    number = NUMBERS[MACHINE]["cachestat"]  # known here (Linux 6.5), named by no profile
    assert in_child((profile,), lambda: syscalls.errno_of(number, -1, 0, 0, 0)) == errno.ENOSYS
    assert in_child((profile,), lambda: syscalls.errno_of(999)) == errno.ENOSYS


# -- other entries to the kernel -------------------------------------------------------------------

GETPID_BY_INT_80 = bytes.fromhex("53 b8 14 00 00 00 cd 80 5b c3")


def run_machine_code(code: bytes) -> int:
    memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return int(ctypes.CFUNCTYPE(ctypes.c_long)(address)())


@only_x86_64
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH, (WORKER,), (LONE_WORKER,)])
def test_a_32_bit_system_call_ends_the_process(profiles: Profiles) -> None:
    def attempt() -> bool:
        return run_machine_code(GETPID_BY_INT_80) == os.getpid()

    assert in_child(profiles, attempt) == -signal.SIGSYS
    unfiltered = in_child(OPEN, attempt)
    if unfiltered == -signal.SIGSEGV:
        pytest.skip("this kernel has no IA32 emulation: there is nothing to get past the filter")
    assert unfiltered is True


@only_x86_64
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_an_x32_system_call_ends_the_process(profiles: Profiles) -> None:
    def attempt() -> int:
        return syscalls.errno_of(0x40000000 | NUMBERS["x86_64"]["getpid"])

    assert in_child(profiles, attempt) == -signal.SIGSYS
    assert in_child(OPEN, attempt) in (0, errno.ENOSYS)  # with or without CONFIG_X86_X32_ABI


# -- processes -------------------------------------------------------------------------------------

CLONE_NEW = [0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000]


def clone(flags: int) -> int:
    """The errno of clone(2); a child that comes of it ends at once."""
    # A new stack is not needed: without CLONE_VM the child has a copy of this one.
    result = syscalls._locked_syscall(  # the raw call: errno_of would go on in the child
        ctypes.c_long(NUMBERS[MACHINE]["clone"]), ctypes.c_long(flags), *(ctypes.c_long(0),) * 4
    )
    if result == 0:
        os._exit(0)
    return ctypes.get_errno() if result < 0 else 0


@pytest.mark.parametrize("flags", CLONE_NEW)
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_a_clone_into_a_new_namespace_is_refused(profiles: Profiles, flags: int) -> None:
    refused(profiles, lambda: clone(flags | signal.SIGCHLD), errno.EPERM, os.geteuid() == 0)


@pytest.mark.parametrize("flags", [*CLONE_NEW, 0])
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_unsharing_is_refused(profiles: Profiles, flags: int) -> None:
    refused(profiles, lambda: call("unshare", flags), errno.EPERM, os.geteuid() == 0 or not flags)


@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_clone3_seems_not_to_exist(profiles: Profiles) -> None:
    refused(profiles, lambda: call("clone3", 0, 0), errno.ENOSYS)


@pytest.mark.parametrize("profiles", [BASE, BOTH, LONE, (SUBPROCESS, WORKER)])
def test_a_new_process_is_refused(profiles: Profiles) -> None:
    refused(profiles, lambda: clone(signal.SIGCHLD), errno.EPERM)
    refused(profiles, os.fork_and_leave if False else fork_and_leave, errno.EPERM)


def fork_and_leave() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return 0


@pytest.mark.parametrize("profiles", [BASE, BOTH, LONE, (SUBPROCESS, WORKER)])
def test_a_program_is_refused(profiles: Profiles) -> None:
    refused(profiles, lambda: call("execve", 0, 0, 0), errno.EPERM)
    refused(profiles, lambda: call("execveat", -1, 0, 0, 0, 0), errno.EPERM)
    refused(profiles, lambda: subprocess.run([sys.executable, "-V"], check=False).returncode, 1)


def test_a_zygote_forks_siblings_and_its_workers_do_not() -> None:
    def fork_sibling() -> int:
        if syscalls.fork_as_sibling() == 0:
            os._exit(0)
        return 0

    def in_parent() -> Any:
        return in_child(BASE, fork_sibling)

    assert in_child(OPEN, lambda: in_child_of(BASE, fork_sibling)) == 0
    assert in_child(OPEN, lambda: in_child_of(BOTH, fork_sibling)) == errno.EPERM
    assert in_child(OPEN, lambda: in_child_of(LONE, fork_sibling)) == errno.EPERM


def in_child_of(profiles: Profiles, attempt: Callable[[], Any]) -> Any:
    """As `in_child`, from a child, so that a sibling it makes is not one of the tests' process."""
    return in_child(profiles, attempt)
