"""Landlock on this kernel, by trying: what a worker under both layers can reach, and what not.

Each case is a small zygote: it enters the base layer, forks a *victim* into slot 2, and then an
*attacker* into slot 1, which tries. Every refusal is tried again without the layers, where it has
to succeed: otherwise something else refused it, and the case proves nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from atp_sandbox.confinement.landlock_features import FEATURES, Standing, substitutes
from workers.confinement import landlock, syscalls

# The children only make system calls and end with _exit; nothing of another thread is used.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

SUPPORT = landlock.probe()
REFUSED = {"EACCES", "EPERM", "EXDEV"}
NO_NAME = "an unguessable name"


@dataclass(frozen=True)
class Case:
    """What an attempt knows: the tree, its slots and the other process."""

    tree: landlock.Tree
    abi: int
    victim: int = 0

    @property
    def code(self) -> str:
        return self.tree.code[0]

    @property
    def own(self) -> str:
        return self.tree.scratch + "/1"

    @property
    def other(self) -> str:
        return self.tree.scratch + "/2"

    @property
    def imported(self) -> str:
        return self.tree.scratch + "/0"


Attempt = Callable[[Case], object]


def needs(abi: int) -> None:
    """Skip on a kernel without the feature, with the probe's own words."""
    if abi > SUPPORT.abi:
        pytest.skip(f"needs Landlock ABI {abi}; this kernel: {SUPPORT}")


@pytest.fixture
def tree(tmp_path: Path) -> landlock.Tree:
    """Code, and three slots with a file in each: the import's, the attacker's, the victim's."""
    needs(1)
    code = tmp_path / "code"
    code.mkdir()
    (code / "tool.py").write_text("tool")
    for slot in "012":
        directory = tmp_path / "scratch" / slot
        directory.mkdir(parents=True, mode=0o700)
        (directory / "file").write_text("secret")
    libraries = {os.path.realpath(p) for p in ("/usr", "/lib", "/lib64", sys.base_prefix)}
    return landlock.Tree(
        code=(str(code), *sorted(libraries)),
        data=("/proc",),
        devices=tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom")),
        scratch=str(tmp_path / "scratch"),
        import_scratch=str(tmp_path / "scratch" / "0"),
    )


def outcome_of(attempt: Callable[[], object]) -> Any:
    """What it returned, as JSON has it, or the name of the error that it ended with."""
    try:
        return json.loads(json.dumps(attempt()))
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def in_child(action: Callable[[], object]) -> Any:
    """The outcome of `action` in a forked process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writer, json.dumps(outcome_of(action)).encode())
        except BaseException as error:
            os.write(writer, json.dumps(f"{type(error).__name__}: {error}").encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as file:
        told = file.read()
    os.waitpid(pid, 0)
    return json.loads(told) if told else "died"


def attempt_in_worker(
    tree: landlock.Tree,
    attempt: Attempt,
    *,
    victim: Attempt | None = None,
    layers: bool = True,
    capable: bool = False,
    abi: int = SUPPORT.abi,
) -> Any:
    """The outcome of `attempt` in a worker beside another one, under a zygote of their own.

    Without capabilities, as in a jail, unless `capable`: some get past Landlock. CAP_PERFMON alone
    opens another domain's /proc/PID/environ and maps (mm_access in the kernel's fork.c).
    """

    def be_zygote() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        if not capable:
            syscalls.keep_capabilities(0)
        layer = None
        if layers:
            landlock.enter_base(tree, abi)
            layer = landlock.WorkerLayer(tree, abi)
        case = Case(tree, abi)
        ready_reader, ready_writer = os.pipe()
        end_reader, end_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(end_writer)
            if layer is not None:
                layer.enter(case.other)
            kept = victim(case) if victim is not None else None
            os.write(ready_writer, b"x")
            os.read(end_reader, 1)
            os._exit(0 if kept is not None else 1)
        os.close(ready_writer)
        assert os.read(ready_reader, 1) == b"x"

        def be_attacker() -> object:
            if layer is not None:
                layer.enter(case.own)
            return attempt(Case(tree, abi, pid))

        try:
            return in_child(be_attacker)
        finally:
            os.close(end_writer)
            os.waitpid(pid, 0)

    return in_child(be_zygote)


def assert_only_landlock_refuses(
    tree: landlock.Tree,
    attempt: Attempt,
    *,
    victim: Attempt | None = None,
    errors: set[str] = REFUSED,
    capable: bool = False,
) -> None:
    """Refused under both layers, done without them."""
    with_layers = attempt_in_worker(tree, attempt, victim=victim, capable=capable)
    assert with_layers in [*errors]
    without = attempt_in_worker(tree, attempt, victim=victim, capable=capable, layers=False)
    assert without not in [*errno.errorcode.values(), "died"], without


def put(path: str, text: str = "x") -> str:
    with open(path, "w") as file:
        file.write(text)
    return text


def get(path: str) -> str:
    with open(path) as file:
        return file.read()


def open_and_read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY)
    if not path.endswith("/mem"):  # where nothing is mapped at 0
        os.read(fd, 1)
    return "opened"


def open_and_close(path: str, flags: int) -> str:
    os.close(os.open(path, flags))
    return "opened"


# -- files -----------------------------------------------------------------------------------------


def write_to_code(case: Case) -> object:
    return put(case.code + "/tool.py")


def create_beside_code(case: Case) -> object:
    return put(case.code + "/new")


def remove_code(case: Case) -> object:
    os.unlink(case.code + "/tool.py")
    return "done"


def write_to_other_slot(case: Case) -> object:
    return put(case.other + "/file")


def read_other_slot(case: Case) -> object:
    return get(case.other + "/file")


def list_other_slot(case: Case) -> object:
    return os.listdir(case.other)


def list_slots(case: Case) -> object:
    return os.listdir(case.tree.scratch)


def list_root(_case: Case) -> object:
    return os.listdir("/")


def create_beside_slots(case: Case) -> object:
    os.mkdir(case.tree.scratch + "/3")
    return "done"


def remove_in_other_slot(case: Case) -> object:
    os.unlink(case.other + "/file")
    return "done"


def make_fifo_in_other_slot(case: Case) -> object:
    os.mkfifo(case.other + "/fifo")
    return "done"


def write_to_import_scratch(case: Case) -> object:
    return put(case.imported + "/file")


def create_in_import_scratch(case: Case) -> object:
    return put(case.imported + "/new")


def rename_into_other_slot(case: Case) -> object:
    os.rename(case.own + "/file", case.other + "/taken")
    return "done"


def rename_out_of_other_slot(case: Case) -> object:
    os.rename(case.other + "/file", case.own + "/taken")
    return "done"


def link_from_other_slot(case: Case) -> object:
    os.link(case.other + "/file", case.own + "/taken")
    return get(case.own + "/taken")


def read_other_slot_by_symlink(case: Case) -> object:
    link = case.own + f"/link-{os.getpid()}"
    os.symlink(case.other + "/file", link)
    return get(link)


def read_other_slot_by_path_descriptor(case: Case) -> object:
    fd = os.open(case.other, os.O_PATH)
    return open_and_close(f"/proc/self/fd/{fd}/file", os.O_RDONLY)


def read_other_slot_from_inside(case: Case) -> object:
    os.chdir(case.other)
    return get("file")


def read_host_file(_case: Case) -> object:
    return get("/etc/passwd")


@pytest.mark.parametrize(
    "attempt",
    [
        write_to_code,
        create_beside_code,
        remove_code,
        write_to_other_slot,
        read_other_slot,
        list_other_slot,
        list_slots,
        list_root,
        create_beside_slots,
        remove_in_other_slot,
        make_fifo_in_other_slot,
        write_to_import_scratch,
        create_in_import_scratch,
        rename_into_other_slot,
        rename_out_of_other_slot,
        link_from_other_slot,
        read_other_slot_by_symlink,
        read_other_slot_by_path_descriptor,
        read_other_slot_from_inside,
        read_host_file,
    ],
    ids=lambda attempt: attempt.__name__,
)
def test_worker_cannot(tree: landlock.Tree, attempt: Attempt) -> None:
    assert_only_landlock_refuses(tree, attempt)


def test_worker_cannot_empty_a_file_that_it_may_not_write(tree: landlock.Tree) -> None:
    needs(3)
    assert_only_landlock_refuses(tree, lambda case: os.truncate(case.code + "/tool.py", 0))
    assert_only_landlock_refuses(tree, lambda case: os.truncate(case.other + "/file", 0))
    assert_only_landlock_refuses(
        tree, lambda case: open_and_close(case.other + "/file", os.O_RDONLY | os.O_TRUNC)
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="without root mknod is refused anyway")
@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK], ids=["character", "block"])
def test_worker_cannot_make_a_device_node_in_its_own_slot(tree: landlock.Tree, kind: int) -> None:
    def make(case: Case) -> object:
        os.mknod(case.own + "/device", kind | 0o600, os.makedev(1, 3))
        return "made"

    assert_only_landlock_refuses(tree, make, capable=True)


def test_worker_cannot_run_a_program_that_it_wrote(tree: landlock.Tree) -> None:
    def run(case: Case) -> object:
        with open("/usr/bin/true", "rb") as source, open(case.own + "/true", "wb") as target:
            target.write(source.read())
        os.chmod(case.own + "/true", 0o700)
        return run_program(case.own + "/true")

    assert_only_landlock_refuses(tree, run)


def test_worker_may_run_what_is_code(tree: landlock.Tree) -> None:
    assert attempt_in_worker(tree, lambda _case: run_program("/usr/bin/true")) == 0


def run_program(path: str) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            os.execv(path, [path])
        except OSError as error:
            os._exit(error.errno or 255)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "execv")
    return status


def test_worker_has_all_of_its_own_slot(tree: landlock.Tree) -> None:
    def use(case: Case) -> object:
        own = case.own
        put(own + "/a", "text")
        os.truncate(own + "/a", 2)
        os.mkdir(own + "/d")
        os.rename(own + "/a", own + "/d/a")
        os.link(own + "/d/a", own + "/b")
        os.symlink("b", own + "/link")
        os.mkfifo(own + "/fifo")
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            os.chdir(own)
            server.bind("socket")
            server.listen()
            client.connect("socket")
        seen = sorted(os.listdir(own))
        text = get(own + "/link")
        for name in ("d/a", "b", "link", "fifo", "socket"):
            os.unlink(f"{own}/{name}")
        os.rmdir(own + "/d")
        return [seen, text, os.listdir(own)]

    names = sorted(["b", "d", "fifo", "file", "link", "socket"])
    assert attempt_in_worker(tree, use) == [names, "te", ["file"]]


def test_worker_reads_code_devices_proc_and_what_the_import_left(tree: landlock.Tree) -> None:
    def read(case: Case) -> object:
        with open("/dev/urandom", "rb") as device:
            assert len(device.read(8)) == 8
        with open("/dev/null", "w") as sink:
            sink.write("x")
            assert not sink.isatty()
        return [
            get(case.code + "/tool.py"),
            get(case.imported + "/file"),
            os.listdir(case.imported),
            get("/proc/self/status")[:5],
        ]

    assert attempt_in_worker(tree, read) == ["tool", "secret", ["file"], "Name:"]


def test_worker_cannot_make_device_calls(tree: landlock.Tree) -> None:
    needs(5)

    def ask_for_entropy(_case: Case) -> object:
        with open("/dev/urandom", "rb") as device:
            (bits,) = struct.unpack("i", fcntl.ioctl(device, 0x80045200, bytes(4)))
            return int(bits)

    assert_only_landlock_refuses(tree, ask_for_entropy)


def test_zygote_cannot_write_outside_scratch_but_can_in_all_of_it(tree: landlock.Tree) -> None:
    def be_zygote() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        landlock.enter_base(tree, SUPPORT.abi)
        case = Case(tree, SUPPORT.abi)
        return [
            outcome_of(lambda: write_to_code(case)),
            outcome_of(lambda: read_host_file(case)),
            outcome_of(lambda: put(case.imported + "/new")),
            outcome_of(lambda: put(case.own + "/new")),
            outcome_of(lambda: get(case.code + "/tool.py")),
        ]

    assert in_child(be_zygote) == ["EACCES", "EACCES", "x", "x", "tool"]


# -- the network and other processes ---------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_worker_cannot_bind_a_tcp_port(tree: landlock.Tree, address: str) -> None:
    needs(4)

    def bind(_case: Case) -> object:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as sock:
            sock.bind((address, 0))
        return "bound"

    assert_only_landlock_refuses(tree, bind, errors={"EACCES"})


def test_worker_may_connect_by_tcp(tree: landlock.Tree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()

        def connect(_case: Case) -> object:
            with socket.create_connection(address, timeout=10):
                return "connected"

        assert attempt_in_worker(tree, connect) == "connected"


def test_worker_cannot_signal_another_worker(tree: landlock.Tree) -> None:
    needs(6)

    def by_pidfd(case: Case) -> object:
        signal.pidfd_send_signal(os.pidfd_open(case.victim), 0)
        return "signalled"

    assert_only_landlock_refuses(tree, lambda case: os.kill(case.victim, 0), errors={"EPERM"})
    assert_only_landlock_refuses(tree, by_pidfd, errors={"EPERM"})


def test_worker_cannot_signal_its_zygote_or_what_is_outside(tree: landlock.Tree) -> None:
    needs(6)
    test = os.getpid()
    assert_only_landlock_refuses(tree, lambda _case: os.kill(os.getppid(), 0), errors={"EPERM"})
    assert_only_landlock_refuses(tree, lambda _case: os.kill(test, 0), errors={"EPERM"})


def test_worker_may_signal_its_own_threads_and_children(tree: landlock.Tree) -> None:
    def signal_own(_case: Case) -> object:
        got: list[int] = []
        signal.signal(signal.SIGUSR1, lambda number, _frame: got.append(number))
        waiting = threading.Event()
        thread = threading.Thread(target=waiting.wait)
        thread.start()
        signal.pthread_kill(thread.ident or 0, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)
        waiting.set()
        thread.join()
        child = os.fork()
        if child == 0:
            signal.pause()
        os.kill(child, signal.SIGKILL)
        return [bool(got), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]

    assert attempt_in_worker(tree, signal_own) == [True, -signal.SIGKILL]


def test_worker_cannot_reach_another_workers_abstract_socket(tree: landlock.Tree) -> None:
    needs(6)
    name = f"\0landlock-test-{os.getpid()}"

    def listen(_case: Case) -> object:
        server = socket.socket(socket.AF_UNIX)
        server.bind(name)
        server.listen()
        return server

    def connect(_case: Case) -> object:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(name)
        return "connected"

    assert_only_landlock_refuses(tree, connect, victim=listen, errors={"EPERM"})


def test_worker_cannot_open_another_workers_memory(tree: landlock.Tree) -> None:
    def reading(name: str) -> Attempt:
        return lambda case: open_and_read(f"/proc/{case.victim}/{name}")

    def following(name: str) -> Attempt:
        return lambda case: os.readlink(f"/proc/{case.victim}/{name}")

    for name in ("mem", "environ", "maps", "auxv", "io"):
        assert_only_landlock_refuses(tree, reading(name))
    for name in ("fd/0", "cwd", "root", "exe", "ns/net"):
        assert_only_landlock_refuses(tree, following(name))


def test_worker_cannot_trace_another_worker(tree: landlock.Tree) -> None:
    def attach(case: Case) -> object:
        trace_attach, trace_detach = 16, 17
        libc = ctypes.CDLL(None, use_errno=True)
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
        libc.ptrace.restype = ctypes.c_long
        if libc.ptrace(trace_attach, case.victim, None, None) < 0:
            raise OSError(ctypes.get_errno(), "ptrace")
        os.waitpid(case.victim, 0x40000000)  # __WALL: the victim is not a child of ours
        return int(libc.ptrace(trace_detach, case.victim, None, None))

    assert_only_landlock_refuses(tree, attach)


# -- a layer is sealed -----------------------------------------------------------------------------


def test_rule_added_to_an_entered_rule_set_changes_nothing(tree: landlock.Tree) -> None:
    def widen(case: Case) -> object:
        rights = landlock.rights_for(SUPPORT.abi)
        handled = struct.pack("=QQQ", rights.handled_fs, 0, 0)
        ruleset = syscalls.landlock_create_ruleset(handled)
        add(ruleset, case.own, rights.scratch)
        syscalls.landlock_restrict_self(ruleset, 0)
        fd = os.open(case.imported, os.O_PATH)
        syscalls.landlock_add_rules(ruleset, [struct.pack("=Qi", rights.data, fd)])
        return get(case.imported + "/file")

    assert attempt_in_worker(tree, widen) == "EACCES"


def test_further_layer_cannot_give_back_what_an_earlier_one_took(tree: landlock.Tree) -> None:
    def widen(case: Case) -> object:
        rights = landlock.rights_for(SUPPORT.abi)
        ruleset = syscalls.landlock_create_ruleset(struct.pack("=QQQ", rights.handled_fs, 0, 0))
        for path in (case.tree.scratch, "/"):
            add(ruleset, path, rights.handled_fs)
        syscalls.landlock_restrict_self(ruleset, 0)
        return get(case.other + "/file")

    assert attempt_in_worker(tree, widen) == "EACCES"


def test_rule_set_that_is_shared_lets_one_sibling_widen_the_other(tree: landlock.Tree) -> None:
    """Why each worker makes its own: this is what must never be done."""

    def be_zygote() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        rights = landlock.rights_for(SUPPORT.abi)
        shared = syscalls.landlock_create_ruleset(struct.pack("=QQQ", rights.handled_fs, 0, 0))
        case = Case(tree, SUPPORT.abi)
        in_child(lambda: add(shared, case.other, rights.data))

        def be_sibling() -> object:
            syscalls.landlock_restrict_self(shared, 0)
            return get(case.other + "/file")

        return in_child(be_sibling)

    assert in_child(be_zygote) == "secret"


def add(ruleset: int, path: str, access: int) -> None:
    fd = os.open(path, os.O_PATH)
    syscalls.landlock_add_rules(ruleset, [struct.pack("=Qi", access, fd)])
    os.close(fd)


def why_base_is_not_entered(tree: landlock.Tree) -> str:
    try:
        landlock.enter_base(tree, SUPPORT.abi)
    except RuntimeError as error:
        return str(error)
    return "entered"


def test_base_layer_is_entered_once(tree: landlock.Tree) -> None:
    def twice() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        return [why_base_is_not_entered(tree) for _ in range(2)]

    assert in_child(twice) == ["entered", "the base layer was entered already"]


def test_base_layer_is_not_entered_beside_a_thread_that_it_would_not_confine(
    tree: landlock.Tree,
) -> None:
    def with_thread() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        return why_base_is_not_entered(tree)

    told = "the base layer must be entered before there is a second thread"
    assert in_child(with_thread) == told


def test_layer_without_no_new_privs_is_refused(tree: landlock.Tree) -> None:
    def enter() -> object:
        if os.geteuid() == 0:
            syscalls.keep_capabilities(0)
        landlock.enter_base(tree, SUPPORT.abi)
        return "entered"

    assert in_child(enter) == "EPERM"


def test_worker_does_not_enter_where_a_descriptor_of_the_layer_is_gone(tree: landlock.Tree) -> None:
    def enter() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        layer = landlock.WorkerLayer(tree, SUPPORT.abi)
        os.closerange(200, 256)
        layer.enter(tree.scratch + "/1")
        return "entered"

    assert in_child(enter) == "EBADF"


def test_worker_does_not_enter_a_slot_that_is_a_link(tree: landlock.Tree) -> None:
    os.symlink(tree.scratch + "/2", tree.scratch + "/9")

    def enter() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        landlock.WorkerLayer(tree, SUPPORT.abi).enter(tree.scratch + "/9")
        return "entered"

    assert in_child(enter) == "ENOTDIR"


def test_worker_holds_no_descriptor_of_the_layer_afterwards(tree: landlock.Tree) -> None:
    def held(_case: Case) -> object:
        return sorted(os.listdir("/proc/self/fd"))

    assert attempt_in_worker(tree, held) == attempt_in_worker(tree, held, layers=False)


def test_slot_mounted_after_the_base_layer_is_the_workers(tree: landlock.Tree) -> None:
    """As in a jail: the warden mounts, and mounts anew, beneath the base layer's one rule."""
    case = Case(tree, SUPPORT.abi)

    def be_warden() -> object:
        uid, gid = os.getuid(), os.getgid()
        syscalls.unshare(syscalls.CLONE_NEWUSER | syscalls.CLONE_NEWNS)
        for name, text in (("setgroups", "deny"), ("uid_map", uid), ("gid_map", gid)):
            line = text if name == "setgroups" else f"{text} {text} 1"
            put(f"/proc/self/{name}", str(line))
        syscalls.mount("none", "/", None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount("scratch", case.own, "tmpfs", 0, "mode=0700,size=64k")
        go_reader, go_writer = os.pipe()
        told_reader, told_writer = os.pipe()
        if os.fork() == 0:
            syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
            landlock.enter_base(tree, SUPPORT.abi)
            layer = landlock.WorkerLayer(tree, SUPPORT.abi)
            os.read(go_reader, 1)

            def be_worker() -> object:
                layer.enter(case.own)
                put(case.own + "/new")
                return [os.listdir(case.own), outcome_of(lambda: read_other_slot(case))]

            os.write(told_writer, json.dumps(in_child(be_worker)).encode())
            os._exit(0)
        syscalls.unmount(case.own)
        syscalls.mount("scratch", case.own, "tmpfs", 0, "mode=0700,size=64k")
        os.write(go_writer, b"x")
        os.close(told_writer)
        return json.loads(os.read(told_reader, 4096))

    assert in_child(be_warden) == [["new"], "EACCES"]


# -- what Landlock leaves open ---------------------------------------------------------------------


def inotify_names(directory: str, action: Callable[[], object]) -> list[str]:
    """The names of entries that inotify tells of while `action` runs."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    if libc.inotify_add_watch(fd, directory.encode(), ctypes.c_uint32(0xFFF)) < 0:
        raise OSError(ctypes.get_errno(), "inotify_add_watch")
    action()
    data, names = os.read(fd, 65536), []
    while data:
        (length,) = struct.unpack_from("12xI", data)
        names.append(data[16 : 16 + length].rstrip(b"\0").decode())
        data = data[16 + length :]
    return names


def test_metadata_of_a_known_name_stays_open_and_is_closed_by_other_means(
    tree: landlock.Tree,
) -> None:
    """Not a wish: it shows what a slot's name must not be known for. When this fails, rejoice."""

    def meddle(case: Case) -> object:
        path = case.other + "/file"
        size = os.stat(path).st_size
        os.utime(path, (0, 0))
        os.chmod(path, 0o400)
        os.chmod(case.other, 0o700)
        os.chmod(case.imported + "/file", 0)
        os.chdir(case.other)
        os.close(os.open(path, os.O_PATH))
        seen = inotify_names(case.other, lambda: os.chmod(path, 0o600))
        return [size, os.access(path, os.R_OK), seen]

    assert attempt_in_worker(tree, meddle) == [6, True, ["file"]]


def test_inotify_tells_names_that_cannot_be_listed(tree: landlock.Tree) -> None:
    """Why unguessable names alone do not do: the filter must refuse inotify_add_watch as well."""
    hidden = os.path.join(tree.scratch, NO_NAME)
    os.mkdir(hidden)

    def watch(case: Case) -> object:
        listed = outcome_of(lambda: os.listdir(case.tree.scratch))
        return [listed, inotify_names(case.tree.scratch, lambda: os.chmod(hidden, 0o700))]

    assert attempt_in_worker(tree, watch) == ["EACCES", [NO_NAME]]


# -- verification ----------------------------------------------------------------------------------


def test_verification_finds_nothing_under_both_layers(tree: landlock.Tree) -> None:
    def verify(case: Case) -> object:
        return landlock.verify_worker(case.own, case.other, case.code, case.abi)

    assert attempt_in_worker(tree, verify) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="without root mknod is refused anyway")
def test_verification_names_each_claim_that_does_not_hold(tree: landlock.Tree) -> None:
    def verify(case: Case) -> object:
        return landlock.verify_worker(case.own, case.other, case.code, case.abi)

    found = attempt_in_worker(tree, verify, layers=False, capable=True)
    assert found == [
        "other slots cannot be listed",
        "other slots cannot be written",
        "slots cannot be listed",
        "nothing else can be written",
        "no device node can be made",
        *(["no TCP port can be bound"] if SUPPORT.abi >= 4 else []),
        *(["no other process can be signalled"] if SUPPORT.abi >= 6 else []),
    ]


def test_zygote_verifies_the_worker_layer_in_a_child_and_stays_unconfined_by_it(
    tree: landlock.Tree,
) -> None:
    def be_zygote() -> object:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        landlock.enter_base(tree, SUPPORT.abi)
        layer = landlock.WorkerLayer(tree, SUPPORT.abi)
        case = Case(tree, SUPPORT.abi)
        arguments = (layer, case.imported, case.other, case.code, SUPPORT.abi)
        first = landlock.verify_layer(*arguments)
        layer.close()
        broken = landlock.WorkerLayer(tree._replace(scratch="/"), SUPPORT.abi)
        second = landlock.verify_layer(broken, case.own + "/none", *arguments[2:])
        return [first, second, get(case.other + "/file")]

    first, second, text = in_child(be_zygote)
    assert first == []
    assert len(second) == 1
    assert second[0].startswith("the layer can be entered: FileNotFoundError")
    assert text == "secret"


# -- by ABI ----------------------------------------------------------------------------------------


def test_probe_says_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EOPNOTSUPP, "landlock_create_ruleset")

    monkeypatch.setattr(syscalls, "landlock_abi", refuse)
    assert landlock.probe() == (0, "EOPNOTSUPP")
    assert landlock.abi() == 0


@pytest.mark.parametrize("abi", range(1, landlock.NEWEST_ABI + 2))
def test_rights_of_each_abi_grant_nothing_that_it_does_not_handle(abi: int) -> None:
    rights = landlock.rights_for(abi)
    for granted in (rights.code, rights.data, rights.device, rights.scratch):
        assert granted & ~rights.handled_fs == 0
    never = landlock.MAKE_CHAR | landlock.MAKE_BLOCK | landlock.IOCTL_DEV
    assert (rights.code | rights.data | rights.device | rights.scratch) & never == 0
    bits = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16, 6: 16, 7: 16, 8: 16}.get(abi, 17)
    assert rights.handled_fs == (1 << bits) - 1
    assert (rights.handled_net, rights.scoped) == (int(abi >= 4), 3 if abi >= 6 else 0)
    assert bool(rights.flags) == (abi >= 7)


@pytest.mark.parametrize("abi", range(1, max(SUPPORT.abi, 1) + 1))
def test_both_layers_hold_for_files_at_every_abi(tree: landlock.Tree, abi: int) -> None:

    def attempt(case: Case) -> object:
        os.mkdir(case.own + "/d")
        return [
            put(case.own + "/new"),
            outcome_of(lambda: os.rename(case.own + "/new", case.own + "/d/new")),
            outcome_of(lambda: read_other_slot(case)),
            outcome_of(lambda: write_to_code(case)),
            landlock.verify_worker(case.own, case.other, case.code, abi),
        ]

    moved = None if abi >= 2 else "EXDEV"
    assert attempt_in_worker(tree, attempt, abi=abi) == ["x", moved, "EACCES", "EACCES", []]


def test_features_are_the_rights_and_each_absence_is_decided() -> None:
    assert substitutes(landlock.NEWEST_ABI) == []
    assert substitutes(0) == list(FEATURES)
    assert [feature.name for feature in substitutes(6)] == ["quiet_log", "tsync", "resolve_unix"]
    assert [f.since_abi for f in FEATURES] == sorted(f.since_abi for f in FEATURES)
    assert {f.since_abi for f in FEATURES if f.standing is Standing.REQUIRED} == {1}
    for feature in FEATURES:
        assert feature.protects
        assert feature.substitute


def test_jail_tree_is_the_top_level_without_links(tmp_path: Path) -> None:
    for name in ("usr/lib", "dev", "proc", "scratch/0", "toolkit"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "lib").symlink_to("usr/lib")
    tree = landlock.jail_tree(str(tmp_path))
    assert tree.code == tuple(str(tmp_path / name) for name in ("dev", "toolkit", "usr"))
    assert tree.data == (str(tmp_path / "proc"),)
    assert tree.scratch == str(tmp_path / "scratch")
    assert tree.import_scratch == str(tmp_path / "scratch" / "0")


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="other numbers")
def test_this_machines_kernel_is_asked() -> None:
    assert (SUPPORT.abi > 0) == (SUPPORT.reason == "")
