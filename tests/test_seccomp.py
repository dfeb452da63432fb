"""System call filters on this kernel, by trying: what is refused, and what goes on working.

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
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from workers.confinement import seccomp, seccomp_profiles, syscalls
from workers.confinement.seccomp_profiles import LONE, SUBPROCESS, WORKER, ZYGOTE
from workers.confinement.seccomp_rules import ALLOW, KILL_PROCESS, Group, Profile
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
ALONE: Profiles = (LONE,)
OPEN: Profiles = ()


def in_child(profiles: Profiles, attempt: Callable[[], Any]) -> Any:
    """What `attempt` returns in a child under `profiles`; minus the signal that ended the child."""
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


def refused(
    profiles: Profiles, attempt: Callable[[], Any], expected: int, bites: bool = True
) -> None:
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
        if not group.cases and group.action not in (ALLOW, KILL_PROCESS):
            found += [(name, group.action & 0xFFFF) for name in group.calls.split()]
    return [row for row in found if row[0] in NUMBERS[MACHINE] and row[0] not in UNREFUSED]


def answers_of(profiles: Profiles, names: Sequence[str]) -> dict[str, int]:
    """The errno of each call with all bits set in each argument, which makes sense to none."""

    def attempt() -> dict[str, int]:
        return {name: call(name, *GENTLE.get(name, (-1,) * 6)) for name in names}

    answer = in_child(profiles, attempt)
    assert isinstance(answer, dict), answer
    return answer


@pytest.mark.parametrize(
    ("profiles", "layer"), [(BASE, ZYGOTE), (FREER, SUBPROCESS), (BOTH, WORKER)]
)
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
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH, (WORKER,), ALONE])
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
    # The raw call: errno_of would go on in the child.
    result = syscalls._fork(NUMBERS[MACHINE]["clone"], flags, 0, 0, 0, 0)
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


@pytest.mark.parametrize("profiles", [BASE, BOTH, ALONE, (SUBPROCESS, WORKER)])
def test_a_new_process_is_refused(profiles: Profiles) -> None:
    refused(profiles, lambda: clone(signal.SIGCHLD), errno.EPERM)
    refused(profiles, fork_and_leave, errno.EPERM)


def fork_and_leave() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return 0


@pytest.mark.parametrize("profiles", [BASE, ALONE])
def test_a_program_is_refused_in_an_import(profiles: Profiles) -> None:
    refused(profiles, lambda: call("execve", 0, 0, 0), errno.EPERM)
    refused(profiles, lambda: call("execveat", -1, 0, 0, 0, 0), errno.EPERM)


def test_every_thread_of_a_zygote_that_serves_itself_is_filtered() -> None:
    def from_a_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(try_clone()))
        thread.start()
        thread.join()
        return found[0]

    def try_clone() -> int:
        return syscalls.errno_of(NUMBERS[MACHINE]["clone"], 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)

    assert in_child(ALONE, from_a_thread) == errno.EPERM


@pytest.mark.parametrize("profiles", [BOTH, (SUBPROCESS, WORKER)])
def test_a_worker_that_replaces_itself_ends(profiles: Profiles) -> None:
    refused(profiles, lambda: call("execve", 0, 0, 0), -signal.SIGSYS)
    refused(profiles, lambda: call("execveat", -1, 0, 0, 0, 0), -signal.SIGSYS)


@pytest.mark.parametrize("profiles", [BASE, BOTH, ALONE, (SUBPROCESS, WORKER)])
def test_a_program_beside_it_is_refused(profiles: Profiles) -> None:
    refused(profiles, lambda: subprocess.run([sys.executable, "-V"], check=False).returncode, 1)


def test_a_zygote_forks_siblings_and_its_workers_do_not() -> None:
    def fork_sibling() -> int:
        if syscalls.fork_as_sibling() == 0:
            os._exit(0)
        return 0

    # From a child, so that the sibling is not one of this process's children.
    assert in_child(OPEN, lambda: in_child(BASE, fork_sibling)) == 0
    assert in_child(OPEN, lambda: in_child(BOTH, fork_sibling)) == errno.EPERM
    assert in_child(OPEN, lambda: in_child(ALONE, fork_sibling)) == errno.EPERM


# -- signals and other processes -------------------------------------------------------------------


@pytest.fixture
def victim() -> Iterator[int]:
    """The id of another process of this user."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


LIMIT = (ctypes.c_uint64 * 2)(1000, 1000)
ALL_CPUS = ctypes.c_uint64(0xFFFFFFFF)
ZERO = (ctypes.c_int * 12)()
SENDERS: dict[str, Callable[[int], int]] = {
    "kill": lambda pid: call("kill", pid, 0),
    "tgkill": lambda pid: call("tgkill", pid, pid, 0),
    "tkill": lambda pid: call("tkill", pid, 0),
    "process group": lambda pid: call("kill", 0, 0),
    "everyone": lambda pid: call("kill", -1, 0),
    "everyone, upper half": lambda pid: call("kill", 0xFFFFFFFF, 0),
    "pid 1": lambda pid: call("kill", 1, 0),
    "pidfd": lambda pid: call("pidfd_open", pid, 0),
    "F_SETOWN": lambda pid: fcntl.fcntl(os.pipe()[0], 8, pid),
    "F_SETSIG": lambda pid: fcntl.fcntl(os.pipe()[0], 10, signal.SIGKILL),
    "FIOSETOWN": lambda pid: len(fcntl.ioctl(socket.socket(), 0x8901, struct.pack("i", pid))) - 4,
    "prlimit": lambda pid: call("prlimit64", pid, 0, ctypes.addressof(LIMIT), 0),
    "setpriority": lambda pid: call("setpriority", 0, pid, 5),
    "setpriority, all of the uid": lambda pid: call("setpriority", 2, 65_000, 5),
    "sched_setaffinity": lambda pid: call("sched_setaffinity", pid, 8, ctypes.addressof(ALL_CPUS)),
    "sched_setscheduler": lambda pid: call("sched_setscheduler", pid, 0, ctypes.addressof(ZERO)),
    "sched_setparam": lambda pid: call("sched_setparam", pid, ctypes.addressof(ZERO)),
    "sched_setattr": lambda pid: call("sched_setattr", pid, 0, 0),
    "ioprio_set": lambda pid: call("ioprio_set", 1, pid, 2 << 13),
    "ioprio_set, group": lambda pid: call("ioprio_set", 2, 0, 2 << 13),
}
SIGNALS_TO_ONE = {"kill", "tgkill", "tkill", "pidfd"}


@pytest.mark.parametrize("name", SENDERS)
def test_a_worker_cannot_signal_limit_or_reschedule_another_process(name: str, victim: int) -> None:
    native = os.geteuid() == 0 or name != "pid 1"  # init is not this user's to signal
    refused(BOTH, lambda: SENDERS[name](victim), errno.EPERM, native)


@pytest.mark.parametrize("name", sorted(set(SENDERS) - SIGNALS_TO_ONE))
def test_nor_can_a_zygote(name: str, victim: int) -> None:
    assert in_child(BASE, lambda: SENDERS[name](victim)) == errno.EPERM


@pytest.mark.parametrize("name", sorted(set(SENDERS) - SIGNALS_TO_ONE - {"process group"}))
def test_nor_can_a_jail_with_subprocesses(name: str, victim: int) -> None:
    assert in_child(FREER, lambda: SENDERS[name](victim)) == errno.EPERM


def test_a_worker_may_signal_limit_and_schedule_itself() -> None:
    def attempt() -> list[int]:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        os.kill(os.getpid(), signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        return [
            call("prlimit64", 0, 7, 0, ctypes.addressof(LIMIT)),
            call("prlimit64", os.getpid(), 7, 0, ctypes.addressof(LIMIT)),  # asking
            call("setpriority", 0, 0, 1),
            call("sched_setaffinity", 0, 8, ctypes.addressof(ALL_CPUS)),
            call("ioprio_set", 1, 0, 2 << 13 | 7),
        ]

    assert in_child(BOTH, attempt) == [0] * 5


TOUCHING: dict[str, Callable[[int], int]] = {
    "ptrace": lambda pid: call("ptrace", 16, pid, 0, 0),  # PTRACE_ATTACH
    "ptrace of oneself": lambda pid: call("ptrace", 0, 0, 0, 0),
    "process_vm_readv": lambda pid: call("process_vm_readv", pid, 0, 0, 0, 0, 0),
    "process_vm_writev": lambda pid: call("process_vm_writev", pid, 0, 0, 0, 0, 0),
    "kcmp": lambda pid: call("kcmp", os.getpid(), os.getpid(), 1, 0, 0),
    "pidfd_getfd": lambda pid: call("pidfd_getfd", -1, 0, 0),
    "get_robust_list": lambda pid: call("get_robust_list", pid, 0, 0),
    "move_pages": lambda pid: call("move_pages", pid, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("name", TOUCHING)
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_no_process_reaches_into_another(profiles: Profiles, name: str, victim: int) -> None:
    refused(profiles, lambda: TOUCHING[name](victim), errno.EPERM)


# -- arguments -------------------------------------------------------------------------------------

AF_VSOCK, AF_ALG, AF_TIPC, AF_CAN, AF_BLUETOOTH, AF_KEY, AF_XDP = 40, 38, 30, 29, 31, 15, 44
SOCKETS = [
    ("netlink", (16, 3, 0), errno.EAFNOSUPPORT),
    ("netlink, upper half", (16 | 1 << 32, 3, 0), errno.EAFNOSUPPORT),
    ("netlink, sign", (16 | -1 << 32, 3, 0), errno.EAFNOSUPPORT),
    ("packet", (17, 3, 0), errno.EAFNOSUPPORT),
    ("vsock", (AF_VSOCK, 1, 0), errno.EAFNOSUPPORT),
    ("alg", (AF_ALG, 5, 0), errno.EAFNOSUPPORT),
    ("key", (AF_KEY, 3, 2), errno.EAFNOSUPPORT),
    ("tipc", (AF_TIPC, 1, 0), errno.EAFNOSUPPORT),
    ("can", (AF_CAN, 3, 1), errno.EAFNOSUPPORT),
    ("bluetooth", (AF_BLUETOOTH, 1, 0), errno.EAFNOSUPPORT),
    ("xdp", (AF_XDP, 3, 0), errno.EAFNOSUPPORT),
    ("raw", (2, 3, 1), errno.EPERM),
    ("raw, IPv6", (10, 3, 58), errno.EPERM),
    ("raw, close-on-exec", (2, 3 | 0x80000, 255), errno.EPERM),
    ("ping", (2, 2, 1), errno.EPROTONOSUPPORT),
    ("mptcp", (2, 1, 262), errno.EPROTONOSUPPORT),
    ("mptcp, IPv6", (10, 1, 262), errno.EPROTONOSUPPORT),
    ("mptcp, upper half", (2, 1, 262 | 1 << 32), errno.EPROTONOSUPPORT),
    ("smc", (2, 1, 256), errno.EPROTONOSUPPORT),
    ("sctp", (2, 1, 132), errno.EPROTONOSUPPORT),
    ("udp-lite", (2, 2, 136), errno.EPROTONOSUPPORT),
]
MAY_BE_MISSING = {"alg", "key", "tipc", "can", "bluetooth", "xdp", "smc", "sctp", "ping"}


@pytest.mark.parametrize(("name", "arguments", "expected"), SOCKETS, ids=[s[0] for s in SOCKETS])
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_a_socket_of_another_kind_is_refused(
    profiles: Profiles, name: str, arguments: tuple[int, int, int], expected: int
) -> None:
    if WORKER in profiles and arguments[1] == 2:
        expected = errno.EAFNOSUPPORT  # of several errnos, that of the last filter: no datagrams
    # A kernel without the module, or a user without the right, says the same without a filter.
    bites = name not in MAY_BE_MISSING and (os.geteuid() == 0 or "netlink" in name)
    refused(profiles, lambda: call("socket", *arguments), expected, bites)


def test_most_of_those_sockets_exist_without_the_filter() -> None:
    if os.geteuid() != 0:
        pytest.skip("raw and packet sockets need root without a filter as well")
    opened = [
        n for n, arguments, _ in SOCKETS if in_child(OPEN, partial(call, "socket", *arguments)) == 0
    ]
    assert {"netlink", "netlink, upper half", "packet", "vsock", "raw", "mptcp"} <= set(opened)


@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_tcp_and_unix_sockets_are_to_be_had(profiles: Profiles) -> None:
    def attempt() -> list[int]:
        kinds = [(1, 1, 0), (1, 2, 0), (1, 5, 0), (2, 1, 0), (2, 1 | 0x80800, 6), (10, 1, 0)]
        return [call("socket", *kind) for kind in kinds]

    assert in_child(profiles, attempt) == [0] * 6


def test_datagrams_are_for_an_import_but_not_for_a_worker() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        for kind in (2, 2 | 0x80800):
            for protocol in (0, 17):
                arguments = (int(family), kind, protocol)
                assert in_child(BASE, partial(call, "socket", *arguments)) == 0
                refused(BOTH, partial(call, "socket", *arguments), errno.EAFNOSUPPORT)


def test_a_worker_offers_nothing_to_other_calls() -> None:
    def bind_tcp() -> int:
        socket.socket().bind(("127.0.0.1", 0))
        return 0

    def listen_unbound() -> int:
        socket.socket().listen()
        return 0

    def bind_abstract() -> int:
        socket.socket(socket.AF_UNIX).bind(f"\0atp-{os.getpid()}")
        return 0

    for attempt in (bind_tcp, listen_unbound, bind_abstract):
        refused(BOTH, attempt, errno.EACCES)
        assert in_child(BASE, attempt) == 0
        assert in_child(ALONE, attempt) == 0


def test_socket_pairs_are_unix() -> None:
    pair = (ctypes.c_int * 2)()
    assert in_child(BOTH, lambda: call("socketpair", 1, 1, 0, ctypes.addressof(pair))) == 0
    refused(BOTH, lambda: call("socketpair", 2, 1, 0, ctypes.addressof(pair)), errno.EAFNOSUPPORT)


def test_no_program_or_protocol_is_put_under_a_socket() -> None:
    program = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0xFFFF))
    fprog = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(program)))

    def attach() -> int:
        return call("setsockopt", socket.socket().fileno(), 1, 26, ctypes.addressof(fprog), 16)

    def repair() -> int:
        one = ctypes.c_int(1)
        return call("setsockopt", socket.socket().fileno(), 6, 19, ctypes.addressof(one), 4)

    refused(BASE, attach, errno.EPERM, MACHINE == "x86_64")  # the layout packed above
    refused(BASE, repair, errno.EPERM, os.geteuid() == 0)
    refused(BASE, lambda: call("setsockopt", socket.socket().fileno(), 132, 1, 0, 0), 92, False)


@pytest.fixture
def terminal() -> Iterator[int]:
    """The terminal end of a pseudo-terminal, which a filtered process could not make itself."""
    controller, end = os.openpty()
    yield end
    os.close(end)
    os.close(controller)


@pytest.mark.parametrize("upper", [0, 1 << 32, -1 << 32])
@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH])
def test_nothing_is_typed_into_a_terminal(profiles: Profiles, upper: int, terminal: int) -> None:
    tiocsti = 0x5412

    key = ctypes.create_string_buffer(b"x")

    def attempt() -> int:
        return call("ioctl", terminal, tiocsti | upper, ctypes.addressof(key))

    native = os.geteuid() == 0 and os.path.exists("/proc/sys/dev/tty/legacy_tiocsti")
    refused(profiles, attempt, errno.EPERM, native)


IOCTLS = {"TIOCLINUX": 0x541C, "TIOCCONS": 0x541D, "TIOCSETD": 0x5423, "FIOASYNC": 0x5452}
UNLISTED_IOCTLS = {"NS_GET_PARENT": 0xB702, "FS_IOC_GETFLAGS": 0x80086601, "SIOCGIFCONF": 0x8912}


@pytest.mark.parametrize("name", IOCTLS)
def test_no_terminal_is_taken_over(name: str, terminal: int) -> None:
    def attempt() -> int:
        return call("ioctl", terminal, IOCTLS[name], ctypes.addressof(ZERO))

    refused(BASE, attempt, errno.EPERM, bites=os.geteuid() == 0)


@pytest.mark.parametrize("name", UNLISTED_IOCTLS)
def test_an_unlisted_ioctl_finds_no_device(name: str) -> None:
    def attempt() -> int:
        where = {"NS_GET_PARENT": "/proc/self/ns/pid", "FS_IOC_GETFLAGS": "/"}.get(name)
        fd = socket.socket().detach() if where is None else os.open(where, os.O_RDONLY)
        buffer = ctypes.create_string_buffer(64)
        return call("ioctl", fd, UNLISTED_IOCTLS[name], ctypes.addressof(buffer))

    refused(BASE, attempt, errno.ENOTTY)


PR_SET_MM, PR_SET_PTRACER = 35, 0x59616D61
PRCTLS = {
    "SET_SECCOMP": (22, 1, 0),
    "CAPBSET_DROP": (24, 63, 0),
    "SET_SECUREBITS": (28, 0, 0),
    "SET_MM": (PR_SET_MM, 1, 0),
    "CHILD_SUBREAPER": (36, 1, 0),
    "CAP_AMBIENT": (47, 4, 0),
    "SPECULATION_CTRL": (53, 99, 0),
    "SYSCALL_USER_DISPATCH": (59, 0, 0),
    "SCHED_CORE": (62, 99, 0),
    "MEMORY_MERGE": (67, 0, 0),
    "PTRACER": (PR_SET_PTRACER, 0, 0),
}


@pytest.mark.parametrize("name", PRCTLS)
def test_a_process_does_not_loosen_its_own_boundary(name: str) -> None:
    # SET_MM: this machine's root has no CAP_SYS_RESOURCE, so the kernel says the same.
    native = os.geteuid() == 0 and name != "SET_MM"
    refused(BASE, lambda: call("prctl", *PRCTLS[name], 0, 0), errno.EPERM, native)


def test_a_control_that_does_not_exist_yet_is_unknown() -> None:
    assert in_child(BASE, lambda: call("prctl", 9999, 0, 0, 0, 0)) == errno.EINVAL


def test_no_worker_installs_a_filter_and_nobody_a_listener() -> None:
    set_mode_filter, new_listener, tsync = 1, 8, 1
    refused(BOTH, lambda: call("seccomp", set_mode_filter, 0, 0), errno.EPERM)
    for flags in (new_listener, tsync):
        refused(BASE, partial(call, "seccomp", set_mode_filter, flags, 0), errno.EPERM)
    refused(BOTH, lambda: call("landlock_create_ruleset", 0, 0, 1), errno.EPERM)


def test_no_huge_pages_are_taken_from_the_machine() -> None:
    map_hugetlb, mfd_hugetlb = 0x40000, 4
    flags = 0x22 | map_hugetlb

    def attempt() -> int:
        return call("mmap", 0, 1, 3, flags, -1, 0)

    name = ctypes.create_string_buffer(b"x")
    assert in_child(BASE, attempt) == errno.ENOMEM  # also what a machine without any says
    refused(BASE, lambda: call("memfd_create", ctypes.addressof(name), mfd_hugetlb), errno.EINVAL)
    assert in_child(BASE, lambda: call("memfd_create", ctypes.addressof(name), 3)) == 0


def test_devices_are_not_made_and_fifos_are(tmp_path: Path) -> None:
    path = ctypes.create_string_buffer(os.fsencode(tmp_path / "node"))

    def attempt(mode: int) -> int:
        Path(tmp_path / "node").unlink(missing_ok=True)
        return call("mknodat", -100, ctypes.addressof(path), mode | 0o600, 0)

    refused(BASE, lambda: attempt(0x2000), errno.EPERM)  # 0:0, which needs no capability
    refused(BASE, lambda: attempt(0x6000), errno.EPERM, os.geteuid() == 0)
    assert in_child(BASE, lambda: [attempt(mode) for mode in (0x1000, 0x8000, 0xC000)]) == [0] * 3


def test_address_randomisation_stays_on() -> None:
    refused(BASE, lambda: call("personality", 0x0040000), errno.EPERM)
    assert in_child(BASE, lambda: [call("personality", 0xFFFFFFFF), call("personality", 0)]) == [
        0,
        0,
    ]


def test_a_worker_does_not_see_the_names_of_new_files(tmp_path: Path) -> None:
    path = ctypes.create_string_buffer(os.fsencode(tmp_path))

    def attempt() -> int:
        watches = ctypes.CDLL(None).inotify_init1(0)
        assert watches >= 0
        return call("inotify_add_watch", watches, ctypes.addressof(path), 0xFFF)

    refused(BOTH, attempt, errno.EACCES)
    assert in_child(BASE, attempt) == 0


@pytest.mark.parametrize("base", [ZYGOTE, SUBPROCESS], ids=lambda profile: profile.name)
def test_without_namespaces_there_are_only_socket_pairs(base: Profile) -> None:
    closed = seccomp_profiles.without_namespaces(base, has_signal_scope=True)
    for arguments in [(1, 1, 0), (2, 1, 0), (16, 3, 0)]:
        refused((closed,), partial(call, "socket", *arguments), errno.EACCES)
    assert in_child((closed,), lambda: len(socket.socketpair())) == 2


@pytest.mark.parametrize("base", [ZYGOTE, LONE, SUBPROCESS], ids=lambda profile: profile.name)
def test_without_namespaces_no_pair_leads_elsewhere(base: Profile, tmp_path: Path) -> None:
    closed = seccomp_profiles.without_namespaces(base, has_signal_scope=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outside:
        outside.bind(str(tmp_path / "log"))

        def send(kind: int) -> int:
            return socket.socketpair(socket.AF_UNIX, kind)[0].sendto(b"x", str(tmp_path / "log"))

        assert in_child((base,), lambda: send(socket.SOCK_DGRAM)) == 1
        for kind in (socket.SOCK_DGRAM, socket.SOCK_RAW):
            refused((closed,), partial(send, kind), errno.EAFNOSUPPORT)
        assert in_child((closed,), lambda: send(socket.SOCK_STREAM)) == errno.EISCONN


@pytest.mark.parametrize("base", [ZYGOTE, LONE, SUBPROCESS], ids=lambda profile: profile.name)
def test_without_namespaces_modes_owners_and_times_stay(base: Profile, tmp_path: Path) -> None:
    closed = seccomp_profiles.without_namespaces(base, has_signal_scope=True)
    path = tmp_path / "file"
    path.touch(mode=0o600)
    os.utime(path, (1, 1))

    def attempt() -> bool:
        fd = os.open(path, os.O_RDONLY)
        os.chmod(path, 0o4777)
        os.fchmod(fd, 0o4777)
        os.utime(path)
        os.utime(fd)
        shutil.copy(path, tmp_path / "copy")
        return True

    assert in_child((closed,), attempt) is True
    assert (path.stat().st_mode & 0o7777, path.stat().st_mtime) == (0o600, 1.0)
    assert in_child((base,), attempt) is True
    assert path.stat().st_mode & 0o777 == 0o777


def test_without_namespaces_nobody_leaves_the_group_of_processes() -> None:
    closed = seccomp_profiles.without_namespaces(SUBPROCESS, has_signal_scope=True)

    def leaves() -> bool:
        pid = os.fork()
        if pid == 0:
            before = os.getpgid(0)
            os.setpgid(0, 0)
            os._exit(os.getpgid(0) != before)
        return os.waitpid(pid, 0)[1] != 0

    assert in_child((closed,), leaves) is False
    assert in_child(FREER, leaves) is True


def test_without_namespaces_nobody_outlives_the_warden() -> None:
    pdeathsig, sigkill = 1, 9
    closed = seccomp_profiles.without_namespaces(ZYGOTE, has_signal_scope=True)
    assert in_child((closed,), lambda: call("prctl", pdeathsig, sigkill)) == 0
    refused((closed,), lambda: call("prctl", pdeathsig, 0), errno.EPERM)
    assert in_child(BASE, lambda: call("prctl", pdeathsig, 0)) == 0


def test_without_namespaces_and_scopes_nobody_is_signalled() -> None:
    closed = seccomp_profiles.without_namespaces(ZYGOTE, has_signal_scope=False)
    refused((closed,), lambda: os.kill(os.getppid(), 0), errno.EPERM)
    refused((closed,), lambda: os.kill(os.getpid(), 0), errno.EPERM)
    scoped = seccomp_profiles.without_namespaces(ZYGOTE, has_signal_scope=True)
    assert in_child((scoped,), lambda: os.kill(os.getpid(), 0)) is None


# -- installing and verifying ----------------------------------------------------------------------


@pytest.mark.parametrize("profiles", [BASE, FREER, BOTH, ALONE])
def test_what_was_installed_verifies(profiles: Profiles) -> None:
    def attempt() -> bool:
        for profile in profiles:
            seccomp.verify_answers(profile)
        seccomp.verify(profiles[0], len(profiles))
        return True

    assert in_child(profiles, attempt) is True


def test_a_missing_filter_does_not_verify() -> None:
    assert in_child(OPEN, lambda: seccomp.verify(ZYGOTE, 1)) == errno.EPROTO
    assert in_child(BASE, lambda: seccomp.verify(ZYGOTE, 2)) == errno.EPROTO
    for profile in (ZYGOTE, SUBPROCESS, LONE, WORKER):
        assert in_child(OPEN, partial(seccomp.verify_answers, profile)) == errno.EPROTO
    # Installed, but something that lets everything pass.
    nothing = Profile("nothing", (Group("g", "", "read"),), ALLOW, ())
    assert in_child((nothing,), lambda: seccomp.verify(ZYGOTE, 1)) == errno.EPROTO


def test_a_refused_installation_says_why() -> None:
    program = seccomp.compile_profile(ZYGOTE, MACHINE)

    def attempt(bad: bytes) -> str:
        try:
            seccomp.install(bad)
        except OSError as error:
            return str(error)
        return "installed"

    assert "malformed" in in_child(OPEN, lambda: attempt(program[8:-8] + b"\xff" * 8))
    assert "forbidden by a filter around us" in in_child(BOTH, lambda: attempt(program))
    if os.geteuid() != 0:  # root needs no no_new_privs
        with pytest.raises(OSError, match="no_new_privs is not set"):
            seccomp.install(program)


def test_a_prepared_filter_knows_each_process_that_installs_it() -> None:
    prepared = seccomp.Prepared(seccomp.compile_profile(WORKER, MACHINE))

    def attempt() -> int:
        prepared.install()
        os.kill(os.getpid(), 0)
        return 0

    assert [in_child(BASE, attempt) for _ in range(3)] == [0, 0, 0]


# -- what has to work ------------------------------------------------------------------------------


class Hello(http.server.BaseHTTPRequestHandler):
    """Answers every GET with "ok"."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: object) -> None:
        """Nothing on the tests' output."""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server outside of every filter; a name, so that clients resolve it."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


WORKS = {
    "json": "assert __import__('json').loads('[1]') == [1]",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    assert sum(pool.map(lambda x: x * x, range(100))) == 328350
""",
    "asyncio": """
import asyncio
async def main():
    return await asyncio.gather(asyncio.sleep(0.01, 1), asyncio.to_thread(lambda: 2))
assert asyncio.run(main()) == [1, 2]
""",
    "tempfile": """
import os, shutil, tempfile
with tempfile.TemporaryDirectory() as d:
    with open(d + "/a", "w") as f: f.write("x")
    shutil.copy2(d + "/a", d + "/b"); shutil.copytree(d, d + "/c")
    shutil.make_archive(d + "/z", "gztar", d + "/c"); os.mkfifo(d + "/fifo")
    with tempfile.TemporaryFile() as t: t.write(b"x")
""",
    "sqlite3 with its write-ahead log": """
import sqlite3, tempfile
with tempfile.TemporaryDirectory() as d:
    db = sqlite3.connect(d + "/db")
    assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
    db.execute("create table t(a)"); db.execute("insert into t values(1)"); db.commit()
    assert db.execute("select count(*) from t").fetchone() == (1,)
    db.close()
""",
    "ssl": "import ssl; ssl.create_default_context()",
    "getaddrinfo": """
import socket
for flags in (0, socket.AI_ADDRCONFIG):
    found = socket.getaddrinfo("localhost", 80, flags=flags)
    assert ("127.0.0.1", 80) in [row[4] for row in found]
""",
    "urllib": "import urllib.request; assert urllib.request.urlopen(url).read() == b'ok'",
    "signals": """
import signal, time
hits = []
signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
while not hits: time.sleep(0.005)
""",
    "multiprocessing's locks": "import multiprocessing as m; m.Lock().acquire(); m.Queue()",
    "platform": "import platform, uuid; platform.platform(); platform.processor(); uuid.uuid1()",
    "requests": "import requests; assert requests.get(url).text == 'ok'",
    "httpx": """
import asyncio, httpx
assert httpx.get(url).text == "ok"
async def main():
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).text
assert asyncio.run(main()) == "ok"
""",
    "aiohttp": """
import asyncio, aiohttp
async def main():
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return await response.text()
assert asyncio.run(main()) == "ok"
""",
    "numpy": """
import numpy as np
a = np.random.default_rng(0).random((400, 400))
assert abs(np.linalg.det(a @ np.linalg.inv(a)) - 1) < 1e-6
""",
    "pandas": """
import pandas as pd, tempfile
with tempfile.TemporaryDirectory() as d:
    pd.DataFrame({"a": range(1000), "b": list("xyzw") * 250}).to_csv(d + "/t.csv")
    assert pd.read_csv(d + "/t.csv").groupby("b").a.sum().sum() == 499500
""",
    "PIL": """
import io
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (300, 300), "red").rotate(30).resize((100, 100)).save(file, "JPEG")
assert len(file.getvalue()) > 500
""",
    "psutil": """
import psutil
p = psutil.Process()
p.memory_info(); p.cpu_affinity(); p.nice(); p.num_threads(); p.rlimit(psutil.RLIMIT_NOFILE)
""",
}
THIRD_PARTY = {"requests", "httpx", "aiohttp", "numpy", "pandas", "PIL", "psutil"}
NEEDS_PROCESSES = {
    "subprocess": """
import os, subprocess, sys
assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
p = subprocess.Popen(["sleep", "9"], start_new_session=True)
os.killpg(p.pid, 15)
assert p.wait() == -15
assert os.system("true") == 0
""",
    "asyncio's subprocess": """
import asyncio
async def main():
    p = await asyncio.create_subprocess_exec("echo", "hi", stdout=-1)
    return (await p.communicate())[0]
assert asyncio.run(main()) == b"hi\\n"
""",
    "multiprocessing": """
import multiprocessing as m
with m.get_context("fork").Pool(2) as pool:
    assert pool.map(abs, [-1, -2]) == [1, 2]
""",
}
PREAMBLE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from workers.confinement import seccomp, seccomp_profiles, syscalls
syscalls.prctl(38, 1)
for name in sys.argv[2].split():
    profile = getattr(seccomp_profiles, name)
    seccomp.install(seccomp.compile_profile(profile, syscalls.MACHINE))
    seccomp.verify_answers(profile)
url = sys.argv[1]
"""


def check_program(code: str, layers: str, url: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PREAMBLE + code, url, layers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("layers", ["ZYGOTE", "ZYGOTE WORKER", "SUBPROCESS"])
@pytest.mark.parametrize("name", WORKS)
def test_an_ordinary_tool_works(name: str, layers: str, url: str) -> None:
    if name in THIRD_PARTY and importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: it is in the dependency group `dev`")
    check_program(WORKS[name], layers, url)


@pytest.mark.parametrize("name", NEEDS_PROCESSES)
def test_subprocesses_work_where_they_are_allowed(name: str, url: str) -> None:
    check_program(NEEDS_PROCESSES[name], "SUBPROCESS", url)
    with pytest.raises(AssertionError, match="PermissionError"):
        check_program(NEEDS_PROCESSES[name], "ZYGOTE", url)
