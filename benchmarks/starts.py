"""How long it takes until calls are answered: after a start, and after something was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time

from benchmarks.loads import Load, echo
from benchmarks.machine import roles
from benchmarks.peer import Peer
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Settings, running
from benchmarks.statistics import Section

REPAIR_S = 20.0
GOOD = "good"


def measure(settings: Settings) -> Section:
    section = Section("starts", "ms, strict, one toolkit that imports nothing but the SDK")
    for number in range(settings.rounds):
        peer = sandbox(settings.folder / f"start-{number}", "call")
        try:
            began = time.perf_counter()
            peer.start()
            connected = time.perf_counter()
            peer.measure(0.0, echo(1))
            answered = time.perf_counter()
        finally:
            peer.stop()
        section.row("start", "until connected").add(ms=(connected - began) * 1e3)
        section.row("start", "until the first answer").add(ms=(answered - began) * 1e3)
        settings.on_progress(f"starts {number + 1}/{settings.rounds}: {answered - began:.2f} s")
    peer = sandbox(settings.folder / "kill", "calls:1000", "--concurrency", "1")
    with running(settings, peer):
        for number in range(settings.rounds * 3):
            # With five wardens killed in a minute the toolkit would be taken out of service.
            for role in ("worker", "warden") if number < settings.rounds else ("worker",):
                section.row(f"killed {role}", "until the next result").add(ms=_after(peer, role))
        settings.on_progress("starts: killed and replaced")
    section.notes.append(
        "A toolkit's cold start is what follows a killed warden: a new jail, the import, a worker."
    )
    return section


def _after(peer: Peer, role: str) -> float:
    """Milliseconds from the death of all workers, or of the warden (the jail), to a result."""
    peer.measure(0.05, echo(1))
    for pid in roles(peer.pid)[role]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    began = time.perf_counter()
    asked = Load("echo", {"value": GOOD})
    for _ in range(1000):
        texts = peer.ask(asked)
        if f'"{GOOD}"}}'.encode() in texts:
            return (time.perf_counter() - began) * 1e3
        if time.perf_counter() - began > REPAIR_S:
            break
        time.sleep(0.002)
    raise AssertionError(f"a killed {role} was not replaced within {REPAIR_S:g} s")
