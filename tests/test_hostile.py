"""Every case of the hostile corpus, through a whole supervisor, with the oracles that it names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hostile import faults
from hostile.harness import (
    ALLOWED,
    NEIGHBOUR_IDLE_S,
    Case,
    EgressSession,
    Session,
    Verdict,
    load_cases,
)
from hostile.imports import SAMPLED, ImportSession

CASES = load_cases()
TOOLKITS = ("fs", "proc", "syscalls", "net", "tokens", "ipc", "crash", "resource", "results")
SESSIONS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "main": (TOOLKITS, {"time": "2s"}),
    # R19 holds what it took for three seconds, R26 burns for ten, N05 waits for three servers in
    # turn, and the victim of I03 sleeps for two seconds.
    "long": (("resource", "net", "ipc"), {"time": "15s"}),
    # C37 returns around its deadline, two hundred times.
    "race": (("crash",), {"time": "0.25s", "concurrency": 8}),
    # X18 opens connections for up to ten seconds.
    "egress": (("proxy", "net"), {"time": "15s"}),
}
_ELSEWHERE = {"R19": "long", "R26": "long", "N05": "long", "I03": "long", "C37": "race"}

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.xdist_group("hostile")]
_needs_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="makes network namespaces and pids groups of its own: needs root"
)


def _session_of(case: Case) -> str:
    return "egress" if case.needs_egress else _ELSEWHERE.get(case.id, "main")


def _ordered() -> list[Case]:
    """Controls first; then the index's order, one session after the other."""
    served = [c for c in CASES.values() if c.steps and not c.is_import]
    names = list(SESSIONS)
    return sorted(served, key=lambda c: (names.index(_session_of(c)), not c.id.startswith("G")))


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sessions]:
    made = Sessions(tmp_path_factory.mktemp("hostile"))
    yield made
    made.close()


class Sessions:
    """At most one live session; another begins where a case needs other settings."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        folder.parent.chmod(0o755)
        self._folder = folder
        self._name = ""
        self._live: Session | None = None
        self.problems: dict[str, list[str]] = {}
        """What was found at the end of each session."""

    def get(self, name: str) -> Session:
        if name != self._name or self._live is None:
            self.close()
            files, settings = SESSIONS[name]
            kind = EgressSession if name == "egress" else Session
            self._live = kind(self._folder / name, files, **settings)
            self._name = name
        return self._live

    def close(self) -> None:
        if self._live is not None:
            self.problems[self._name] = self._live.whole_session_problems()
            self._live.close()
            self._live = None


def _as_parameters(cases: Iterable[Case]) -> list[Any]:
    """An ordinary user has no cell, and runs only what can be judged without one."""
    found = []
    for case in cases:
        marks = [] if _session_of(case) == "egress" else [_needs_root]
        found.append(pytest.param(case, id=case.id, marks=marks))
    return found


@pytest.mark.parametrize("case", _as_parameters(_ordered()))
def test_case(case: Case, sessions: Sessions) -> None:
    verdict: Verdict = sessions.get(_session_of(case)).run(case)
    print(verdict)
    assert not verdict.problems, f"\n{verdict}"


# -- toolkits that have a way out ------------------------------------------------------------------


@pytest.fixture
def egress(sessions: Sessions) -> EgressSession:
    session = sessions.get("egress")
    assert isinstance(session, EgressSession)
    return session


@pytest.mark.parametrize(
    "case",
    [case for case in CASES.values() if case.file == "toolkit_net.py"],
    ids=lambda case: case.id,
)
def test_a_way_out_opens_none_beside_it(case: Case, egress: EgressSession) -> None:
    verdict = egress.run(case)
    print(verdict)
    assert not verdict.problems, f"\n{verdict}"


def test_tls_gets_through_to_an_allowed_host(egress: EgressSession) -> None:
    """What X06 sends in its place does not."""
    egress.begin_case()
    assert egress.call("neighbour_fetch", {"url": f"https://{ALLOWED}/ok"}).result == "ok"
    assert [a.is_tls for a in egress.arrivals()] == [True]


def test_a_honeypot_is_in_reach_of_the_egress_process(egress: EgressSession) -> None:
    """O5 would see it."""
    before = len(egress.honeypots.look())
    egress.call("neighbour_fetch", {"url": f"http://honeypot.{ALLOWED}/"})
    assert egress.honeypots.look()[before:] == ["127.0.0.1"]


def test_the_resolver_is_asked_for_what_is_allowed_and_for_nothing_else(
    egress: EgressSession,
) -> None:
    """O10 would see it."""
    sink = egress.honeypots.sink
    if sink is None:
        pytest.skip("only root can give a process another resolver, by a mount of its own")
    answers = [
        egress.call("neighbour_fetch", {"url": f"http://{name}/"}).result
        for name in (f"unrouted.{ALLOWED}", "unrouted.canary.invalid")
    ]
    assert set(sink.questions) == {f"unrouted.{ALLOWED}"}
    assert [answer[:22] for answer in answers] == [
        "failed: HTTP Error 502",
        "failed: HTTP Error 403",
    ]


def test_a_plain_request_that_is_never_answered_ends_with_the_idle_limit(
    egress: EgressSession,
) -> None:
    """Else tools that make them use up the connections of their toolkit for good."""
    egress.begin_case()
    answer = egress.call("neighbour_fetch", {"url": f"http://{ALLOWED}/sink"}).result
    assert len(egress.arrivals()) == 1, answer
    assert egress.stand_in.wait_quiet(4 * NEIGHBOUR_IDLE_S)


def test_nothing_shows_when_everything_is_over(sessions: Sessions) -> None:
    sessions.close()
    assert not any(sessions.problems.values()), sessions.problems


# -- toolkits that are hostile while they are imported ---------------------------------------------

IMPORTS = [case for case in CASES.values() if case.is_import]


@pytest.fixture(scope="module")
def imported(
    tmp_path_factory: pytest.TempPathFactory, silent_network: faults.InBackground
) -> Iterator[ImportSession]:
    folder = tmp_path_factory.mktemp("imports")
    session = ImportSession(folder, [case for case in IMPORTS if case.id != SAMPLED])
    yield session
    session.close()


@_needs_root
@pytest.mark.parametrize(
    "case", [case for case in IMPORTS if case.id != SAMPLED], ids=lambda case: case.id
)
def test_import_case(case: Case, imported: ImportSession) -> None:
    verdict = imported.judge_import(case)
    print(verdict)
    assert not verdict.problems, f"\n{verdict}"


@_needs_root
def test_import_case_with_samples(tmp_path: Path) -> None:
    case = CASES[SAMPLED]
    session = ImportSession(tmp_path, [case], sample_responses=True)
    try:
        verdict = session.judge_import(case)
        assert not verdict.problems, f"\n{verdict}"
    finally:
        session.close()


# -- the connection, the backend, the machine ------------------------------------------------------


@pytest.fixture(scope="module")
def silent_network(tmp_path_factory: pytest.TempPathFactory) -> faults.InBackground:
    return faults.InBackground(tmp_path_factory.mktemp("silent"))


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, silent_network: faults.InBackground
) -> Iterator[Session]:
    session = Session(tmp_path_factory.mktemp("faults"), ("crash",), time="6s", concurrency=8)
    yield session
    session.close()


DIFFERENT = {
    "H10": "a request of 64 MiB is refused as a message (1009), which ends the connection",
    "H24": "SDK and backend know no registration on reconnect: PROTOCOL, and serve does none",
}
"""Faults that end otherwise than the corpus asks, and why."""


def _with_differences(names: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.xfail(reason=DIFFERENT[name], strict=True))
        if name in DIFFERENT
        else name
        for name in names
    ]


@_needs_root
@pytest.mark.parametrize("name", _with_differences(faults.SHARED))
def test_fault(name: str, shared: Session) -> None:
    problems = faults.SHARED[name](shared)
    if problems and all(problem.startswith(faults.BY_CLOCK) for problem in problems):
        print("looked at twice; the first time:", problems)
        problems = faults.SHARED[name](shared)
    assert problems == []


@_needs_root
@pytest.mark.parametrize("name", faults.OWN_SESSION)
def test_fault_that_ends_the_supervisor(name: str, tmp_path: Path) -> None:
    session = Session(tmp_path, ("crash",), time="4s")
    try:
        assert faults.OWN_SESSION[name](session) == []
    finally:
        session.close()


@_needs_root
@pytest.mark.parametrize("name", faults.OWN_SETUP)
def test_fault_of_the_machine(name: str, tmp_path: Path) -> None:
    assert faults.OWN_SETUP[name](tmp_path / name) == []


@_needs_root
def test_fault_of_a_silent_network(silent_network: faults.InBackground) -> None:
    """H02."""
    assert silent_network.result() == []


# -- what is left out ------------------------------------------------------------------------------


def test_no_case_is_left_out() -> None:
    run = {case.id for case in _ordered()} | {case.id for case in IMPORTS} | {"H02"}
    run |= {*faults.SHARED, *faults.OWN_SESSION, *faults.OWN_SETUP}
    assert run == CASES.keys()
