"""Every case of the hostile corpus, through a whole supervisor, with the oracles that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hostile.harness import Case, Session, Verdict, load_cases

CASES = load_cases()
TOOLKITS = ("fs", "proc", "syscalls", "net", "tokens", "ipc", "crash", "resource", "results")
SESSIONS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "main": (TOOLKITS, {"time": "2s"}),
    # R19 holds what it took for three seconds, R26 burns for ten, N05 waits for three servers in
    # turn, and the victim of I03 sleeps for two seconds.
    "long": (("resource", "net", "ipc"), {"time": "15s"}),
    # C37 returns around its deadline, two hundred times.
    "race": (("crash",), {"time": "0.25s", "concurrency": 8}),
}
_ELSEWHERE = {"R19": "long", "R26": "long", "N05": "long", "I03": "long", "C37": "race"}

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("hostile")]


def _session_of(case: Case) -> str:
    return _ELSEWHERE.get(case.id, "main")


def _ordered() -> list[Case]:
    """Controls first; then the index's order, one session after the other."""
    served = [c for c in CASES.values() if c.steps and not c.is_import and not c.needs_egress]
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
            self._live = Session(self._folder / name, files, **settings)
            self._name = name
        return self._live

    def close(self) -> None:
        if self._live is not None:
            self.problems[self._name] = self._live.whole_session_problems()
            self._live.close()
            self._live = None


@pytest.mark.parametrize("case", _ordered(), ids=lambda case: case.id)
def test_case(case: Case, sessions: Sessions) -> None:
    verdict: Verdict = sessions.get(_session_of(case)).run(case)
    print(verdict)
    assert not verdict.problems, f"\n{verdict}"


def test_nothing_shows_when_everything_is_over(sessions: Sessions) -> None:
    sessions.close()
    assert not any(sessions.problems.values()), sessions.problems
