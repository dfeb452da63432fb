"""A supervisor that is asked to stop answers everything it took, and is gone in time."""

from __future__ import annotations

import collections
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import FakeBackend, FakeLink, Serving, wait_until_gone
from conftest import processes_named, toolkit_text, wait_until, write_tree

from atp_sandbox import background
from atp_sandbox.drain import GOODBYE_S, LAST_S, SEND_GRACE_S, SEND_LAST_S, Drain, Step

KEY = "S3CRET-key-of-the-operator"
NOISE_S = 1.5
"""What a busy machine may add to `LAST_S`, which holds on one that is not."""

KIT = """
    import ctypes, os, signal, time

    def mark(comm):
        if comm:  # to be seen from outside, as of prctl(PR_SET_NAME)
            ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)

    @tool
    def {name}_slow(value=0, **_):
        time.sleep(value)
        return "slept"

    @tool
    def {name}_stubborn(value=None, comm="", **_):
        mark(comm)
        for number in range(1, 65):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        while True:
            ctypes.PyDLL(None).sleep(1000)

    @tool
    def {name}_much(**_):
        return "x" * 900_000
"""


# -- the decision ----------------------------------------------------------------------------------


def test_idle_and_settled_supervisor_closes_its_links_at_once() -> None:
    drain = Drain(100.0, 30.0)
    assert drain.step(100.0, is_idle=True, is_settled=True) is Step.CLOSE_LINKS
    assert drain.step(100.0 + GOODBYE_S - 0.01, is_idle=True, is_settled=True) is Step.WAIT
    assert drain.step(100.0 + GOODBYE_S, is_idle=True, is_settled=True) is Step.LEAVE


def test_running_calls_have_the_grace_and_are_interrupted_once() -> None:
    drain = Drain(100.0, 30.0)
    assert drain.step(129.9, is_idle=False, is_settled=False) is Step.WAIT
    assert drain.step(130.0, is_idle=False, is_settled=False) is Step.INTERRUPT
    assert drain.step(130.1, is_idle=True, is_settled=False) is Step.WAIT
    assert drain.step(130.2, is_idle=True, is_settled=True) is Step.CLOSE_LINKS


@pytest.mark.parametrize("is_idle", [True, False])
def test_answers_that_cannot_leave_hold_nothing_up(is_idle: bool) -> None:
    drain, now, steps = Drain(100.0, 30.0), 100.0, []
    while not steps or steps[-1] is not Step.LEAVE:
        now += 0.01
        steps.append(drain.step(now, is_idle=is_idle, is_settled=False))
    expected = SEND_GRACE_S if is_idle else 30.0 + SEND_LAST_S
    assert now == pytest.approx(100.0 + expected + GOODBYE_S, abs=0.05)
    assert steps.count(Step.INTERRUPT) == (not is_idle)
    # Before jails end: whoever reads the operator's files may be kept by a file system.
    assert SEND_LAST_S + GOODBYE_S + background.CLOSE_S < LAST_S
    assert 0 <= drain.patience_s(now) < 30.0


# -- the process -----------------------------------------------------------------------------------


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def serving(folder: Path, url: str, *arguments: str, names: tuple[str, ...] = ("a",)) -> Serving:
    for name in names:
        text = toolkit_text(KIT.replace("{name}", name)).replace("def probe", f"def {name}_probe")
        write_tree(folder, {f"{name}.py": text})
    paths = [folder / f"{name}.py" for name in names]
    options = ("--base-url", url, *arguments)
    return Serving(*paths, *options, state_dir=folder / "state", ATP_API_KEY=KEY)


def end_in_time(serve: Serving, grace_s: float, number: int = signal.SIGTERM) -> float:
    """Ask it to stop; exit 0 comes in time, and nothing of it is left. How long it took."""
    family = serve.family()
    began = time.monotonic()
    assert serve.stop(number) == 0
    seconds = time.monotonic() - began
    assert seconds < grace_s + LAST_S + NOISE_S
    wait_until_gone(family, timeout_s=1.0)
    return seconds


def kinds(link: FakeLink) -> collections.Counter[str]:
    return collections.Counter(
        answer["result"].get("error_type") if isinstance(answer["result"], dict) else "ok"
        for answer in link.answers
    )


def begin_stubborn(link: FakeLink, tool: str = "a_stubborn") -> None:
    """One call that no signal but SIGKILL ends, at work."""
    comm = f"stub-{os.getpid()}"
    link.request("stubborn", tool, comm=comm)
    wait_until(lambda: processes_named(comm), "the tool to run")


def test_every_request_of_hundreds_has_one_answer_when_the_grace_ends_under_load(
    tmp_path: Path, backend: FakeBackend
) -> None:
    names = ("a", "b", "c")
    with serving(tmp_path, backend.url, "--grace", "2s", names=names) as serve:
        link = backend.accept()
        begin_stubborn(link)
        asked: dict[Any, str] = {"stubborn": "a_stubborn"}
        for number in range(300):
            asked[number] = f"{names[number % 3]}_{'slow' if number % 5 else 'stubborn'}"
            link.request(number, asked[number], value=0.02)
        link.call("last", "nosuch")  # so those before it have arrived
        end_in_time(serve, 2.0)
        answers = {answer["request_id"]: answer["result"] for answer in link.answers}
        assert len(link.texts) == len(answers) == len(asked) + 1
        assert answers.keys() == asked.keys() | {"last"}
    interrupted = answers["stubborn"]
    assert (interrupted["error_type"], interrupted["retryable"]) == ("interrupted", False)
    found = kinds(link)
    assert set(found) == {"ok", "interrupted", "unavailable", "unknown_tool"}
    assert 1 <= found["interrupted"] <= 3 * 4
    assert found["unavailable"] > 100


@pytest.mark.parametrize("isolation", ["strict", "none"])
def test_tool_that_ignores_everything_is_interrupted_after_the_grace_and_gone(
    tmp_path: Path, backend: FakeBackend, isolation: str
) -> None:
    more = ("--grace", "1s", "--isolation", isolation)
    with serving(tmp_path, backend.url, *more) as serve:
        link = backend.accept()
        begin_stubborn(link)
        assert end_in_time(serve, 1.0, signal.SIGINT) >= 1.0
        assert link.result("stubborn") == {
            "error": "The server ended while the tool ran.",
            "error_type": "interrupted",
            "retryable": False,
        }
        assert link.close_code == 1000


def test_backend_that_does_not_read_holds_nothing_up(tmp_path: Path) -> None:
    with FakeBackend() as backend, serving(tmp_path, backend.url, "--grace", "1s") as serve:
        link = backend.accept()
        link.reads.clear()
        for number in range(24):  # more than the buffers of both sides take
            link.request(number, "a_much")
        begin_stubborn(link)
        end_in_time(serve, 1.0)


def test_backend_that_is_away_holds_nothing_up(tmp_path: Path) -> None:
    with FakeBackend() as backend, serving(tmp_path, backend.url, "--grace", "1s") as serve:
        link = backend.accept()
        begin_stubborn(link)
        backend.refuse_with = 503
        link.cut()
        serve.wait_for("the backend refused the connection")
        end_in_time(serve, 1.0)


def test_link_that_is_just_connecting_holds_nothing_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serving(tmp_path, url, "--grace", "1s") as serve:
            silent.settimeout(30.0)
            connection, _ = silent.accept()
            with connection:
                end_in_time(serve, 1.0)
