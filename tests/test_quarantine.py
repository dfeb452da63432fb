"""A toolkit that crashes again and again is out of service for a while; others notice nothing."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backends import FakeBackend, Serving
from conftest import LogLine, NodeMaker, ServedNode, toolkit_text, wait_until
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox import toolkit as toolkit_module
from atp_sandbox.journal import UNAVAILABLE
from atp_sandbox.node_call import NodeCall
from atp_sandbox.outcome import Failure, Kind
from atp_sandbox.scheduling import quarantine as module
from atp_sandbox.scheduling.quarantine import (
    CRASHES,
    FIRST_S,
    HEALTHY_S,
    LONGEST_S,
    PERSISTS_S,
    TRYING_S,
    WINDOW_S,
    Phase,
    Quarantine,
)
from atp_sandbox.toolkit import State

# -- the decision ----------------------------------------------------------------------------------


def opened(now: float = 0.0) -> Quarantine:
    quarantine = Quarantine()
    assert not quarantine.worker_crashed(now - PERSISTS_S)
    for _ in range(CRASHES - 2):
        assert not quarantine.worker_crashed(now)
    assert quarantine.worker_crashed(now)
    return quarantine


def refused(quarantine: Quarantine, now: float) -> bool:
    return quarantine.refusal("kit", now) is not None


def test_five_crashes_of_every_worker_open_it_and_fewer_do_not() -> None:
    quarantine = Quarantine()
    for _ in range(3 * CRASHES):
        for _ in range(CRASHES - 1):
            assert not quarantine.worker_crashed(0.0)
        assert not quarantine.worker_survived(0.0)
        assert not refused(quarantine, 0.0)
    assert opened().phase is Phase.OPEN


def test_a_burst_of_calls_that_crash_does_not_open_it() -> None:
    quarantine = Quarantine()
    for number in range(100):
        assert not quarantine.worker_crashed(number * PERSISTS_S / 100)
    assert quarantine.worker_crashed(PERSISTS_S)


def test_crashes_far_apart_do_not_count() -> None:
    quarantine = Quarantine()
    for number in range(3 * CRASHES):
        assert not quarantine.worker_crashed(number * (WINDOW_S / (CRASHES - 1) + 0.01))
        assert not quarantine.jail_crashed(number * (WINDOW_S / (CRASHES - 1) + 0.01))


def test_five_ends_of_the_jail_open_it_whatever_calls_did() -> None:
    quarantine = Quarantine()
    for number in range(CRASHES):
        quarantine.worker_survived(float(number))
        assert quarantine.jail_crashed(float(number)) is (number == CRASHES - 1)


def test_a_refusal_says_why_and_when_to_come_again() -> None:
    failure = opened().refusal("kit", FIRST_S / 4)
    assert failure is not None
    assert failure.kind is Kind.UNAVAILABLE
    assert failure.retry_after_s == pytest.approx(FIRST_S * 3 / 4, abs=0.06)
    assert "kit is out of service: it crashed 5 times in 60 s" in failure.error


def test_one_call_at_a_time_tries_and_its_end_decides() -> None:
    quarantine = opened()
    assert refused(quarantine, FIRST_S - 0.01)
    assert not refused(quarantine, FIRST_S)
    assert refused(quarantine, FIRST_S)
    quarantine.call_vanished()
    assert not refused(quarantine, FIRST_S)
    assert quarantine.worker_survived(FIRST_S)
    assert quarantine.phase is Phase.CLOSED
    assert not refused(quarantine, FIRST_S)
    assert not quarantine.worker_crashed(FIRST_S)  # it begins to count anew


def test_each_try_that_crashes_doubles_the_wait_up_to_its_bound() -> None:
    quarantine, now, waits = opened(), 0.0, []
    for _ in range(9):
        waits.append(quarantine.until - now)
        now = quarantine.until
        assert not refused(quarantine, now)
        assert quarantine.worker_crashed(now)
    assert waits == [1, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S, LONGEST_S]


@pytest.mark.parametrize(("healthy_s", "wait_s"), [(HEALTHY_S - 1, 2.0), (HEALTHY_S + 1, 1.0)])
def test_after_a_while_in_service_it_begins_with_the_shortest_wait(
    healthy_s: float, wait_s: float
) -> None:
    quarantine = opened()
    refused(quarantine, FIRST_S)
    quarantine.worker_survived(FIRST_S)
    now = FIRST_S + healthy_s
    quarantine.worker_crashed(now - PERSISTS_S)
    for _ in range(CRASHES - 1):
        quarantine.worker_crashed(now)
    assert quarantine.until - now == wait_s


@given(st.lists(st.sampled_from(["jail", "crash", "end", "vanish", "ask", "wait"]), max_size=80))
def test_it_is_never_refused_for_longer_than_the_bound(events: list[str]) -> None:
    quarantine, now = Quarantine(), 0.0
    for event in events:
        match event:
            case "jail":
                quarantine.jail_crashed(now)
            case "crash":
                quarantine.worker_crashed(now)
            case "end":
                quarantine.worker_survived(now)
            case "vanish":
                quarantine.call_vanished()
            case "ask":
                failure = quarantine.refusal("kit", now)
                assert failure is None or 0 < (failure.retry_after_s or 0) <= LONGEST_S
            case _:
                now += 0.7
    quarantine.call_vanished()
    assert quarantine.refusal("kit", now + LONGEST_S) is None


# -- on the real thing -----------------------------------------------------------------------------

KIT = """
    import os

    @tool
    def crash(**_):
        os._exit(9)

    @tool
    def fail(**_):
        raise ValueError("as ever")
"""


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERSISTS_S", 0.0)


def kill_zygote(node: ServedNode) -> None:
    assert node.toolkit is not None
    main = node.toolkit._main
    assert main is not None
    os.kill(main._zygote_pid, signal.SIGKILL)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("lifetime", ["call", "calls:10", "jail"])
def test_a_toolkit_whose_every_call_crashes_is_quarantined_and_one_good_call_brings_it_back(
    make_node: NodeMaker, lifetime: str, logged: list[LogLine]
) -> None:
    node = make_node(toolkit_text(KIT), lifetime=lifetime)
    for _ in range(CRASHES):
        assert node.call("crash").failure.kind is Kind.CRASHED
    refusal = node.call("probe").failure
    assert (refusal.kind, refusal.retryable) == (Kind.UNAVAILABLE, True)
    assert refusal.retry_after_s is not None
    assert 0 < refusal.retry_after_s <= FIRST_S
    late = node.loop.now() + refusal.retry_after_s + 0.1
    node.until(lambda: node.loop.now() >= late, "the next try")
    assert node.call("crash").failure.kind is Kind.CRASHED  # the one that tries
    assert node.call("probe").failure.kind is Kind.UNAVAILABLE
    assert node.toolkit is not None
    node.until(lambda: node.loop.now() >= node.toolkit.quarantine.until, "the one after it")
    node.assert_healthy()
    for _ in range(2 * CRASHES):
        node.call("crash")
        node.call("fail")
    node.assert_healthy()
    events = [line.event for line in logged if "quarantined" in line.event or "rest" in line.event]
    assert events == ["toolkit_quarantined", "toolkit_quarantined", "toolkit_restored"]


@pytest.mark.usefixtures("at_once")
def test_calls_that_wait_are_told_when_their_toolkit_is_quarantined(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text(KIT), concurrency=1)
    tickets = [node.submit("crash") for _ in range(CRASHES + 3)]
    node.finish(*tickets)
    kinds = [ticket.failure.kind for ticket in tickets]
    assert kinds[:CRASHES] == [Kind.CRASHED] * CRASHES
    # One more may have been at work already.
    assert kinds[CRASHES + 1 :] == [Kind.UNAVAILABLE] * 2


def test_a_zygote_that_ends_again_and_again_is_quarantined_and_then_made_anew(
    make_node: NodeMaker, logged: list[LogLine]
) -> None:
    node = make_node(toolkit_text(KIT))
    assert node.toolkit is not None
    for number in range(CRASHES):
        node.assert_healthy()
        kill_zygote(node)
        node.until(lambda: node.toolkit.state is State.RESTARTING, "its end")
        if number < CRASHES - 1:
            node.until(lambda: node.toolkit.state is State.SERVING, "the next one")
    assert node.call("fail").failure.kind is Kind.UNAVAILABLE
    node.until(lambda: node.toolkit.state is State.SERVING, "the one after the quarantine")
    node.assert_healthy()
    assert [line.event for line in logged][-1] == "toolkit_restored"


def test_a_toolkit_that_cannot_start_again_says_that_and_not_that_it_crashed(
    make_node: NodeMaker, tmp_path: Path
) -> None:
    """Its import fails where what it was given by the machine is gone."""
    node = make_node(toolkit_text(KIT))
    assert node.toolkit is not None
    make_jail, tried = node.toolkit._make_jail, []

    def refuse() -> object:
        tried.append(1)
        raise OSError(24, "Too many open files")

    node.toolkit._make_jail = refuse  # type: ignore[method-assign,assignment]
    kill_zygote(node)
    node.until(lambda: tried, "a start that fails")
    failure = node.call("fail").failure
    assert failure.kind is Kind.UNAVAILABLE
    assert "could not be started again" in failure.error
    assert failure.retry_after_s is not None
    node.toolkit._make_jail = make_jail  # type: ignore[method-assign]
    node.until(lambda: node.toolkit.state is State.SERVING, "its return")
    node.assert_healthy()


def test_a_call_that_its_worker_was_not_handed_shows_nothing(make_node: NodeMaker) -> None:
    node = make_node(toolkit_text(KIT))
    assert node.toolkit is not None
    node.toolkit.quarantine.phase = Phase.TRYING
    hand_over = node.call_starting

    def refuse(call: NodeCall, go: object, refuse: Callable[[Failure], None]) -> None:
        refuse(UNAVAILABLE)

    node.call_starting = refuse  # type: ignore[method-assign]
    assert node.call("fail").failure == UNAVAILABLE
    assert node.toolkit.quarantine.phase is Phase.TRYING
    node.call_starting = hand_over  # type: ignore[method-assign]
    node.assert_healthy()
    assert node.toolkit.quarantine.phase is Phase.CLOSED


def test_starts_that_fail_are_ever_rarer_however_long_each_takes(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = make_node(toolkit_text(KIT))
    assert node.toolkit is not None
    monkeypatch.setattr(toolkit_module, "_STABLE_S", -1.0)
    tries: list[float] = []

    def refuse() -> object:
        tries.append(node.loop.now())
        raise OSError(24, "Too many open files")

    node.toolkit._make_jail = refuse  # type: ignore[method-assign,assignment]
    kill_zygote(node)
    node.until(lambda: len(tries) == 4, "starts that fail")
    first, _, third, fourth = tries
    assert (third - first, fourth - third) >= (0.2 + 0.4, 0.8)
    retry_after_s = node.call("fail").failure.retry_after_s
    assert retry_after_s is not None
    assert 1.0 < retry_after_s <= 1.6


def test_while_a_start_is_tried_nobody_is_sent_away_for_as_long_as_it_may_take(
    make_node: NodeMaker,
) -> None:
    node = make_node(toolkit_text(KIT))
    assert node.toolkit is not None
    make_jail, tried = node.toolkit._make_jail, []

    def refuse() -> object:
        tried.append(1)
        raise OSError(24, "Too many open files")

    node.toolkit._make_jail = refuse  # type: ignore[method-assign,assignment]
    kill_zygote(node)
    node.until(lambda: tried, "a start that fails")
    node.toolkit._make_jail = make_jail  # type: ignore[method-assign]
    node.until(lambda: node.toolkit and node.toolkit._main, "the next one")
    assert node.call("fail").failure.retry_after_s == TRYING_S


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def test_other_toolkits_do_not_notice(tmp_path: Path, backend: FakeBackend) -> None:
    (tmp_path / "bad.py").write_text(toolkit_text(KIT))
    (tmp_path / "good.py").write_text(
        toolkit_text("@tool\ndef echo(value=None, **_):\n    return value\n")
    )
    with Serving(
        *(tmp_path / "bad.py", tmp_path / "good.py", "--base-url", backend.url),
        state_dir=tmp_path / "state",
        ATP_API_KEY="key",
    ) as serve:
        link = backend.accept()
        wanted = itertools.count()

        def is_quarantined() -> bool:
            number = next(wanted)
            link.request(f"bad {number}", "crash")
            link.request(f"good {number}", "echo", value=number)
            assert link.result(f"good {number}") == number
            return bool(link.result(f"bad {number}")["error_type"] == "unavailable")

        wait_until(is_quarantined, "the quarantine")
        assert link.call("as ever", "echo", value=1) == 1
        assert "out of service" in serve.log
        assert serve.stop() == 0
