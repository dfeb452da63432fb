"""Descriptors that run out end what could not have them, and never the supervisor."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
from conftest import PATIENCE_S, LogLine, NodeMaker, ServedNode, toolkit_text

from atp_sandbox.egress import service as egress_service
from atp_sandbox.isolation import Isolation, Level, Waivable
from atp_sandbox.jails import jail as jail_module
from atp_sandbox.jails import janitor_service
from atp_sandbox.jails.farewell import Farewells
from atp_sandbox.jails.janitor_service import Duty, JanitorService
from atp_sandbox.jails.processes import ProcessHandle
from atp_sandbox.loop import Loop
from atp_sandbox.outcome import Kind
from atp_sandbox.toolkit import State


def run_out_once(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """The next process that `module` wants to watch cannot be; tells whether that was so."""
    refused: list[int] = []

    def refuse_once(pid: int) -> ProcessHandle:
        if not refused:
            refused.append(pid)
            raise OSError(errno.EMFILE, "Too many open files")
        return ProcessHandle(pid)

    monkeypatch.setattr(module, "ProcessHandle", refuse_once)
    return lambda: bool(refused)


def test_a_jail_that_cannot_be_watched_is_made_again(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(toolkit_text())
    was_refused = run_out_once(jail_module, monkeypatch)
    end_zygote(node)
    node.until(was_refused, "a jail that is refused")
    node.until(lambda: node.toolkit and node.toolkit.state is State.SERVING, "the next one")
    node.assert_healthy()


@pytest.mark.parametrize("moment", ["it starts", "its first worker starts", "a call runs"])
def test_a_jail_whose_memory_cannot_be_looked_at_is_made_again(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    body = "@tool\ndef nap(value, **_):\n    __import__('time').sleep(value)\n"
    without_groups = Isolation(Level.STRICT, frozenset({Waivable.CGROUP}))
    node = make_node(toolkit_text(body), isolation=without_groups)
    assert node.toolkit is not None
    refused: list[int] = []

    def look(pid: int) -> psutil.Process:
        assert node.toolkit is not None
        is_starting = node.toolkit.state is State.RESTARTING
        is_running = bool(node.toolkit.running)
        now = "it starts" if is_starting else "a call runs" if is_running else moment
        if now == moment and not refused:
            refused.append(pid)
            raise OSError(errno.EMFILE, "Too many open files")
        return psutil.Process(pid)

    stand_in = SimpleNamespace(Process=look, Error=psutil.Error)
    if moment == "a call runs":
        napping = node.submit("nap", {"value": 100})
        node.until(lambda: node.toolkit and node.toolkit.running, "a call at work")
        monkeypatch.setattr(jail_module, "psutil", stand_in)
        node.finish(napping)
        assert napping.failure.kind is Kind.CRASHED
    else:
        monkeypatch.setattr(jail_module, "psutil", stand_in)
        end_zygote(node)
    node.until(lambda: refused, "a look that is refused")
    node.until(lambda: node.toolkit and node.toolkit.state is State.SERVING, "the next one")
    node.assert_healthy()


def test_a_jail_that_cannot_be_launched_leaves_no_group_and_no_network(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(toolkit_text())
    refused: list[int] = []

    def refuse(loop: Loop) -> None:
        refused.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(jail_module, "OutputPipe", refuse)
        end_zygote(node)
        node.until(lambda: len(refused) == 2, "jails that are refused")
    node.until(lambda: node.toolkit and node.toolkit.state is State.SERVING, "the next one")
    node.assert_healthy()
    assert node.node.egress is not None
    assert len(node.node.egress._jails) == 1
    tree = node.node._cgroups
    assert tree is None or len([jail for jail in tree._jails if not jail.is_closed]) == 1


def test_many_descriptors_do_not_keep_jails_from_ending(loop: Loop) -> None:
    """select(2) knows none from 1024 on."""
    _, most = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and most < 2_000:
        pytest.skip(f"no more than {most} descriptors may be open here")
    ended: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (2_000, most))
    try:
        with contextlib.ExitStack() as held:
            for _ in range(1_024):
                held.callback(os.close, os.dup(0))
            pid = os.posix_spawn("/proc/self/exe", [sys.executable, "-I", "-S", "-c", ""], {})
            handle = ProcessHandle(pid)
            assert handle.fileno() >= 1_024
            farewells = Farewells(loop)
            farewells.add(handle, ended.append)
            farewells.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert ended == [0]


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def end_zygote(node: ServedNode) -> None:
    assert node.toolkit is not None
    assert node.toolkit._main is not None
    os.kill(node.toolkit._main._zygote_pid, signal.SIGKILL)
    node.until(lambda: node.toolkit and node.toolkit.state is State.RESTARTING, "its end")


def test_an_egress_process_that_cannot_be_watched_is_started_again(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(toolkit_text())
    egress = node.node.egress
    assert egress is not None
    was_refused = run_out_once(egress_service, monkeypatch)
    assert egress._process is not None
    egress._process.kill()
    node.until(was_refused, "one that is refused")
    node.until(lambda: egress._is_ready, "its successor")
    node.assert_healthy()


def test_a_janitor_that_cannot_be_watched_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogLine]
) -> None:
    was_refused = run_out_once(janitor_service, monkeypatch)
    loop = Loop()
    service = JanitorService(loop, Duty(str(tmp_path / "scratch-"), None))
    try:
        assert was_refused()
        assert loop.run_until(lambda: service._process is not None, PATIENCE_S)
        assert [line.event for line in logged] == ["janitor_ended"]
    finally:
        service.close()
        loop.close()
