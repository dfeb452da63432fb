"""What a tool may do in its jail: next to nothing, and there is no way out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import LogLine, NodeMaker, ServedNode, toolkit_text

from atp_sandbox.jails.processes import ProcessStatus, read_status

ROOT = Path(__file__).resolve().parents[1]
CAP_SYS_CHROOT = 1 << 18


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(toolkit_text(), env={"REGION": "eu"})


def jail_processes() -> dict[int, ProcessStatus]:
    """Every process of the jails that this test process has; workers may come and go meanwhile."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(ProcessLookupError):
            status = read_status(process.pid)
            if status.namespace_depth > len(own_namespaces("NSpid")):
                found[process.pid] = status
    return found


def own_namespaces(row: str) -> list[str]:
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return rows[row].split()


# -- privileges ------------------------------------------------------------------------------------


def test_tool_has_no_capability_and_can_gain_none(node: ServedNode) -> None:
    def look() -> dict[str, str]:
        with open("/proc/self/status") as file:
            return {row[0]: row[1].strip() for row in (line.split(":", 1) for line in file)}

    status = node.inside(look)
    for name in ("CapEff", "CapPrm", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[name], 16) == 0, name
    assert status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == ["1000"] * 4
    assert status["Gid"].split() == ["1000"] * 4
    # An ordinary user cannot give up the groups that he came with; unmapped, they name nobody.
    assert set(status["Groups"].split()) <= {"1000", "65534"}


def test_every_process_of_a_jail_is_unprivileged_as_seen_from_outside(node: ServedNode) -> None:
    node.assert_healthy()
    statuses = jail_processes().values()
    wardens = [status for status in statuses if status.parent_pid == os.getpid()]
    assert wardens
    for status in statuses:
        if status not in wardens:
            # A zygote keeps the one with which its workers change to roots of their own.
            assert status.capabilities in (0, CAP_SYS_CHROOT)
            assert status.bounding == 0
            assert status.no_new_privs
            assert status.is_filtered
        if os.geteuid() == 0:
            assert status.uid not in (0, 1000)


def test_tool_runs_in_namespaces_of_its_own(node: ServedNode) -> None:
    names = ("pid", "net", "ipc", "uts", "user", "mnt", "cgroup")

    def look(names: list[str]) -> list[int]:
        import os

        return [os.stat(f"/proc/self/ns/{name}").st_ino for name in names]

    ours = [os.stat(f"/proc/self/ns/{name}").st_ino for name in names]
    for name, outer, inner in zip(names, ours, node.inside(look, list(names)), strict=True):
        assert outer != inner, name


def attempt(what: str, *arguments: Any) -> str:
    """Do something that must be refused; the name of the error, or `allowed`."""
    import ctypes
    import errno
    import os
    import signal
    import socket

    libc = ctypes.CDLL(None, use_errno=True)

    def system_call(number: int, *values: Any) -> None:
        if libc.syscall(number, *values) < 0:
            raise OSError(ctypes.get_errno(), what)

    def library_call(name: str, *values: Any) -> None:
        if getattr(libc, name)(*values) < 0:
            raise OSError(ctypes.get_errno(), name)

    try:
        match what:
            case "unshare user":
                library_call("unshare", 0x10000000)
            case "unshare":
                library_call("unshare", int(arguments[0]))
            case "mount tmpfs":
                library_call("mount", b"none", os.environ["HOME"].encode(), b"tmpfs", 0, None)
            case "remount":
                library_call("mount", b"none", b"/toolkit", None, 32 | 4096, None)
            case "unmount":
                library_call("umount2", arguments[0].encode(), 2)
            case "chroot":
                os.chroot("/toolkit")
            case "hostname":
                socket.sethostname("mine")
            case "setuid":
                os.setuid(0)
            case "kill":
                os.kill(arguments[0], signal.SIGKILL)
            case "ptrace":
                library_call("ptrace", 16, arguments[0], 0, 0)
            case "write":
                os.close(os.open(arguments[0], os.O_WRONLY | os.O_CREAT, 0o600))
            case "make directory":
                os.mkdir(arguments[0])
            case "read":
                os.close(os.open(arguments[0], os.O_RDONLY))
            case "device":
                os.mknod(os.environ["HOME"] + "/device", 0o20600, os.makedev(1, 1))
                os.close(os.open(os.environ["HOME"] + "/device", os.O_RDWR))
            case "raw socket":
                socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).close()
            case "connect":
                with socket.create_connection(tuple(arguments), timeout=3):
                    pass
            case "bpf":
                system_call({"x86_64": 321}.get(os.uname().machine, 280), 0, 0, 0)
            case "setns":
                fd = os.open("/proc/self/ns/net", os.O_RDONLY)
                library_call("setns", fd, 0)
            case _:
                return "no such attempt"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return "allowed"


@pytest.mark.parametrize(
    "attempted",
    [
        ("unshare user",),
        ("unshare", 0x20000),
        ("unshare", 0x20000000),
        ("unshare", 0x40000000),
        ("mount tmpfs",),
        ("remount",),
        ("unmount", "/toolkit"),
        ("unmount", "/proc"),
        ("chroot",),
        ("hostname",),
        ("setuid",),
        ("ptrace", 1),
        ("ptrace", 2),
        ("device",),
        ("raw socket",),
        ("bpf",),
        ("setns",),
        ("read", "/proc/1/mem"),
        ("read", "/proc/1/environ"),
        ("read", "/proc/2/mem"),
        ("read", "/proc/kcore"),
        ("write", "/proc/sys/kernel/hostname"),
        ("write", "/proc/sys/user/max_user_namespaces"),
        ("write", "/proc/sysrq-trigger"),
        ("connect", "169.254.169.254", 80),
        ("connect", "10.0.0.1", 80),
        ("connect", "8.8.8.8", 53),
    ],
    ids=lambda attempted: " ".join(map(str, attempted)),
)
def test_tool_is_refused(node: ServedNode, attempted: tuple[Any, ...]) -> None:
    refusal = node.inside(attempt, *attempted)
    assert refusal not in ("allowed", "no such attempt")
    node.assert_healthy()


@pytest.mark.parametrize("victim", [1, 2, -1], ids=["warden", "zygote", "everybody"])
def test_tool_cannot_kill_what_the_jail_rests_on(
    make_node: NodeMaker, logged: list[LogLine], victim: int
) -> None:
    """The kernel may say that it worked; what counts is who lives."""

    def wait() -> str:
        import time

        time.sleep(0.5)
        return "finished"

    node = make_node(toolkit_text())
    bystander = node.begin_inside(wait)
    node.until(lambda: node.toolkit is not None and node.toolkit.running == 1, "one at work")
    node.finish(node.begin_inside(attempt, "kill", victim))
    node.finish(bystander)
    assert bystander.value == "finished"
    node.assert_healthy()
    assert [line.message for line in logged if line.event == "jail_ended"] == []


def test_kernel_holds_no_environment_or_arguments_of_ours(node: ServedNode) -> None:
    for pid in jail_processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
        except (PermissionError, FileNotFoundError, ProcessLookupError):
            continue  # not dumpable, and we are no root; or it has ended
        assert environment == b""
        assert b"/toolkit" not in arguments


@pytest.mark.parametrize(
    "where",
    [
        "/new",
        "/etc/new",
        "/etc/passwd",
        "/toolkit/new",
        "/dev/new",
        "/usr/lib/new",
        "/tmp/new",
        "/scratch/new",
        os.path.dirname(json.__file__) + "/new",
        os.path.dirname(pytest.__file__) + "/new",
    ],
)
def test_nothing_but_scratch_is_writable(node: ServedNode, where: str) -> None:
    refusals = {node.inside(attempt, what, where) for what in ("write", "make directory")}
    assert "allowed" not in refusals


# -- network ---------------------------------------------------------------------------------------


def test_services_of_the_machine_cannot_be_reached(node: ServedNode, tmp_path: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as named,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        named.bind(str(tmp_path / "socket"))
        named.listen()
        abstract.bind("\0atp-sandbox-test-" + str(os.getpid()))
        abstract.listen()

        def connect(port: int, path: str, name: str) -> list[str]:
            import errno
            import socket

            refused = []
            for family, address in (
                (socket.AF_INET, ("127.0.0.1", port)),
                (socket.AF_UNIX, path),
                (socket.AF_UNIX, "\0" + name),
            ):
                try:
                    with socket.socket(family) as sock:
                        sock.settimeout(5)
                        sock.connect(address)
                    refused.append("connected")
                except OSError as error:
                    refused.append(errno.errorcode[error.errno or 0])
            return refused

        name = "atp-sandbox-test-" + str(os.getpid())
        answers = node.inside(connect, tcp.getsockname()[1], str(tmp_path / "socket"), name)
        assert "connected" not in answers
        tcp.settimeout(0.01)
        with pytest.raises(TimeoutError):
            tcp.accept()


def test_jail_has_no_interface_but_loopback(node: ServedNode) -> None:
    def look() -> list[str]:
        import socket

        try:
            return [name for _, name in socket.if_nameindex()]
        except OSError:
            pass  # it asks over netlink, which may be refused altogether
        found = []
        for index in range(1, 10):
            try:
                found.append(socket.if_indextoname(index))
            except OSError:
                continue
        return found

    assert set(node.inside(look)) <= {"lo"}
