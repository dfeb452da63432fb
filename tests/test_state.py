"""The state directory belongs to us alone, and one link has one server."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from atp_sandbox.errors import SandboxError, UsageError
from atp_sandbox.state import (
    SUBDIRECTORIES,
    LinkLock,
    default_state_dir,
    prepare,
    remove_stale_scratch,
    scratch_directory,
)

URL, KEY = "https://example.org", "key-that-must-not-show"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    prepare(tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("environ", "euid", "expected"),
    [
        ({"STATE_DIRECTORY": "/a:/b", "XDG_STATE_HOME": "/x"}, 1000, "/a"),
        ({"STATE_DIRECTORY": "/a"}, 0, "/a"),
        ({"STATE_DIRECTORY": "", "HOME": "/h"}, 0, "/var/lib/atp-sandbox"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 0, "/var/lib/atp-sandbox"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, 1000, "/x/atp-sandbox"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/h"}, 1000, "/h/.local/state/atp-sandbox"),
        ({"HOME": "/h"}, 1000, "/h/.local/state/atp-sandbox"),
    ],
)
def test_default_place_follows_systemd_then_root_then_xdg_then_home(
    environ: dict[str, str], euid: int, expected: str
) -> None:
    assert default_state_dir(environ, euid) == Path(expected)


def test_user_without_any_home_is_told_to_name_a_place() -> None:
    with pytest.raises(UsageError) as caught:
        default_state_dir({}, 2**31 - 5)
    assert "XDG_STATE_HOME" in caught.value.tip


def test_everything_made_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        prepare(tmp_path / "a" / "b" / "state")
    finally:
        os.umask(before)
    for path in ("a", "a/b", "a/b/state", *(f"a/b/state/{name}" for name in SUBDIRECTORIES)):
        assert stat.S_IMODE((tmp_path / path).stat().st_mode) == 0o700


def test_preparing_twice_keeps_what_is_there(state: Path) -> None:
    (state / "run" / "kept").touch()
    prepare(state)
    assert (state / "run" / "kept").exists()


def test_state_directory_may_be_a_link_as_systemd_makes_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "state").symlink_to("real")
    prepare(tmp_path / "state")
    assert (tmp_path / "real" / "locks").is_dir()


@pytest.mark.parametrize("place", [".", "snapshots", "locks", "run"])
@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_directory_that_others_can_write_is_refused(state: Path, place: str, mode: int) -> None:
    (state / place).chmod(mode)
    with pytest.raises(UsageError) as caught:
        prepare(state)
    assert "chmod" in caught.value.tip
    assert f"{mode:04o}" in caught.value.cause


def test_directory_of_another_user_is_refused(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    with pytest.raises(UsageError) as caught:
        prepare(state)
    assert "another user" in caught.value.message
    assert caught.value.tip


def test_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(UsageError, match="not a directory"):
        prepare(tmp_path / "state")
    with pytest.raises(UsageError, match="cannot make"):
        prepare(tmp_path / "state" / "below")


def test_subdirectory_that_is_a_link_is_refused(state: Path, tmp_path: Path) -> None:
    (state / "run").rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (state / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="not a directory"):
        prepare(state)


def test_second_server_of_a_link_is_refused_and_told_who_serves(state: Path) -> None:
    with LinkLock(state, URL, KEY), pytest.raises(SandboxError) as caught:
        LinkLock(state, URL, KEY).acquire()
    assert caught.value.message == "another atp-sandbox serves this link"
    assert str(os.getpid()) in caught.value.cause
    assert caught.value.tip


@pytest.mark.parametrize("spelling", ["https://example.org/", "HTTPS://Example.ORG"])
def test_another_spelling_of_the_address_is_the_same_link(state: Path, spelling: str) -> None:
    with LinkLock(state, URL, KEY), pytest.raises(SandboxError):
        LinkLock(state, spelling, KEY).acquire()


def test_other_key_or_other_address_is_another_link(state: Path) -> None:
    with (
        LinkLock(state, URL, KEY),
        LinkLock(state, URL, KEY + "2"),
        LinkLock(state, URL + "/prefix", KEY),
    ):
        pass


def test_link_is_free_again_after_close_and_close_may_be_repeated(state: Path) -> None:
    first = LinkLock(state, URL, KEY)
    first.close()
    first.acquire()
    first.acquire()
    first.close()
    first.close()
    with LinkLock(state, URL, KEY):
        pass


def test_link_is_free_again_after_its_server_was_killed(state: Path) -> None:
    program = (
        "import sys, pathlib; from atp_sandbox.state import LinkLock\n"
        "lock = LinkLock(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(state), URL, KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "held\n"
        with pytest.raises(SandboxError) as caught:
            LinkLock(state, URL, KEY).acquire()
        assert str(server.pid) in caught.value.cause
        server.kill()
    with LinkLock(state, URL, KEY):
        pass


def test_released_link_is_free_though_a_forked_child_still_has_the_descriptor(
    state: Path,
) -> None:
    lock = LinkLock(state, URL, KEY)
    lock.acquire()
    assert lock._fd is not None
    copy = os.dup(lock._fd)  # shares the open file description, as a fork does
    try:
        lock.close()
        with LinkLock(state, URL, KEY):
            pass
    finally:
        os.close(copy)


def test_nothing_on_disk_lets_the_key_be_recognised_elsewhere(state: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    prepare(other)
    names = []
    for place in (state, other):
        with LinkLock(place, URL, KEY):
            files = list((place / "locks").iterdir())
        assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)
        assert all(KEY.encode() not in file.read_bytes() for file in files)
        names.append({file.name for file in files} - {"secret"})
    assert len(names[0]) == len(names[1]) == 1
    assert names[0] != names[1]
    assert KEY not in repr(LinkLock(state, URL, KEY))


@pytest.mark.parametrize("harm", ["readable", "short", "link"])
def test_secret_that_is_not_ours_alone_is_refused(state: Path, tmp_path: Path, harm: str) -> None:
    with LinkLock(state, URL, KEY):
        pass
    secret = state / "locks" / "secret"
    if harm == "readable":
        secret.chmod(0o644)
    elif harm == "short":
        secret.write_bytes(b"x")
    else:
        secret.rename(tmp_path / "secret")
        secret.symlink_to(tmp_path / "secret")
    with pytest.raises(SandboxError, match="secret"):
        LinkLock(state, URL, KEY).acquire()


def test_scratch_of_dead_supervisors_is_removed_if_it_is_empty(tmp_path: Path) -> None:
    mine = scratch_directory(tmp_path)
    dead = tmp_path / "scratch-4194999-aa"  # beyond PID_MAX_LIMIT
    full = tmp_path / "scratch-4194999-bb"
    for path in (mine, dead, full, full / "0"):
        path.mkdir()
    remove_stale_scratch(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, full])
