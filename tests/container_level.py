"""The level `container`, from inside a process that may not create namespaces.

Not collected by itself: `test_container_level.py` runs it in surroundings like a container's.
"""

from __future__ import annotations

import errno
import getpass
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import (
    NodeMaker,
    ServedNode,
    node_maker,
    processes_named,
    toolkit_text,
    wait_until,
)

from atp_sandbox.errors import IsolationError
from atp_sandbox.isolation import Isolation, Level
from atp_sandbox.jails.processes import read_status
from atp_sandbox.outcome import Kind

ROOT = Path(__file__).resolve().parents[1]
CONTAINER = Isolation(Level.CONTAINER)
MIB = 1024 * 1024
REFUSALS = tuple(f"[Errno {int(n)}]" for n in (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT))

BODY = """
    import os

    with open(os.path.expanduser("~/left"), "w") as file:
        file.write("by the import")
"""


@pytest.fixture(autouse=True, scope="session")
def reachable_folders(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A root supervisor's toolkits run as users who must be able to reach their snapshots."""
    base = tmp_path_factory.getbasetemp()
    for path in (base, *base.parents):
        if path.owner() == getpass.getuser() and path.stat().st_mode & 0o077 == 0:
            path.chmod(0o755)


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[NodeMaker]:
    tmp_path.chmod(0o755)
    yield from node_maker(tmp_path)


@pytest.fixture(scope="module")
def make_module_node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeMaker]:
    folder = tmp_path_factory.mktemp("nodes")
    folder.chmod(0o755)
    yield from node_maker(folder)


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(
        toolkit_text(BODY),
        isolation=CONTAINER,
        time_s=4.0,
        memory_bytes=64 * MIB,
        scratch_bytes=16 * MIB,
    )


def refused(node: ServedNode, attempt: Callable[..., Any], *arguments: Any) -> None:
    """What would work out here, as far as it can be tried, does not in there."""
    ticket = node.begin_inside(attempt, *arguments)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.TOOL_ERROR
    assert ticket.failure.error.startswith(REFUSALS), ticket.failure.error


def own_descendants() -> list[int]:
    return [process.pid for process in psutil.Process().children(recursive=True)]


# -- surroundings ----------------------------------------------------------------------------------


def test_there_are_no_namespaces_to_be_had_here(make_node: NodeMaker) -> None:
    strict = make_node(toolkit_text())
    assert isinstance(strict.error, IsolationError)
    assert "namespace" in strict.error.message
    assert "--isolation container" in strict.error.tip


# -- it works --------------------------------------------------------------------------------------


def test_tools_answer_and_write_to_their_scratch(node: ServedNode) -> None:
    def attempt() -> list[str]:
        import os
        import tempfile

        with tempfile.NamedTemporaryFile("w+") as file:
            file.write("text")
        here = open("kit.py").readline()  # noqa: SIM115
        return [os.path.basename(file.name)[:3], here.strip()[:4], os.listdir(os.environ["HOME"])]  # type: ignore[list-item]

    assert node.inside(attempt)[0] == "tmp"
    assert node.inside(attempt)[2] == []


def test_what_the_import_left_is_read_by_each_call_and_changed_by_none(node: ServedNode) -> None:
    def read() -> str:
        import os

        with open(os.environ["HOME"] + "/../0/left") as file:
            return file.read()

    def write() -> None:
        import os

        open(os.environ["HOME"] + "/../0/left", "w").close()

    assert node.inside(read) == "by the import"
    refused(node, write)
    assert node.inside(read) == "by the import"


def test_threads_and_socket_pairs_work(node: ServedNode) -> None:
    def attempt() -> str:
        import asyncio

        async def wait() -> str:
            return await asyncio.to_thread(lambda: "from a thread")

        return asyncio.run(wait())

    assert node.inside(attempt) == "from a thread"


# -- and is kept from the machine ------------------------------------------------------------------


def test_files_of_the_machine_cannot_be_read(node: ServedNode, tmp_path: Path) -> None:
    def attempt(path: str) -> None:
        import os

        if os.path.isdir(path):
            os.listdir(path)
        else:
            open(path).close()

    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (tmp_path, secret):
        path.chmod(0o755)
    for path in (
        "/etc/passwd",
        "/",
        "/home",
        "/proc",
        "/proc/self/environ",
        "/sys",
        "/run",
        "/tmp",
    ):
        refused(node, attempt, path)
    refused(node, attempt, str(secret))
    refused(node, attempt, f"/proc/{os.getpid()}/cmdline")


def test_nothing_but_scratch_can_be_written(node: ServedNode, tmp_path: Path) -> None:
    def attempt(path: str) -> None:
        open(path, "w").close()

    tmp_path.chmod(0o777)
    name = f"atp-new-{os.getpid()}"
    for path in ("kit.py", name, f"/tmp/{name}", f"/dev/shm/{name}", str(tmp_path / name)):
        refused(node, attempt, path)
    assert list(tmp_path.iterdir()) == []


def test_no_socket_can_be_made(node: ServedNode) -> None:
    def attempt(family: int, kind: int) -> None:
        import socket

        socket.socket(family, kind).close()

    with socket.create_server(("127.0.0.1", 0)):
        for family, kind in ((2, 1), (2, 2), (10, 1), (1, 1), (16, 3), (40, 1)):
            refused(node, attempt, family, kind)


def test_no_process_outside_can_be_signalled_or_traced(node: ServedNode) -> None:
    def kill(pid: int) -> None:
        import os

        os.kill(pid, 0)

    def trace(pid: int) -> None:
        import os

        os.open(f"/proc/{pid}/mem", os.O_RDONLY)

    for pid in (os.getpid(), *own_descendants()[:1]):
        refused(node, kill, pid)
        refused(node, trace, pid)


def test_modes_of_the_machines_files_cannot_be_changed(node: ServedNode, tmp_path: Path) -> None:
    """Landlock has no right for that, and without root the files belong to the same user."""

    def attempt(path: str) -> None:
        import os

        for change in (lambda: os.chmod(path, 0o4777), lambda: os.utime(path, (1, 1))):
            try:
                change()
            except OSError:
                continue

    mine = tmp_path / "mine"
    mine.touch(mode=0o600)
    node.inside(attempt, str(mine))
    node.inside(attempt, str(tmp_path.parent))
    assert mine.stat().st_mode & 0o7777 == 0o600
    assert mine.stat().st_mtime > 1
    assert tmp_path.parent.stat().st_mode & 0o7777 != 0o4777


def test_no_datagram_reaches_a_socket_of_the_machine(node: ServedNode, tmp_path: Path) -> None:
    def attempt(path: str) -> None:
        import socket

        socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b"x", path)

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as log:
        log.bind(str(tmp_path / "log"))
        (tmp_path / "log").chmod(0o777)
        refused(node, attempt, str(tmp_path / "log"))


def test_call_that_closes_its_own_scratch_harms_no_other(node: ServedNode) -> None:
    def close_all() -> None:
        import os

        for path in (os.environ["HOME"], os.path.dirname(os.environ["HOME"])):
            os.chmod(path, 0)
        for number in range(300):
            os.mkdir(f"{os.environ['HOME']}/{number}", 0o300)
        raise ValueError("my own words")

    def work() -> str:
        import os
        import time

        time.sleep(0.5)
        with open(os.environ["HOME"] + "/file", "w") as file:
            file.write("text")
        return "worked"

    beside = node.begin_inside(work)
    hostile = node.begin_inside(close_all)
    node.finish(beside, hostile)
    assert beside.value == "worked"
    assert hostile.failure.kind in (Kind.TOOL_ERROR, Kind.DISK_LIMIT)
    assert node.inside(work) == "worked"


def test_neither_processes_nor_privileges_are_to_be_had(node: ServedNode) -> None:
    def fork() -> None:
        import os

        os.fork()

    def unshare() -> None:
        import ctypes
        import os

        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(0x10000000):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    refused(node, fork)
    refused(node, unshare)


def test_every_process_is_unprivileged_as_seen_from_outside(node: ServedNode) -> None:
    node.assert_healthy()
    seen = 0
    for pid in own_descendants():
        try:
            status = read_status(pid)
        except ProcessLookupError:
            continue
        assert status.capabilities == 0
        if os.geteuid() == 0:
            assert status.uid != 0
            assert status.bounding == 0
        if status.parent_pid != os.getpid():
            seen += 1
            assert status.no_new_privs
            assert status.is_filtered
    assert seen


def test_calls_cannot_reach_each_others_scratch(node: ServedNode) -> None:
    def keep(seconds: float) -> str:
        import os
        import time

        with open(os.environ["HOME"] + "/secret", "w") as file:
            file.write("secret")
        time.sleep(seconds)
        return os.environ["HOME"]

    def read(parent: str, own_number: int) -> list[str]:
        import os

        found = []
        for number in range(1, 14):
            if str(number) == os.path.basename(os.environ["HOME"]):
                continue
            for attempt in (os.listdir, lambda path: open(path + "/secret")):  # noqa: SIM115
                try:
                    attempt(f"{parent}/{number}")
                    found.append(f"{parent}/{number}")
                except (PermissionError, FileNotFoundError):
                    pass
        return found

    home = node.inside(keep, 0.0)
    sleeper = node.begin_inside(keep, 2.0)
    node.until(lambda: node.toolkit is not None and node.toolkit.running == 1, "one at work")
    assert node.inside(read, os.path.dirname(home), 0) == []
    assert not sleeper.outcomes
    node.finish(sleeper)


# -- limits ----------------------------------------------------------------------------------------


def test_limits_name_themselves(node: ServedNode) -> None:
    def hang() -> None:
        import time

        time.sleep(1000)

    def take_memory() -> None:
        import os
        import time

        kept = bytearray(os.urandom(1)) * (200 * 1024 * 1024)  # noqa: F841
        time.sleep(1000)

    def fill() -> None:
        import os
        import time

        for number in range(5):
            with open(os.environ["HOME"] + f"/{number}", "wb") as file:
                file.write(b"x" * 5 * 1024 * 1024)
        time.sleep(1000)

    def leave() -> None:
        import os

        os._exit(3)

    for attempt, kind in (
        (fill, Kind.DISK_LIMIT),
        (take_memory, Kind.MEMORY_LIMIT),
        (leave, Kind.CRASHED),
        (hang, Kind.TIMEOUT),
    ):
        ticket = node.begin_inside(attempt)
        node.finish(ticket)
        assert ticket.failure.kind is kind
    node.assert_healthy()


def test_scratch_of_any_shape_is_removed_after_its_call(make_node: NodeMaker) -> None:
    def litter() -> str:
        import os

        os.chdir(os.environ["HOME"])
        for _ in range(200):
            os.mkdir("deeper")
            os.chdir("deeper")
        os.chdir(os.environ["HOME"])
        os.mkdir("closed")
        os.mkdir("closed/inner")
        os.chmod("closed/inner", 0)
        os.chmod("closed", 0)
        os.symlink("/", "link")
        return os.environ["HOME"]

    node = make_node(toolkit_text(), isolation=CONTAINER, concurrency=1)
    homes = {node.inside(litter) for _ in range(8)}
    assert len(homes) < 8, "a slot was used again, after its removal"
    scratch = Path(homes.pop()).parent
    assert scratch.exists()
    node.close()
    assert not scratch.exists()


# -- ends ------------------------------------------------------------------------------------------


def name_and_wait(comm: str) -> None:
    import ctypes
    import time

    ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    time.sleep(1000)


def test_nothing_is_left_after_an_orderly_end(make_node: NodeMaker) -> None:
    comm = f"atp-c-o-{os.getpid() % 100000}"
    before = set(own_descendants())
    node = make_node(toolkit_text(), isolation=CONTAINER)
    node.begin_inside(name_and_wait, comm)
    node.until(lambda: processes_named(comm), "the tool to be seen from outside")
    node.close()
    assert not processes_named(comm)
    assert set(own_descendants()) <= before


@pytest.mark.parametrize("who", ["supervisor", "warden"])
def test_killed_supervisor_or_warden_leaves_nothing(tmp_path: Path, who: str) -> None:
    comm = f"atp-c-{who[0]}-{os.getpid() % 100000}"
    tmp_path.chmod(0o755)
    kit = tmp_path / "kit.py"
    kit.write_text(toolkit_text())
    source = (
        f"def f():\n import ctypes, time\n"
        f" ctypes.CDLL(None).prctl(15, {comm!r}.encode(), 0, 0, 0)\n time.sleep(1000)"
    )
    command = [sys.executable, "-m", "atp_sandbox", "call", str(kit), "probe", "--isolation"]
    command += ["container", f"source={source}", "name=f", "arguments:=[]"]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as supervisor:
        wait_until(lambda: processes_named(comm), "the tool to be seen from outside")
        all_of_it = psutil.Process(supervisor.pid).children(recursive=True)
        assert len(all_of_it) >= 3
        if who == "supervisor":
            supervisor.kill()
        else:
            (worker,) = processes_named(comm)
            os.kill(read_status(worker).parent_pid, signal.SIGKILL)
        gone = [p.pid for p in all_of_it]
        wait_until(lambda: not any(map(is_alive, gone)), "the end of all", timeout_s=5.0)
        if who == "warden":
            assert supervisor.wait(30) == 1


def leave_grandchild(comm: str, seconds: float) -> str:
    """A process in a session of its own, as far as it can have one, that goes on for ever."""
    import ctypes
    import os
    import subprocess
    import time

    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
            os.write(writer, b"x")
            time.sleep(1000)
        os._exit(0)
    os.read(reader, 1)
    time.sleep(seconds)
    return subprocess.check_output("echo program", shell=True, text=True)


def test_what_programs_started_goes_with_a_warden_that_is_killed(make_node: NodeMaker) -> None:
    comm = f"atp-c-k-{os.getpid() % 100000}"
    node = make_node(toolkit_text(), isolation=CONTAINER, programs=True, concurrency=1)
    ticket = node.begin_inside(leave_grandchild, comm, 1000)
    node.until(lambda: processes_named(comm), "the process to be seen from outside")
    (grandchild,) = processes_named(comm)
    group = os.getpgid(grandchild)
    os.kill(read_status(group).parent_pid, signal.SIGKILL)
    node.finish(ticket)
    assert ticket.failure.kind is Kind.CRASHED
    node.until(lambda: not processes_named(comm), "its end", timeout_s=2.0)


def test_programs_may_be_started_and_end_with_their_call(make_node: NodeMaker) -> None:
    comm = f"atp-c-p-{os.getpid() % 100000}"
    node = make_node(toolkit_text(), isolation=CONTAINER, programs=True)
    ticket = node.begin_inside(leave_grandchild, comm, 0.0)
    node.finish(ticket)
    assert ticket.value == "program\n"
    node.until(lambda: not processes_named(comm), "its end", timeout_s=2.0)


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
