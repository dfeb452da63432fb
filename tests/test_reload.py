"""Hot reload: what the operator changes while calls are served, and what no edit can change."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from backends import ROOT, FakeBackend, FakeLink, Serving
from conftest import (
    PATIENCE_S,
    LogLine,
    NodeMaker,
    processes_named,
    toolkit_text,
    wait_until,
    write_tree,
)

from atp_sandbox import watch as watch_module
from atp_sandbox.background import Background
from atp_sandbox.discovery import Discovery
from atp_sandbox.errors import SandboxError
from atp_sandbox.limits import Limits
from atp_sandbox.loop import Loop
from atp_sandbox.node import snapshot_of
from atp_sandbox.reload import Turns, needs_restart, tool_changes
from atp_sandbox.settings import (
    BackendSettings,
    JournalMode,
    ServeOptions,
    ServeSettings,
    ToolkitSettings,
)
from atp_sandbox.toolkit import ServedToolkit
from atp_sandbox.watch import FileWatch, Places

KEY = "S3CRET-key-of-the-operator"
NUMBERS = itertools.count(1_000_000)
"""Request ids that were never used."""


def kit_text(version: str, *more: str) -> str:
    """A toolkit whose tools say which version they are of; `more` are names of further ones."""
    body = f"""
import ctypes, os, time

@tool
def version(**_):
    return {version!r}

@tool
def slow(value, comm="", **_):
    if comm:
        ctypes.CDLL(None).prctl(15, comm.encode(), 0, 0, 0)
    time.sleep(value)
    return {version!r}
"""
    for name in more:
        body += f"\n@tool\ndef {name}(**_):\n    return {name!r}\n"
    return toolkit_text(body)


def save_by_rename(path: Path, text: str) -> None:
    """As most editors do."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text)
    os.replace(draft, path)


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    (tmp_path / "kit").mkdir()
    path = tmp_path / "kit" / "kit.py"
    path.write_text(kit_text("old", "gone"))
    return path


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def serving(*arguments: object, backend: FakeBackend, tmp_path: Path) -> Serving:
    where = ("--base-url", backend.url, "--log-format", "json")
    return Serving(*arguments, *where, state_dir=tmp_path / "state", ATP_API_KEY=KEY)


def told(serve: Serving, name: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of that name so far, of those with these fields."""
    return [
        event
        for event in serve.events()
        if event["event"] == name and fields.items() <= event.items()
    ]


def wait_told(serve: Serving, name: str, count: int = 1, **fields: Any) -> dict[str, Any]:
    """The `count`th such event."""
    what = f"{name} {fields} {count} times"
    wait_until(lambda: len(told(serve, name, **fields)) >= count, what)
    return told(serve, name, **fields)[count - 1]


def registered(backend: FakeBackend, start: int = 0) -> list[str]:
    return [body["function_id"] for body in backend.registered[start:]]


# -- toolkits' files -------------------------------------------------------------------------------


def test_an_edit_takes_over_while_calls_run_and_those_finish_on_the_old_code(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    options = ("--reload", "--concurrency", "1", "--sample-responses")
    with serving(kit, *options, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        assert link.call(1, "version") == "old"
        assert link.call(2, "gone") == "gone"
        known = len(backend.registered)
        comm = f"reload-{os.getpid()}"
        link.request("running", "slow", value=4.0, comm=comm)
        wait_until(lambda: processes_named(comm), "the tool to run")
        link.request("waiting", "version")
        link.call("after it", "nosuch")  # so the call before it has arrived
        kit.write_text(kit_text("new", "added"))
        event = wait_told(serve, "reloaded")
        counts = (event["tools_added"], event["tools_removed"], event["tools_changed"])
        assert (event["toolkit"], *counts) == ("kit", 1, 1, 2)
        assert link.call(3, "version") == "new"
        assert link.call(4, "added") == "added"
        assert link.call(5, "gone")["error_type"] == "unknown_tool"
        assert link.result("running") == "old"
        assert link.result("waiting") == "old"
        wait_until(lambda: len(backend.registered) >= known + 3, "what changed to be registered")
        assert serve.stop() == 0
    bodies = {body["function_id"]: body for body in backend.registered}
    assert sorted(registered(backend, known)) == ["added", "slow", "version"]
    assert bodies["added"]["metadata"]["sample_response"] == "added"
    assert bodies["version"]["metadata"]["sample_response"] == "new"
    served = ("added", "probe", "slow", "version")
    sources = "".join(bodies[name]["metadata"]["source_code"] for name in served)
    assert bodies["added"]["toolkit_hash"] == hashlib.sha256(sources.encode()).hexdigest()
    assert len(link.answers) == len({answer["request_id"] for answer in link.answers})
    assert len(told(serve, "reloaded")) == 1  # nothing of ours looks like an edit
    assert told(serve, "reload_unchanged") == []
    assert len(backend.paths) == 1


def test_a_broken_edit_keeps_the_old_version_and_the_next_good_one_takes(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    fence = tmp_path / "fence.py"
    fence.write_text(toolkit_text())
    with serving(kit, fence, "--reload", backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        broken = {
            "def broken(:\n": "SyntaxError",
            "import no_such_package\n": "No module named 'no_such_package'",
            "value = 1\n": "registers no tools",
        }
        for count, (text, reason) in enumerate(broken.items(), 1):
            save_by_rename(kit, text)
            event = wait_told(serve, "reload_failed", count)
            assert reason in event["message"]
            assert "the old version serves" in event["message"]
            assert event["toolkit"] == "kit"
            assert link.call(text, "version") == "old"
        save_by_rename(kit, text)  # the same again is not tried again
        fence.write_text(toolkit_text("value = 1"))
        wait_told(serve, "reloaded", toolkit="fence")
        save_by_rename(kit, kit_text("renamed"))
        wait_told(serve, "reloaded", toolkit="kit")
        assert len(told(serve, "reload_failed")) == len(broken)
        assert link.call("renamed", "version") == "renamed"
        kit.unlink()
        event = wait_told(serve, "reload_failed", len(broken) + 1)
        assert "cannot be found" in event["message"]
        assert link.call("deleted", "version") == "renamed"
        kit.write_text(kit_text("recreated"))
        wait_told(serve, "reloaded", 2, toolkit="kit")
        assert link.call("recreated", "version") == "recreated"
        assert serve.stop() == 0


def test_folders_data_and_links_are_watched_and_what_failed_at_the_start_is_tried_again(
    tmp_path: Path, backend: FakeBackend
) -> None:
    place = tmp_path / "kits"
    head = "from . import words\n"
    tool = "\n@tool\ndef {0}(**_):\n    return {1}\n"
    of_data = "open('/toolkit/words.txt').read()"
    write_tree(
        place,
        {
            "folder/__init__.py": "",
            "folder/words.py": "WORD = 'one'\n",
            "folder/toolkit.py": head + toolkit_text(tool.format("of_folder", "words.WORD")),
            "data.py": toolkit_text(tool.format("of_data", of_data)),
            "words.txt": "one",
            "broken.py": "import no_such_package\n",
            "releases/1/linked.py": toolkit_text(tool.format("of_link", "'one'")),
            "releases/2/linked.py": toolkit_text(tool.format("of_link", "'two'")),
        },
    )
    (place / "current").symlink_to("releases/1")
    config = f"""
        [serve]
        reload = true
        [toolkit.folder]
        path = "{place}/folder"
        [toolkit.data]
        path = "{place}/data.py"
        data = ["{place}/words.txt"]
        [toolkit.broken]
        path = "{place}/broken.py"
        [toolkit.linked]
        path = "{place}/current/linked.py"
    """
    write_tree(tmp_path, {"atp-sandbox.toml": config})
    path = tmp_path / "atp-sandbox.toml"
    with serving("--config", path, backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        tools = ("of_folder", "of_data", "of_link")
        assert [link.call(f"{name} 1", name) for name in tools] == ["one"] * 3
        # What is broken as before is not tried again: it would be before what comes later.
        (place / "broken.py").write_text("import no_such_package\n")
        (place / "folder" / "words.py").write_text("WORD = 'two'\n")
        wait_told(serve, "reloaded", toolkit="folder")
        (place / "words.txt").write_text("two")
        draft = place / "next"
        draft.symlink_to("releases/2")
        draft.rename(place / "current")
        (place / "broken.py").write_text(toolkit_text(tool.format("mended", "'two'")))
        for name in ("data", "linked", "broken"):
            wait_told(serve, "reloaded", toolkit=name)
        answers = [link.call(f"{name} 2", name) for name in (*tools, "mended")]
        assert answers == ["two"] * 4
        assert told(serve, "reload_failed") == []
        # A folder that was not there before, and the whole folder made anew.
        write_tree(place, {"folder/deep/er/words.py": "WORD = 'three'\n"})
        (place / "folder" / "words.py").write_text("from .deep.er.words import WORD\n")
        wait_told(serve, "reloaded", 2, toolkit="folder")
        wait_until(lambda: link.call(next(NUMBERS), "of_folder") == "three", "the new folder")
        count = len(told(serve, "reloaded", toolkit="folder"))
        (place / "folder" / "deep" / "er" / "words.py").write_text("WORD = 'four'\n")
        wait_told(serve, "reloaded", count + 1, toolkit="folder")
        assert link.call("deep", "of_folder") == "four"
        (place / "folder").rename(place / "before")
        text = toolkit_text(tool.format("of_folder", "'five'"))
        write_tree(place, {"folder/toolkit.py": text})
        wait_until(lambda: link.call(next(NUMBERS), "of_folder") == "five", "the folder anew")
        # The configuration is watched as well.
        save_by_rename(path, textwrap.dedent(config).replace("[toolkit.data]", "[toolkit.other]"))
        wait_told(serve, "reloaded", toolkit="other")
        assert link.call("renamed", "of_data") == "two"
        assert serve.stop() == 0


def test_many_edits_under_load_lose_no_call_and_leave_nothing_behind(
    kit: Path, tmp_path: Path, backend: FakeBackend
) -> None:
    with serving(kit, "--reload", backend=backend, tmp_path=tmp_path) as serve:
        link = backend.accept()
        process = psutil.Process(serve.process.pid)

        def use() -> tuple[int, int]:
            return len(serve.family()), process.num_fds()

        kit.write_text(kit_text("0"))
        wait_told(serve, "reloaded")
        link.call("first", "version")
        wait_until(lambda: not told(serve, "jail_ended") and link.answers, "an answer")
        before = _settled(use)
        sent = 0
        for edit in range(1, 9):
            for _ in range(10):
                link.request(sent, "version")
                link.request(f"slow {sent}", "slow", value=0.05)
                sent += 1
            save_by_rename(kit, kit_text(str(edit)))
            link.result(sent - 1)
        wait_until(lambda: link.call(next(NUMBERS), "version") == "8", "the last edit")
        for number in range(sent):
            assert link.result(number) in {str(edit) for edit in range(9)}
            assert link.result(f"slow {number}") in {str(edit) for edit in range(9)}
        assert len(told(serve, "reloaded")) >= 2
        assert told(serve, "call_failed") == told(serve, "request_rejected") == []
        wait_until(lambda: use() <= before, f"{before} processes and descriptors, as before")
        snapshots = tmp_path / "state" / "snapshots"
        wait_until(lambda: len(list(snapshots.iterdir())) == 1, "the other snapshots to go")
        assert serve.stop() == 0


def _settled(use: Any) -> tuple[int, int]:
    """What is used once it stays the same: workers ahead of need are made a little later."""
    seen = [use()]

    def is_steady() -> bool:
        seen.append(use())
        return len(seen) > 60 and len(set(seen[-60:])) == 1

    wait_until(is_steady, "processes to settle")
    found: tuple[int, int] = seen[-1]
    return found


# -- what an edit cannot change --------------------------------------------------------------------


AS_WRITTEN = """\
from atp_sdk.clients import ToolKitClient

def make(key, url, app, *names):
    client = ToolKitClient(api_key=key, app_name=app, base_url=url)
    for name in names:
        client.register_tool(
            function_name=name, params=[], required_params=[], description="d",
            auth_provider=None, auth_type=None, auth_with=None,
        )(lambda name=name, **_: [name, app])
    return client

for client in [{clients}]:
    client.start()
"""


def test_a_new_version_opens_no_other_link_and_takes_no_name_of_another_toolkit(
    tmp_path: Path, backend: FakeBackend
) -> None:
    with FakeBackend() as other:
        mine = f"make('key-1', {backend.url!r}, {{!r}}, {{}})"

        def write(name: str, *clients: str) -> None:
            # All but the first are never started: the first `start()` does not return.
            text = AS_WRITTEN.format(clients=", ".join(clients))
            save_by_rename(tmp_path / name, text)

        write("a.py", mine.format("a", "'one', 'shared'"))
        write("b.py", mine.format("b", "'two'"))
        arguments = (tmp_path / "a.py", tmp_path / "b.py", "--as-written", "--reload")
        options = ("--log-format", "json")
        with Serving(*arguments, *options, state_dir=tmp_path / "state") as serve:
            link = backend.accept()
            assert link.call(1, "shared") == ["shared", "a"]
            write("b.py", mine.format("b", "'two', 'shared', 'three'"))
            wait_told(serve, "reloaded", toolkit="b")
            assert wait_told(serve, "tool_refused", toolkit="b")["tool"] == "shared"
            assert link.call(2, "shared") == ["shared", "a"]
            assert link.call(3, "three") == ["three", "b"]
            elsewhere = f"make('key-2', {other.url!r}, 'b', 'four')"
            write("b.py", mine.format("b", "'two'"), elsewhere)
            wait_told(serve, "reloaded", 2, toolkit="b")
            url = wait_told(serve, "link_not_opened", toolkit="b")["url"]
            assert str(other.url).partition("//")[2] in url
            assert "key-2" not in serve.log
            assert link.call(4, "two") == ["two", "b"]
            assert link.call(5, "four")["error_type"] == "unknown_tool"
            write("b.py", elsewhere)
            assert "no link that is open" in wait_told(serve, "reload_failed")["message"]
            assert link.call(6, "two") == ["two", "b"]
            # Whoever serves a name keeps it, whatever stood first.
            write("a.py", mine.format("a", "'one'"))
            wait_told(serve, "reloaded", toolkit="a")
            write("b.py", mine.format("b", "'shared'"))
            wait_told(serve, "reloaded", 3, toolkit="b")
            write("a.py", mine.format("a", "'one', 'shared'"))
            wait_told(serve, "tool_refused", toolkit="a")
            wait_told(serve, "reloaded", 2, toolkit="a")
            assert link.call(7, "shared") == ["shared", "b"]
            assert serve.stop() == 0
        assert other.paths == []
        assert other.registered == []
    assert len(backend.paths) == 1


def test_a_client_that_the_old_version_stops_is_not_one_of_the_new(make_node: NodeMaker) -> None:
    served = make_node(kit_text("old"))
    old = served.toolkit
    assert old is not None
    running = served.submit("slow", {"value": 1.0})
    old.settings.path.write_text(kit_text("new"))
    found: list[tuple[ServedToolkit, Discovery | SandboxError]] = []
    taken = snapshot_of(old.settings, old.settings.path.parent / "state")
    served.node.prepare(old.settings, taken, lambda *told: found.append(told))
    served.until(lambda: found, "the new version")
    new, discovery = found[0]
    assert isinstance(discovery, Discovery)
    served.node.client_stopped(new, 0)
    assert served.stopped_clients == []
    served.node.swap(new)
    served.node.client_stopped(old, 0)
    assert served.stopped_clients == []
    served.node.client_stopped(new, 0)
    assert served.stopped_clients == [0]
    served.finish(running)
    assert running.value == "old"
    served.until(lambda: list(served.node.versions()) == [new], "the old version to end")


# -- SIGHUP ----------------------------------------------------------------------------------------


def test_sighup_takes_over_the_configuration_and_an_invalid_one_changes_nothing(
    tmp_path: Path, backend: FakeBackend
) -> None:
    tool = "import os, time\n@tool\ndef {0}(value=0, **_):\n    time.sleep(value)\n"
    tool += "    return os.environ.get('WORD', 'none')\n"
    write_tree(tmp_path, {f"{name}.py": toolkit_text(tool.format(f"in_{name}")) for name in "abcd"})
    path = tmp_path / "atp-sandbox.toml"
    path.write_text("".join(f'[toolkit.{name}]\npath = "{name}.py"\n' for name in "abd"))
    with serving("--config", path, backend=backend, tmp_path=tmp_path) as serve:
        link: FakeLink = backend.accept()
        assert [link.call(f"{n} 1", f"in_{n}") for n in "ab"] == ["none", "none"]
        serve.process.send_signal(signal.SIGHUP)
        for name in "abd":
            wait_told(serve, "reload_unchanged", toolkit=name)
        assert told(serve, "reloaded") == []

        link.request("running", "in_b", value=3.0)
        link.call("after it", "nosuch")  # so the call before it has arrived
        path.write_text(
            textwrap.dedent("""
            [serve]
            queue = 7
            [backend]
            app-name = "other"
            [toolkit.a]
            path = "a.py"
            time = "1s"
            env = { WORD = "new" }
            [toolkit.c]
            path = "c.py"
            [toolkit.d]
            path = "d.py"
            """)
        )
        serve.process.send_signal(signal.SIGHUP)
        for name in "abc":
            wait_told(serve, "reloaded", toolkit=name)
        needs = wait_told(serve, "reload_needs_restart")["changed"]
        assert needs == "[backend] app-name, [serve] queue"
        wait_told(serve, "reload_unchanged", 2, toolkit="d")
        assert link.call("a 2", "in_a") == "new"
        assert link.call("c 2", "in_c") == "none"
        assert link.call("b 2", "in_b")["error_type"] == "unknown_tool"
        assert link.result("running") == "none"
        timeout = link.call("a 3", "in_a", value=30)
        assert (timeout["error_type"], timeout["limit"]["value"]) == ("timeout", 1)

        path.write_text('[toolkit.a]\npath = "a.py"\nmemory = "much"\n')
        serve.process.send_signal(signal.SIGHUP)
        message = wait_told(serve, "reload_failed")["message"]
        assert "toolkit.a.memory" in message
        assert "the old one serves" in message
        assert [link.call(f"{n} 4", f"in_{n}") for n in "ac"] == ["new", "none"]
        assert serve.stop() == 0
    assert len(backend.paths) == 1


# -- decisions -------------------------------------------------------------------------------------


def test_one_reload_at_a_time_and_the_last_edit_wins() -> None:
    turns = Turns()
    assert turns.ask("a", tells_unchanged=False)
    assert turns.ask("b", tells_unchanged=False)  # another toolkit does not wait
    for tells_unchanged in (False, True, False):
        assert not turns.ask("a", tells_unchanged=tells_unchanged)
    assert not turns.tells_unchanged("a")
    assert turns.end("a")  # three edits, one more reload
    assert turns.tells_unchanged("a")
    assert not turns.end("a")
    assert turns.ask("a", tells_unchanged=True)


def test_tools_that_differ_are_told_apart() -> None:
    changes = tool_changes({"a": 1, "b": 1, "c": 1}, {"b": 1, "c": 2, "d": 1})
    assert (changes.added, changes.removed, changes.changed) == (("d",), ("a",), ("c",))
    assert changes.to_register == {"c", "d"}


def test_what_needs_a_restart_is_named_as_the_configuration_calls_it() -> None:
    old = ServeSettings((), BackendSettings(api_key="k", base_url="https://a.example"), Path("/s"))
    kit = ToolkitSettings("a", Path("/a.py"), limits=Limits(time_s=1))
    same = replace(
        old,
        toolkits=(kit,),
        backend=replace(old.backend, api_key=None),  # not read again
        options=ServeOptions(grace_s=3.0, reloads=True),
    )
    assert needs_restart(old, same) == ()
    new = replace(
        old,
        backend=replace(old.backend, base_url="https://b.example", api_key_file="/k"),
        options=ServeOptions(journal=JournalMode.OFF, queue_bytes=1),
    )
    assert needs_restart(old, new) == (
        *("[backend] api-key-file", "[backend] url", "[serve] journal", "[serve] queue-bytes"),
    )


# -- watching --------------------------------------------------------------------------------------


def test_each_step_on_the_way_to_a_file_is_watched_for_its_name_alone(tmp_path: Path) -> None:
    place = tmp_path.resolve()
    write_tree(place, {"real/kit.py": "", "real/.hidden/x": "", "real/sub/y": "", "z/later": ""})
    (place / "link").symlink_to("real")
    places = Places({"kit": [place / "link" / "kit.py"], "folder": [place / "real"]})
    assert places.keys_of(f"{place}/link") == {"kit"}
    assert places.keys_of(f"{place}/real/kit.py") == {"kit", "folder"}
    assert places.keys_of(f"{place}/real/other.py") == {"folder"}
    assert places.keys_of(f"{place}/real/sub/new") == {"folder"}
    assert places.keys_of(f"{place}/real") == {"kit", "folder"}
    assert places.keys_of(f"{place}/other") == set()
    assert f"{place}/real/.hidden" not in places.directories
    missing = Places({"kit": [place / "not" / "yet.py"]})
    assert missing.keys_of(f"{place}/not") == {"kit"}
    (place / "not").mkdir()
    assert Places({"kit": [place / "not" / "yet.py"]}) != missing


class NoThreads(threading.Thread):
    """As where the machine has no processes left for us, once."""

    refusals = 0

    def start(self) -> None:
        if NoThreads.refusals:
            NoThreads.refusals -= 1
            raise RuntimeError("can't start new thread")
        super().start()


def test_without_a_thread_a_reload_fails_and_files_are_watched_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logged: list[LogLine]
) -> None:
    monkeypatch.setattr(threading, "Thread", NoThreads)
    monkeypatch.setattr(NoThreads, "refusals", 2)
    monkeypatch.setattr(watch_module, "_START_S", 0.01)
    told: list[set[str]] = []
    outcomes: list[int | SandboxError] = []
    loop = Loop()
    background, watch = Background(loop.call_from_thread), FileWatch(loop, told.append)
    try:
        background.run(lambda: 1, outcomes.append)
        watch.watch({"kit": (tmp_path,)})
        assert NoThreads.refusals == 0
        background.run(lambda: 2, outcomes.append)
        assert loop.run_until(lambda: bool(told) and len(outcomes) == 2, PATIENCE_S)
    finally:
        background.close()
        watch.close()
        loop.close()
    assert isinstance(outcomes[0], SandboxError)
    assert outcomes[1] == 2
    assert [line.event for line in logged] == ["watch_failed"]


def test_a_folder_whose_name_is_no_text_does_not_end_the_watch(
    tmp_path: Path, logged: list[LogLine]
) -> None:
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    told: list[set[str]] = []
    loop = Loop()
    watch = FileWatch(loop, told.append)
    try:
        watch.watch({"kit": (tmp_path,)})
        assert loop.run_until(lambda: bool(told), PATIENCE_S), "it was never watched"
        os.mkdir(os.fsencode(tmp_path) + b"/\xff/new")
        assert loop.run_until(lambda: len(told) > 1, PATIENCE_S), "the change was not seen"
    finally:
        watch.close()
        loop.close()
    assert [line.event for line in logged] == ["watch_polls"]


@pytest.mark.parametrize("limit", ["max_inotify_instances", "max_inotify_watches"])
def test_without_inotify_changes_are_found_by_polling_and_it_is_said(
    tmp_path: Path, limit: str
) -> None:
    file = tmp_path / "kit.py"
    file.write_text("1")
    script = f"""
        import pathlib, sys
        pathlib.Path("/proc/sys/user/{limit}").write_text("0")
        from atp_sandbox import log
        from atp_sandbox.loop import Loop
        from atp_sandbox.watch import FileWatch
        log.configure("json", stream=sys.stdout)
        file, told, loop = pathlib.Path({str(file)!r}), [], Loop()
        watch = FileWatch(loop, told.append)
        watch.watch({{"kit": (file,)}})
        assert loop.run_until(lambda: told, 30), "it was never watched"
        file.write_text("2, and longer")
        assert loop.run_until(lambda: len(told) > 1, 30), "the change was not seen"
        watch.close()
    """
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if "unshare" in ran.stderr:
        pytest.skip(f"no user namespace can be made here: {ran.stderr.strip()}")
    assert ran.returncode == 0, ran.stderr
    assert '"event": "watch_polls"' in ran.stdout
    assert "fs.inotify.max_user_watches" in ran.stdout
