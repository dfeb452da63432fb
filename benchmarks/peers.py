"""The sandbox beside its peers, its floors and the load generator's own limit, all in turn."""

from __future__ import annotations

import contextlib
import sys
from functools import partial

from benchmarks import floors, pools, published_sdk
from benchmarks.loads import ECHO_BYTES, echo
from benchmarks.peer import Peer
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Measures, Settings, in_turn, running
from benchmarks.statistics import Section

POOLS_OUTSTANDING = 16
SDK, UNCHECKED, NULL = "published SDK 0.1.0", "unchecked loop", "null peer"


def measure(settings: Settings) -> Section:
    section = Section("peers", "echo of 300 bytes: websocket peers, pools called directly, floors")
    measures: Measures = {}
    absent: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for arm, peer in _websocket_peers(settings, absent).items():
            stack.enter_context(running(settings, peer))
            for outstanding in (16, 64):
                case = f"{outstanding} outstanding"
                measures[arm, case] = partial(peer.measure, settings.seconds, echo(outstanding))
        measures |= _pools(settings, absent)
        measures |= _floors(settings)
        in_turn(settings, section, measures)
    for arm, why in absent.items():
        section.row(arm, "").remark = f"not measured: {why}"
    section.notes.append(
        f"`{NULL}` answers at once without looking: what the load generator itself can do. Pools "
        "are called directly, by no websocket, and isolate nothing."
    )
    return section


def _websocket_peers(settings: Settings, absent: dict[str, str]) -> dict[str, Peer]:
    folder = settings.folder
    peers = {
        "sandbox call": sandbox(folder / "call", "call"),
        "sandbox calls:1000": sandbox(folder / "calls", "calls:1000"),
        UNCHECKED: Peer(folder / "unchecked", partial(_module_command, "unchecked")),
        NULL: Peer(folder / "null", partial(_module_command, "null_peer", str(ECHO_BYTES))),
    }
    why = published_sdk.missing()
    if why:
        absent[SDK] = why
    else:
        peers[SDK] = Peer(folder / "sdk", published_sdk.command, PYTHONPATH="")
    return peers


def _module_command(module: str, *arguments: str) -> list[str]:
    """The address comes last in `arguments` and goes first on the command line."""
    return [sys.executable, "-m", f"benchmarks.{module}", arguments[-1], *arguments[:-1]]


def _pools(settings: Settings, absent: dict[str, str]) -> Measures:
    measures: Measures = {}
    for name in pools.POOLS:
        why = pools.missing(name)
        if why:
            absent[name] = f"needs {why}"
            continue
        measures[name, f"{POOLS_OUTSTANDING} outstanding"] = partial(
            pools.measure_pool, name, "echo", POOLS_OUTSTANDING, settings.seconds
        )
    return measures


def _floors(settings: Settings) -> Measures:
    one, seconds = "one after the other", settings.seconds
    return {
        ("raw fork loop", one): partial(floors.measure_fork_loop, seconds),
        ("raw fork loop", "two at once"): partial(floors.measure_fork_loop_two, seconds),
        ("socket pair ping-pong", one): partial(floors.measure_pingpong, seconds),
    }
