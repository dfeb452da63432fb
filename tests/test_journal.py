"""The journal: what it says after a death, and what happens when it cannot be written."""

from __future__ import annotations

import contextlib
import math
import os
import random
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest
from backends import ROOT, FakeBackend, Serving
from conftest import LogLine, processes_named, toolkit_text, wait_until

from atp_sandbox import journal as journal_module
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.atp.record import Stage
from atp_sandbox.atp.session import Session, Start
from atp_sandbox.journal import Journal, JournalError, JournalFile, remove_unused
from atp_sandbox.outcome import Kind
from atp_sandbox.settings import JournalMode
from atp_sandbox.state import LinkLock, prepare

SECRET = "S3CRET-parameter"
TOKEN = "T0KEN-of-a-user"
ANSWER = "an answer that is due"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "link.journal"


@pytest.fixture
def session() -> Session:
    return Session(b"secret")


def begin(session: Session, number: int) -> int:
    request = ToolRequest(str(number), "echo", {"a": SECRET}, f'{{"a": "{SECRET}"}}', f'"{TOKEN}"')
    started = session.receive(request, time.monotonic())
    assert isinstance(started, Start)
    return started.key


def opened(path: Path, mode: JournalMode = JournalMode.ON) -> Journal:
    journal = Journal(path, mode)
    assert journal.open() == []
    return journal


def bytes_on_disk(path: Path) -> bytes:
    return b"".join(part.read_bytes() for part in path.parent.glob(f"{path.name}*"))


# -- what it says ----------------------------------------------------------------------------------


def test_a_killed_process_leaves_what_it_had_committed(path: Path) -> None:
    program = """
import os, pathlib, signal, sys
from atp_sandbox.atp.messages import ToolRequest
from atp_sandbox.atp.session import Session
from atp_sandbox.journal import Journal
from atp_sandbox.settings import JournalMode
from atp_sandbox.state import LinkLock, prepare

session = Session(b"secret")
journal = Journal(pathlib.Path(sys.argv[1]), JournalMode.ON)
journal.open()
keys = [session.receive(ToolRequest(str(n), "echo", {}, "{}", None), 1.0).key for n in range(5)]
for key in keys[1:]:
    session.started(key)
session.answered(keys[2], "answer 2", 2.0)
session.answered(keys[3], "answer 3", 3.0)
session.outbox.take(1, 4.0)
session.confirm(1)
assert journal.commit(session, 5.0)
session.answered(keys[4], "never committed", 6.0)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program, path], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    left = Journal(path, JournalMode.ON).open()
    assert [(r.request_id_json, r.stage, r.text, r.since) for r in left] == [
        ("0", Stage.ACCEPTED, None, 1.0),
        ("1", Stage.STARTED, None, 1.0),
        ("", Stage.CONFIRMED, None, 2.0),
        ("", Stage.ANSWERED, "answer 3", 3.0),
        ("4", Stage.STARTED, None, 1.0),
    ]
    assert [r.tool for r in left] == ["echo", "echo", "", "", "echo"]
    assert len({r.identity for r in left}) == 5


def test_neither_parameters_nor_tokens_are_in_it_and_an_answer_only_until_it_is_confirmed(
    path: Path, session: Session
) -> None:
    journal = opened(path)
    key = begin(session, 1)
    session.answered(key, ANSWER, 0.0)
    assert journal.commit(session, 0.0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for part in path.parent.iterdir():
        assert stat.S_IMODE(part.stat().st_mode) == 0o600, part
    assert ANSWER.encode() in bytes_on_disk(path)
    session.outbox.take(1, 0.0)
    session.confirm(1)
    begin(session, 2)
    assert journal.commit(session, 0.0)
    journal.tidy(0.0)
    found = bytes_on_disk(path)
    assert b"echo" in found
    for text in (ANSWER, SECRET, TOKEN):
        assert text.encode() not in found
    journal.close()


def test_what_is_forgotten_is_removed_from_it(path: Path, session: Session) -> None:
    journal = opened(path)
    key = begin(session, 1)
    session.answered(key, ANSWER, time.monotonic())
    session.outbox.take(1, time.monotonic())
    session.confirm(1)
    journal.commit(session, 0.0)
    session._forget_old(time.monotonic() + 10_000)
    journal.commit(session, 0.0)
    journal.close()
    assert JournalFile(path).load() == []


def test_without_a_journal_no_file_is_made(path: Path, session: Session) -> None:
    journal = opened(path, JournalMode.OFF)
    begin(session, 1)
    assert journal.commit(session, 0.0)
    journal.close()
    assert not path.exists()


def test_journals_of_links_that_are_gone_are_removed_after_a_while(tmp_path: Path) -> None:
    prepare(tmp_path)
    with LinkLock(tmp_path, "http://here", "key") as lock:
        names = ("old.journal", "old.journal-wal", "old.damaged", "young.journal")
        for name in (*names, f"{lock.name}.journal"):
            path = tmp_path / "journals" / name
            path.touch()
            age_s = 0 if name.startswith("young") else journal_module.MAX_UNUSED_S + 60
            os.utime(path, (time.time() - age_s, time.time() - age_s))
        remove_unused(tmp_path)
        left = {path.name for path in (tmp_path / "journals").iterdir()}
        assert left == {"young.journal", f"{lock.name}.journal"}
    remove_unused(tmp_path)
    assert [path.name for path in (tmp_path / "journals").iterdir()] == ["young.journal"]


def test_a_journal_whose_last_changes_are_only_in_its_log_is_not_old(
    tmp_path: Path, session: Session
) -> None:
    """As a server leaves it that was idle for long, took a call and was killed."""
    (tmp_path / "journals").mkdir()
    path = tmp_path / "journals" / "link.journal"
    journal = opened(path)
    begin(session, 1)
    assert journal.commit(session, 0.0)
    os.utime(path, (0, 0))
    remove_unused(tmp_path)
    assert path.exists()
    os.utime(f"{path}-wal", (0, 0))
    remove_unused(tmp_path)
    assert list(path.parent.iterdir()) == []


def test_after_another_boot_nothing_in_it_is_old(
    path: Path, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(path, session)
    with contextlib.closing(JournalFile(path)) as file:
        file._database.execute("UPDATE calls SET since = 1.0")
    with contextlib.closing(JournalFile(path)) as file:
        assert [record.since for record in file.load()] == [1.0]
    monkeypatch.setattr(journal_module, "_boot", lambda: 1)
    began = time.monotonic()
    for _ in range(2):
        with contextlib.closing(JournalFile(path)) as file:
            (record,) = file.load()
        assert began <= record.since <= time.monotonic()


@pytest.mark.parametrize("seed", range(5))
def test_it_says_what_is_known_whenever_the_process_dies_and_whatever_was_merged(
    path: Path, session: Session, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(journal_module, "MERGE_BYTES", 2_000)
    draw = random.Random(seed)
    journal, running, now = opened(path), [], 0.0
    aside = path.parent / "aside" / path.name
    aside.parent.mkdir()
    for step in range(150):
        now += 10.0
        for _ in range(draw.randrange(4)):
            running.append(begin(session, draw.randrange(10**9)))
        for key in draw.sample(running, draw.randrange(1 + len(running))):
            if draw.random() < 0.5:
                session.started(key)
            else:
                running.remove(key)
                session.answered(key, "a" * draw.choice((10, 3_000)), now)
        if draw.random() < 0.5:
            session.outbox.take(draw.choice((1, 100_000)), now)
            session.confirm(session.outbox._confirmed + draw.randrange(5))
        session._forget_old(now)
        if draw.random() < 0.05:
            journal.tidy(math.inf)
        assert journal.commit(session, now, everything=True)
        if step % 10 == 9:
            for part in path.parent.glob(f"{path.name}*"):
                (aside.parent / part.name).write_bytes(part.read_bytes())
            with contextlib.closing(JournalFile(aside)) as file:
                found = {record.key: record for record in file.load()}
            known = {record.key: record for record in session.records()}
            assert found.keys() == known.keys()
            for key, record in known.items():
                text = record.text if record.stage is Stage.ANSWERED else None
                assert (found[key].stage, found[key].text) == (record.stage, text)
                assert (found[key].identity, found[key].tool) == (record.identity, record.tool)
    journal.close()
    assert {r.key for r in JournalFile(path).load()} == {r.key for r in session.records()}


# -- what cannot be read ---------------------------------------------------------------------------


@contextlib.contextmanager
def held_by_somebody_else(path: Path) -> Iterator[None]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    try:
        yield
    finally:
        other.close()


def filled(path: Path, session: Session) -> None:
    journal = opened(path)
    begin(session, 1)
    journal.commit(session, 0.0)
    journal.close()


@pytest.mark.parametrize("how", ["locked", "foreign", "damaged", "unreadable"])
def test_a_journal_that_cannot_be_read_is_reported_and_done_without_unless_it_is_required(
    path: Path, session: Session, how: str, logged: list[LogLine]
) -> None:
    filled(path, session)
    with contextlib.ExitStack() as stack:
        match how:
            case "locked":
                stack.enter_context(held_by_somebody_else(path))
            case "foreign":
                path.write_bytes(b"this is no database, and never was one " * 100)
            case "damaged":
                content = bytearray(path.read_bytes())
                content[-4096:] = os.urandom(4096)
                path.write_bytes(content)
            case "unreadable":
                path.unlink()
                path.mkdir()
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(JournalError) as required:
            Journal(path, JournalMode.REQUIRED).open()
        assert "--journal off" in required.value.tip
        journal = Journal(path, JournalMode.ON)
        assert journal.open() == []
        assert journal.refusal is None
        failed = [line for line in logged if line.event == "journal_failed"]
        assert len(failed) == 1
        begin(session, 2)
        assert journal.commit(session, 10.0)
        journal.close()
        if how in ("foreign", "damaged"):
            # It is kept for whoever wants to look, and a new one has taken its place.
            assert before is not None
            assert path.with_suffix(".damaged").read_bytes()[-4096:] == before[-4096:]
            left = JournalFile(path).load()
            assert [record.request_id_json for record in left] == ["1", "2"]
        elif how == "locked":
            assert path.read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        *("since = x'00'", "request_id = x'00'", "tool = x'00'", "identity = 'text'", "stage = 9"),
        *("stage = 'a'", "answer = x'00'", "key = 9223372036854775807"),
    ],
)
def test_a_row_that_nobody_can_have_written_is_damage_and_ends_no_server(
    path: Path, session: Session, logged: list[LogLine], damage: str
) -> None:
    """A byte that has changed may leave a sound database of other values."""
    filled(path, session)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"UPDATE calls SET {damage}")
    assert opened(path).refusal is None
    assert [line.event for line in logged] == ["journal_failed"]
    assert path.with_suffix(".damaged").exists()


@pytest.mark.parametrize(
    "changes",
    [
        *(b"", b"\xc1", msgpack.packb(7), msgpack.packb([[], [1, "2"]]), msgpack.packb([[], [-1]])),
        msgpack.packb([[(1, b"i", "id", "tool", 9, 1.0, None)], []]),
        msgpack.packb([[(1, b"i", "id", "tool", 1, "now", None)], []]),
    ],
)
def test_a_turn_that_nobody_can_have_written_is_damage_and_ends_no_server(
    path: Path, session: Session, logged: list[LogLine], changes: bytes
) -> None:
    filled(path, session)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("INSERT INTO turns (changes) VALUES (?)", (changes,))
    assert opened(path).refusal is None
    assert [line.event for line in logged] == ["journal_failed"]
    assert path.with_suffix(".damaged").exists()


def test_a_journal_of_another_version_is_left_alone(path: Path) -> None:
    JournalFile(path).close()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(JournalError, match="cannot be used") as refused:
        Journal(path, JournalMode.REQUIRED).open()
    assert "another version" in refused.value.cause
    before = path.read_bytes()
    assert opened(path).commit(Session(b"x"), 0.0)
    assert path.read_bytes() == before


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_journal_that_is_not_in_its_place_any_more_is_written_anew(
    path: Path, session: Session, logged: list[LogLine], how: str
) -> None:
    """What goes to a file without a name reports no error, and no successor would find it."""
    journal = opened(path)
    begin(session, 1)
    assert journal.commit(session, 0.0)
    for part in path.parent.glob(f"{path.name}*"):
        part.unlink()
    if how == "replaced":
        path.touch()
    journal.tidy(1.0)
    assert journal.commit(session, 1.0)
    journal.tidy(2.0)
    journal.close()
    assert [record.request_id_json for record in JournalFile(path).load()] == ["1"]
    assert [line.event for line in logged] == ["journal_failed", "journal_restored"]


# -- what cannot be written ------------------------------------------------------------------------


class FullDisk:
    """A journal file that may not grow: SQLite itself answers that the disk is full."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def fill(self) -> None:
        database = self._database()
        (pages,) = database.execute("PRAGMA page_count").fetchone()
        database.execute(f"PRAGMA max_page_count = {pages}")

    def _database(self) -> sqlite3.Connection:
        assert self._journal._file is not None
        return self._journal._file._database


LARGE = "x" * 1_000_000


def test_a_disk_that_is_full_at_the_start_is_tried_again(
    path: Path, session: Session, logged: list[LogLine]
) -> None:
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, usual[1]))
    try:
        with pytest.raises(JournalError):
            Journal(path, JournalMode.REQUIRED).open()
        journal = opened(path)
        begin(session, 1)
        assert journal.commit(session, 0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert journal.commit(session, journal_module.RETRY_S)
    journal.close()
    assert len(JournalFile(path).load()) == 1
    assert [line.event for line in logged] == ["journal_failed", "journal_restored"]


def test_a_full_disk_is_reported_once_and_what_is_known_is_written_when_there_is_room(
    path: Path, session: Session, logged: list[LogLine]
) -> None:
    journal = opened(path)
    first, second = begin(session, 1), begin(session, 2)
    assert journal.commit(session, 0.0)
    FullDisk(journal).fill()
    session.answered(first, LARGE, time.monotonic())
    assert journal.commit(session, 1.0)
    session.answered(second, LARGE, time.monotonic())
    assert journal.commit(session, 2.0)
    assert journal.refusal is None
    assert [line.event for line in logged if line.event.startswith("journal")] == ["journal_failed"]
    assert journal.commit(session, 1.0 + journal_module.RETRY_S)
    assert logged[-1].event == "journal_restored"
    journal.close()
    left = JournalFile(path).load()
    assert [(r.stage, r.text) for r in left] == [(Stage.ANSWERED, LARGE)] * 2


def test_a_required_journal_that_cannot_be_written_takes_no_calls_until_it_can(
    path: Path, session: Session
) -> None:
    journal = opened(path, JournalMode.REQUIRED)
    key = begin(session, 1)
    assert journal.commit(session, 0.0)
    FullDisk(journal).fill()
    session.answered(key, LARGE, time.monotonic())
    assert not journal.commit(session, 1.0)
    refusal = journal.refusal
    assert refusal is not None
    assert (refusal.kind, refusal.retry_after_s) == (Kind.UNAVAILABLE, journal_module.RETRY_S)
    assert journal.commit(session, 1.0 + journal_module.RETRY_S)
    assert journal.refusal is None
    journal.close()


# -- a whole serve ---------------------------------------------------------------------------------

KIT = """
    import ctypes, os, random, time

    @tool
    def echo(value=None, **_):
        return [value, random.random()]

    @tool
    def slow(value, comm="slow", **_):
        ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)  # to be seen from outside
        time.sleep(value)
        return ["slept", random.random()]
"""


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    path = tmp_path / "kit.py"
    path.write_text(toolkit_text(KIT))
    return path


def serving(kit: Path, backend: FakeBackend, tmp_path: Path, *more: object, **env: str) -> Serving:
    return Serving(
        kit,
        *("--base-url", backend.url, "--log-format", "json", *more),
        state_dir=tmp_path / "state",
        **{"ATP_API_KEY": "key", **env},
    )


def kill(serve: Serving) -> None:
    serve.process.kill()
    serve.wait()


def test_a_killed_serve_answers_everything_once_when_it_is_back(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend, tmp_path, "--concurrency", "1") as first:
        link = backend.accept()
        answered = link.call("answered", "echo", value=1)
        link.settle()
        comm = f"slow-{os.getpid()}"
        link.request("started", "slow", value=60, comm=comm)
        wait_until(lambda: processes_named(comm), "the tool to run")
        link.request("queued", "slow", value=60)
        link.request("refused", "nosuch")
        assert link.result("refused")["error_type"] == "unknown_tool"
        kill(first)
    with serving(kit, backend, tmp_path) as second:
        link = backend.accept()
        started = link.result("started")
        assert (started["error_type"], started["retryable"]) == ("interrupted", False)
        assert "may have run" in started["error"]
        queued = link.result("queued")
        assert (queued["error_type"], queued["retryable"]) == ("interrupted", True)
        assert "did not run" in queued["error"]
        # A backend that asks again gets what it has got, or hears that this is not kept.
        link.request("started", "slow", value=60, comm=comm)
        link.request("queued", "slow", value=60)
        link.request("answered", "echo", value=1)

        def results(request_id: str) -> list[Any]:
            return [a["result"] for a in link.answers if a["request_id"] == request_id]

        wait_until(lambda: results("answered"), "all of them again")
        (again,) = results("answered")
        assert again == answered or "kept no longer" in again["error"]
        for request_id, result in (("started", started), ("queued", queued)):
            assert results(request_id) == [result, result]
        link.request("answered", "echo", value=2)  # other content: a new call
        wait_until(lambda: len(results("answered")) == 2, "its own answer")
        assert results("answered")[1][0] == 2
        assert second.stop() == 0
        recovered = [e for e in second.events() if e["event"] == "journal_recovered"]
        assert [e["interrupted"] for e in recovered] == [2]
    with serving(kit, backend, tmp_path) as third:
        link = backend.accept()
        assert link.call("last", "echo")[0] is None
        assert len(link.texts) == 1  # all had been confirmed
        assert third.stop() == 0
    on_disk = b"".join(p.read_bytes() for p in (tmp_path / "state" / "journals").iterdir())
    assert b"slept" not in on_disk


def test_an_answer_that_no_pong_confirmed_is_sent_again_by_the_next_process(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    backend.answers_pings = False
    with serving(kit, backend, tmp_path) as first:
        link = backend.accept()
        link.call("one", "echo", value=1)
        kill(first)
        (text,) = link.texts
    backend.answers_pings = True
    with serving(kit, backend, tmp_path) as second:
        link = backend.accept()
        wait_until(lambda: link.texts, "the same answer")
        assert link.texts == [text]
        assert second.stop() == 0


def test_an_answer_that_no_pong_confirmed_is_sent_again_over_the_next_connection(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    backend.answers_pings = False
    with serving(kit, backend, tmp_path, "--journal", "off") as serve:
        link = backend.accept()
        link.call("one", "echo", value=1)
        backend.answers_pings = True
        link.cut()
        again = backend.accept()
        wait_until(lambda: again.texts, "the same answer")
        assert again.texts == link.texts
        again.call("two", "echo", value=1)
        again.settle()
        again.cut()
        last = backend.accept()
        assert last.call("three", "echo", value=1)[0] == 1
        assert len(last.texts) == 1  # what was confirmed does not come again
        assert serve.stop() == 0
    assert list((tmp_path / "state" / "journals").iterdir()) == []


def test_a_toolkit_that_stops_is_not_held_up_by_a_backend_that_confirms_nothing(
    tmp_path: Path, backend: FakeBackend
) -> None:
    kit = tmp_path / "kit.py"
    stop_later = """
    import threading

    def later():
        time.sleep(3)
        client.stop()

    threading.Thread(target=later).start()
    """
    kit.write_text(toolkit_text(KIT + stop_later))
    backend.answers_pings = False
    with serving(kit, backend, tmp_path) as serve:
        backend.accept().call("one", "echo", value=1)
        assert serve.wait() == 0
    (journal,) = (tmp_path / "state" / "journals").glob("*.journal")
    assert [record.stage for record in JournalFile(journal).load()] == [Stage.ANSWERED]


def test_a_serve_whose_disk_is_full_goes_on_answering(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    """RLIMIT_FSIZE of the supervisor: what its files may not grow beyond."""
    with serving(kit, backend, tmp_path) as serve:
        link = backend.accept()
        assert link.call("before", "echo", value=1)[0] == 1
        process = psutil.Process(serve.process.pid)
        process.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        for number in range(3):
            assert link.call(number, "echo", value=number)[0] == number
        serve.wait_for("journal_failed")
        process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        serve.wait_for("journal_restored")
        assert link.call("after", "echo", value=4)[0] == 4
        assert serve.stop() == 0


def test_a_required_journal_that_cannot_be_had_stops_the_start(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, backend, tmp_path) as serve:
        backend.accept().call(1, "echo")
        assert serve.stop() == 0
    (journal,) = (tmp_path / "state" / "journals").glob("*.journal")
    journal.write_bytes(b"no database")
    with serving(kit, backend, tmp_path, "--journal", "required") as serve:
        assert serve.wait() == 1
        assert "--journal off" in serve.log
