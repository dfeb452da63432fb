"""The event loop on real descriptors, signals and threads."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest

from atp_sandbox.loop import READ, WRITE, Loop

PATIENCE_S = 30.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    yield one, other
    one.close()
    other.close()


def test_a_ready_descriptor_calls_back_with_its_events(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    seen: list[int] = []
    loop.watch(pair[0].fileno(), READ | WRITE, seen.append)
    loop.run_once()
    loop.watch(pair[0].fileno(), READ, seen.append)
    loop.run_once(0)
    pair[1].send(b"x")
    loop.run_once()
    assert seen == [WRITE, READ]


def test_a_forgotten_descriptor_is_not_called_even_if_it_was_ready_in_the_same_round(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    seen: list[int] = []

    def forget_the_other(fd: int, other: int) -> None:
        seen.append(fd)
        loop.unwatch(other)

    one, other = (end.fileno() for end in pair)
    loop.watch(one, WRITE, lambda _: forget_the_other(one, other))
    loop.watch(other, WRITE, lambda _: forget_the_other(other, one))
    loop.run_once()
    assert len(seen) == 1


def test_forgetting_an_unknown_or_closed_descriptor_is_no_error(loop: Loop) -> None:
    loop.unwatch(12_345)
    loop.unwatch(-1)


def test_timers_run_in_order_of_time_then_of_setting(loop: Loop) -> None:
    seen: list[str] = []
    now = loop.now()
    for when, name in ((now, "b"), (now - 1, "a"), (now, "c")):
        loop.call_at(when, lambda name=name: seen.append(name))  # type: ignore[misc]
    loop.run_once()
    assert seen == ["a", "b", "c"]


def test_a_timer_never_runs_early(loop: Loop) -> None:
    ran_at: list[float] = []
    timer = loop.call_later(0.02, lambda: ran_at.append(loop.now()))
    assert loop.run_until(lambda: bool(ran_at), PATIENCE_S)
    assert ran_at[0] >= timer.when


def test_a_cancelled_timer_does_not_run_and_may_be_cancelled_again(loop: Loop) -> None:
    seen: list[int] = []
    timer = loop.call_at(loop.now(), lambda: seen.append(1))
    timer.cancel()
    timer.cancel()
    loop.run_once(0)
    assert seen == []


def test_a_timer_that_sets_itself_again_leaves_room_for_everything_else(loop: Loop) -> None:
    rounds: list[int] = []

    def again() -> None:
        rounds.append(1)
        loop.call_at(loop.now(), again)

    again()
    loop.run_once()
    assert len(rounds) == 2


def test_what_is_to_run_soon_runs_after_the_events_at_hand_once(
    loop: Loop, pair: tuple[socket.socket, socket.socket]
) -> None:
    seen: list[str] = []

    def on_ready(_events: int) -> None:
        loop.call_soon(lambda: seen.append("soon"))
        seen.append("event")

    loop.watch(pair[0].fileno(), WRITE, on_ready)
    loop.run_once()
    loop.unwatch(pair[0].fileno())
    loop.run_once(0)
    assert seen == ["event", "soon"]


def test_a_call_from_another_thread_wakes_the_loop(loop: Loop) -> None:
    seen: list[int] = []
    thread = threading.Thread(
        target=lambda: [loop.call_from_thread(lambda n=n: seen.append(n)) for n in range(2_000)]  # type: ignore[misc]
    )
    thread.start()
    assert loop.run_until(lambda: len(seen) == 2_000, PATIENCE_S)
    thread.join()
    assert seen == list(range(2_000))


def test_a_signal_calls_back_in_the_loop_however_many_calls_are_waiting(loop: Loop) -> None:
    seen: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: seen.append("signal"))
    for _ in range(10_000):
        loop.call_from_thread(lambda: None)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert loop.run_until(lambda: bool(seen), PATIENCE_S)


def test_closing_gives_back_signal_handlers_and_descriptors() -> None:
    gc.collect()  # what earlier tests left must not be closed meanwhile
    before = signal.getsignal(signal.SIGUSR1), len(os.listdir("/proc/self/fd"))
    loop = Loop()
    loop.on_signal(signal.SIGUSR1, lambda: None)
    loop.close()
    assert (signal.getsignal(signal.SIGUSR1), len(os.listdir("/proc/self/fd"))) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_running_ends_with_stop_and_with_an_exception_of_a_callback(loop: Loop) -> None:
    loop.call_soon(loop.stop)
    loop.run()

    def fail() -> None:
        raise RuntimeError("ours")

    loop.call_soon(fail)
    with pytest.raises(RuntimeError, match="ours"):
        loop.run()


def test_waiting_for_a_condition_says_whether_it_came(loop: Loop) -> None:
    assert loop.run_until(lambda: True, 0)
    assert not loop.run_until(lambda: False, 0.01)


def test_what_is_to_come_last_comes_after_all_else_of_the_same_turn(loop: Loop) -> None:
    seen: list[str] = []

    def at_end() -> None:
        seen.append("last")
        loop.call_last(lambda: seen.append("later"))

    loop.call_last(at_end)
    loop.call_soon(lambda: seen.append("soon"))
    loop.call_later(0, lambda: seen.append("timer"))
    loop.run_once()
    assert seen == ["timer", "soon", "last"]
    loop.run_once()
    assert seen[3:] == ["later"]
