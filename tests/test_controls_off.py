"""Each control of a jail, switched off once: what it holds must then get out, or be noticed.

A test of an escape proves something only if the escape works without the control. Here a copy of
`workers` with one line changed builds the jail, and the same attempt is made with and without.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LogLine, NodeMaker, ServedNode, toolkit_text

import atp_sandbox.jails.jail as jail_module
import atp_sandbox.jails.launch as launch_module
from atp_sandbox.errors import IsolationError
from atp_sandbox.isolation import Isolation, Waivable
from atp_sandbox.node import Node
from atp_sandbox.outcome import Success

WORKERS = Path(__file__).resolve().parents[1] / "workers"
IS_ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not IS_ROOT, reason="a control of a root supervisor")
NO_SECCOMP = Isolation(waived=frozenset({Waivable.SECCOMP}))
NO_LANDLOCK = Isolation(waived=frozenset({Waivable.LANDLOCK}))
NO_FILTERS = Isolation(waived=frozenset({Waivable.SECCOMP, Waivable.LANDLOCK}))

Change = tuple[str, str, str]
"""A file of `workers`, what stands in it once, what stands there instead."""
Without = Callable[..., None]


@pytest.fixture
def without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Without:
    """`without(change, …)`: jails are built by our code without those controls from now on."""

    def switch_off(*changes: Change) -> None:
        copy = tmp_path / "workers"
        shutil.copytree(WORKERS, copy, ignore=shutil.ignore_patterns("__pycache__"))
        for name, control, nothing in changes:
            path = copy / name
            text = path.read_text()
            assert text.count(control) == 1, f"{name}: {control!r} stands there no more"
            path.write_text(text.replace(control, nothing))
        monkeypatch.setattr(launch_module, "_BOOT", copy / "boot.py")

    return switch_off


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor does not look at the zygote either, which would have noticed."""
    monkeypatch.setattr(jail_module, "what_is_wrong", lambda *_: "")


def attempted(node: ServedNode, attempt: Callable[..., Any], *arguments: Any) -> Any:
    """What came of the attempt, or the error's first words."""
    ticket = node.begin_inside(attempt, *arguments)
    node.finish(ticket)
    return ticket.value if isinstance(ticket.outcome, Success) else ticket.failure.error


# -- what gets out ---------------------------------------------------------------------------------


def test_network_namespace(
    make_node: NodeMaker, without: Without, unseen: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(port: int) -> str:
        import socket

        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            return connection.recv(100).decode()

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        held = attempted(make_node(toolkit_text()), connect, port)
        assert held == "[Errno 111] Connection refused"
        without(
            ("confinement/namespaces.py", "    | syscalls.CLONE_NEWNET\n", ""),
            ("warden.py", '        _step("loopback", namespaces.bring_loopback_up)\n', ""),
        )
        # The warden could not bind its ports on this machine, which would end the start.
        monkeypatch.setattr(Node, "_provide_egress", lambda *_: None)
        node = make_node(toolkit_text())
        ticket = node.begin_inside(connect, port)
        server.setblocking(False)
        peers: list[socket.socket] = []

        def accepted() -> bool:
            try:
                peers.append(server.accept()[0])
            except BlockingIOError:
                return False
            return True

        node.until(accepted, "the escape")
        peers[0].sendall(b"from outside")
        peers[0].close()
        node.finish(ticket)
        assert ticket.value == "from outside"


def test_ipc_namespace(make_node: NodeMaker, without: Without, unseen: None) -> None:
    def attach(key: int) -> int:
        import ctypes

        return ctypes.CDLL(None).shmget(key, 0, 0)

    libc = ctypes.CDLL(None)
    key = 0x61747000 + os.getpid() % 4096
    segment = libc.shmget(key, 4096, 0o1666)
    assert segment >= 0
    try:
        assert attempted(make_node(toolkit_text(), isolation=NO_SECCOMP), attach, key) == -1
        without(("confinement/namespaces.py", "    | syscalls.CLONE_NEWIPC\n", ""))
        found = attempted(make_node(toolkit_text(), isolation=NO_SECCOMP), attach, key)
        assert found == segment
    finally:
        libc.shmctl(segment, 0, None)


def test_uts_namespace_and_its_name(make_node: NodeMaker, without: Without, unseen: None) -> None:
    def look() -> str:
        import os

        return os.uname().nodename

    assert attempted(make_node(toolkit_text()), look) == "jail"
    without(("warden.py", '        _step("hostname", namespaces.name_host, "jail")\n', ""))
    assert attempted(make_node(toolkit_text()), look) == os.uname().nodename


def test_nested_user_namespaces(make_node: NodeMaker, without: Without) -> None:
    def unshare() -> str:
        import ctypes
        import os

        libc = ctypes.CDLL(None, use_errno=True)
        return os.strerror(ctypes.get_errno()) if libc.unshare(0x10000000) else "a namespace"

    def attempt() -> Any:
        # Seccomp is asked before the limit, and a worker's own root forbids it too.
        node = make_node(toolkit_text(), isolation=NO_SECCOMP, lifetime="jail")
        return attempted(node, unshare)

    assert attempt() == os.strerror(errno.ENOSPC)
    step = '        _step("nested_namespaces", namespaces.forbid_nested_user_namespaces)\n'
    without(("warden.py", step, ""))
    assert attempt() == "a namespace"


def test_hidden_processes(make_node: NodeMaker, without: Without) -> None:
    def look() -> list[str]:
        import os

        return sorted(name for name in os.listdir("/proc") if name.isdigit())

    assert len(attempted(make_node(toolkit_text()), look)) == 1
    without(("confinement/root.py", '"hidepid=4,subset=pid"', '"subset=pid"'))
    assert len(attempted(make_node(toolkit_text()), look)) >= 3


def test_limited_scratch(make_node: NodeMaker, without: Without) -> None:
    def fill() -> int:
        import os

        total = 0
        for number in range(4):
            with open(f"{os.environ['HOME']}/{number}", "wb") as file:
                total += file.write(b"x" * (2 * 1024 * 1024))
        return total

    limit = 4 * 1024 * 1024
    held = attempted(make_node(toolkit_text(), scratch_bytes=limit), fill)
    assert "disk limit" in held
    without(("confinement/scratch.py", "size={scratch['bytes']}", "size=1g"))
    assert attempted(make_node(toolkit_text(), scratch_bytes=limit), fill) == 2 * limit


def test_read_only_import_scratch(make_node: NodeMaker, without: Without) -> None:
    def write() -> str:
        open("/scratch/0/left", "w").close()
        return "written"

    assert "Read-only" in attempted(make_node(toolkit_text(), isolation=NO_LANDLOCK), write)
    without(
        (
            "confinement/scratch.py",
            "        syscalls.mount_set_attributes(left, syscalls.MOUNT_ATTR_RDONLY, "
            "recursive=False)\n",
            "",
        )
    )
    assert attempted(make_node(toolkit_text(), isolation=NO_LANDLOCK), write) == "written"


def test_read_only_root(make_node: NodeMaker, without: Without) -> None:
    def write() -> str:
        open("/tmp/new", "w").close()
        return "written"

    assert "Read-only" in attempted(make_node(toolkit_text(), isolation=NO_LANDLOCK), write)
    without(
        (
            "confinement/root.py",
            '    syscalls.mount_set_attributes("/", _READ_ONLY, recursive=False)\n',
            "",
        )
    )
    # Directories that a root supervisor made are not the jail's user's either.
    escaped = "[Errno 13] Permission denied: '/tmp/new'" if IS_ROOT else "written"
    assert attempted(make_node(toolkit_text(), isolation=NO_LANDLOCK), write) == escaped


def chmod_others() -> list[str]:
    """Take another call's scratch away from it, by a name that anybody can guess."""
    import os

    found = []
    for number in range(1, 14):
        path = f"/slots/{number}/scratch/1"
        try:
            os.chmod(path, 0o700)
            found.append(path)
        except OSError:
            continue
    return found


def test_own_root_of_each_worker(make_node: NodeMaker, without: Without) -> None:
    assert attempted(make_node(toolkit_text()), chmod_others) == []
    without(
        (
            "confinement/layers.py",
            "            _change_root(view)\n            priv",
            "            priv",
        ),
        (
            "confinement/layers.py",
            '        _step("own_root", _try_view, places)\n',
            "        pass\n",
        ),
        (
            "confinement/layers.py",
            "            self.files.enter(self.places.inside(slot))\n",
            "            self.files.enter(self.places.outside(slot))\n",
        ),
    )
    assert len(attempted(make_node(toolkit_text()), chmod_others)) >= 2


def test_views_that_do_not_hold_each_other(make_node: NodeMaker, without: Without) -> None:
    assert attempted(make_node(toolkit_text()), chmod_others) == []
    without(
        (
            "confinement/scratch.py",
            '            syscalls.mount("none", _VIEWS, None, syscalls.MS_UNBINDABLE)\n',
            "",
        ),
        (
            "confinement/layers.py",
            '        _step("own_root", _try_view, places)\n',
            "        pass\n",
        ),
    )
    # Each view then doubles the mounts: of more slots there would be more than the kernel allows.
    node = make_node(toolkit_text(), concurrency=1)
    assert any(attempted(node, chmod_others) for _ in range(4))


def test_worker_filter(make_node: NodeMaker, without: Without, logged: list[LogLine]) -> None:
    """Without it a call can leave a process behind; the jail then ends, because it is unknown."""

    def leave() -> str:
        import os
        import sys
        import time

        if sys.modules["_atp_jail.confinement.syscalls"].fork_as_sibling() == 0:
            time.sleep(1000)
            os._exit(0)
        return "left"

    assert "Operation not permitted" in attempted(make_node(toolkit_text()), leave)
    without(("confinement/layers.py", "            self.calls.install()\n", "            pass\n"))
    node = make_node(toolkit_text())
    ticket = node.begin_inside(leave)
    node.until(lambda: any(line.event == "jail_ended" for line in logged), "the end of the jail")
    assert ticket.outcomes
    (ended,) = [line for line in logged if line.event == "jail_ended"]
    assert ended.fields["reason"] == "an unknown process ran in it"


# -- what is noticed before any foreign line runs --------------------------------------------------


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        pytest.param(
            (
                "confinement/privileges.py",
                "    syscalls.keep_capabilities(1 << syscalls.CAP_SYS_CHROOT if may_change_root "
                "else 0)\n",
                "",
            ),
            "it still has capabilities",
            id="capabilities kept",
        ),
        pytest.param(
            (
                "confinement/privileges.py",
                "            syscalls.prctl(syscalls.PR_CAPBSET_DROP, capability)\n",
                "            pass\n",
            ),
            "it could get capabilities again",
            id="bounding set kept",
        ),
        *(
            pytest.param(
                ("confinement/namespaces.py", f"    | syscalls.CLONE_NEW{name.upper()}\n", ""),
                f"it shares our namespaces: {name}",
                id=f"{name} namespace shared",
            )
            for name in ("ipc", "cgroup")
        ),
        pytest.param(
            (
                "zygote.py",
                "        zygote.confine()\n",
                "        zygote.confine(); zygote.kept = open('/etc/hosts')\n",
            ),
            "it has a descriptor of /etc/hosts",
            id="file open",
        ),
        pytest.param(
            (
                "zygote.py",
                "        zygote.confine()\n",
                "        zygote.confine(); zygote.kept = socket.socketpair()\n",
            ),
            "it has a socket that is not its own",
            id="sockets open",
        ),
        pytest.param(
            (
                "confinement/layers.py",
                '    _step("seccomp", seccomp.install, '
                "seccomp.compile_profile(base, syscalls.MACHINE))\n",
                "",
            ),
            "seccomp: mode 0",
            id="filter not installed",
        ),
        pytest.param(
            (
                "confinement/layers.py",
                '    _step("landlock", landlock.enter_base, tree, support.abi)\n',
                "",
            ),
            "does not hold: the root cannot be listed",
            id="base layer not entered",
        ),
        pytest.param(
            (
                "confinement/landlock.py",
                "            _restrict(self._handled, [*self._rules, own], self._rights.flags)\n",
                "            pass\n",
            ),
            "does not hold: ",
            id="worker layer not entered",
        ),
        pytest.param(
            (
                "confinement/scratch.py",
                '            syscalls.mount("none", _VIEWS, None, syscalls.MS_UNBINDABLE)\n',
                "",
            ),
            "another slot can be reached",
            id="views hold each other",
        ),
        pytest.param(
            (
                "warden.py",
                '        _step("identity", namespaces.become_user, outside_id)\n    _',
                "    _",
            ),
            "it runs as user 0",
            id="own user not taken",
            marks=needs_root,
        ),
    ],
)
def test_what_did_not_take_hold_stops_the_start(
    make_node: NodeMaker, without: Without, change: Change, noticed: str
) -> None:
    without(change)
    node = make_node(toolkit_text())
    assert isinstance(node.error, IsolationError), "the toolkit was imported"
    assert noticed in node.error.cause
