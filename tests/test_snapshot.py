"""A snapshot holds the toolkit's own files, all of them as they were, and nothing else."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from atp_sandbox import limits
from atp_sandbox.errors import SandboxError, ToolkitError
from atp_sandbox.jails import _tree_copy
from atp_sandbox.jails.snapshot import Snapshot, SnapshotHold, prune, take_snapshot

NOBODY = 65534


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "state" / "snapshots"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "kit"
    made.mkdir()
    (made / "toolkit.py").write_text("print('hi')\n")
    return made


def tree(snapshot: Snapshot) -> set[str]:
    root = snapshot.directory
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def drafts(store: Path) -> list[str]:
    return [name for name in os.listdir(store) if len(name) != 64]


@contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Root reads everything: be nobody for a while, as far as files are concerned."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


# What is the toolkit, and where it lies


def test_file_brings_itself_and_nothing_beside_it(folder: Path, store: Path) -> None:
    (folder / "other.py").touch()
    taken = take_snapshot(folder / "toolkit.py", [], store)
    assert tree(taken) == {"toolkit.py"}
    assert (taken.entry, taken.is_package, taken.package) == ("toolkit.py", False, "")
    assert taken.directory == store / taken.digest
    assert taken.skipped == ()


def test_data_lies_beside_the_file_under_its_own_name(
    folder: Path, tmp_path: Path, store: Path
) -> None:
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "en.txt").write_text("a")
    (tmp_path / "rates.csv").write_text("1,2")
    data = [tmp_path / "words", tmp_path / "rates.csv"]
    taken = take_snapshot(folder / "toolkit.py", data, store)
    assert tree(taken) == {"toolkit.py", "words", "words/en.txt", "rates.csv"}


@pytest.mark.parametrize(
    ("present", "entry"),
    [
        (["main.py", "toolkit.py", "__main__.py"], "__main__.py"),
        (["main.py", "toolkit.py"], "toolkit.py"),
        (["main.py", "a.py"], "main.py"),
    ],
)
def test_folder_starts_with_the_first_of_three_names(
    tmp_path: Path, store: Path, present: list[str], entry: str
) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    for name in present:
        (kit / name).touch()
    assert take_snapshot(kit, [], store).entry == entry


def test_package_lies_under_its_own_name_and_its_relative_imports_work(
    folder: Path, tmp_path: Path, store: Path
) -> None:
    (folder / "__init__.py").touch()
    (folder / "near.py").write_text("WORD = 'near'\n")
    (folder / "toolkit.py").write_text("from .near import WORD\nprint(WORD)\n")
    (tmp_path / "d.txt").touch()
    taken = take_snapshot(folder, [tmp_path / "d.txt"], store)
    assert (taken.entry, taken.is_package, taken.package) == ("kit/toolkit.py", True, "kit")
    assert tree(taken) == {"kit", "kit/__init__.py", "kit/near.py", "kit/toolkit.py", "d.txt"}
    ran = subprocess.run(
        [sys.executable, "-B", "-m", "kit.toolkit"],
        cwd=taken.directory,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == "near\n"


def test_package_that_python_could_not_name_is_refused(tmp_path: Path, store: Path) -> None:
    kit = tmp_path / "my-kit.v2"
    kit.mkdir()
    (kit / "main.py").touch()
    assert take_snapshot(kit, [], store).entry == "main.py"
    (kit / "__init__.py").touch()
    with pytest.raises(ToolkitError) as caught:
        take_snapshot(kit, [], store)
    assert "rename" in caught.value.tip


def test_folder_may_be_named_from_inside_itself(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "__init__.py").touch()
    monkeypatch.chdir(folder)
    assert take_snapshot(Path("."), [], store).package == "kit"


def test_link_that_the_operator_names_is_taken_under_the_name_it_was_given(
    folder: Path, tmp_path: Path, store: Path
) -> None:
    (tmp_path / "blob").write_text("x = 1\n")
    (tmp_path / "served.py").symlink_to("blob")
    taken = take_snapshot(tmp_path / "served.py", [], store)
    assert taken.entry == "served.py"
    assert stat.S_ISREG((taken.directory / "served.py").lstat().st_mode)


# What is left out


def test_hidden_and_compiled_files_are_left_out_and_reported(folder: Path, store: Path) -> None:
    (folder / ".env").write_text("SECRET=1")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    (folder / "sub").mkdir()
    (folder / "sub" / "__pycache__").mkdir()
    (folder / "sub" / "__pycache__" / "a.pyc").touch()
    (folder / "sub" / ".hidden").touch()
    taken = take_snapshot(folder, [], store)
    assert tree(taken) == {"toolkit.py", "sub"}
    assert taken.skipped == (
        ".env: hidden",
        ".git: hidden",
        "sub/.hidden: hidden",
        "sub/__pycache__: compiled files",
    )


def test_hidden_file_that_is_named_as_data_is_taken(folder: Path, store: Path) -> None:
    (folder / ".rates").touch()
    assert ".rates" in tree(take_snapshot(folder / "toolkit.py", [folder / ".rates"], store))


def test_fifo_and_socket_are_left_out_without_waiting_for_them(folder: Path, store: Path) -> None:
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "sock"))
        (folder / "to-pipe").symlink_to("pipe")
        taken = take_snapshot(folder, [], store)
    assert tree(taken) == {"toolkit.py"}
    assert taken.skipped == ("pipe: a FIFO", "sock: a socket", "to-pipe: a link to a FIFO")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make device nodes")
def test_device_is_left_out(folder: Path, store: Path) -> None:
    try:
        os.mknod(folder / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("this container's root cannot make device nodes")
    assert take_snapshot(folder, [], store).skipped == ("null: a device",)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_no_toolkit_and_no_data(
    folder: Path, tmp_path: Path, store: Path, kind: str
) -> None:
    path = tmp_path / "odd.py"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            listener.bind(str(path))
        else:
            path.symlink_to("/dev/zero")
        with pytest.raises(ToolkitError, match="not a Python file"):
            take_snapshot(path, [], store)
        with pytest.raises(ToolkitError, match="neither a file nor a folder"):
            take_snapshot(folder, [path], store)


# Links


def test_link_out_of_the_folder_is_never_followed(
    folder: Path, tmp_path: Path, store: Path
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "key").write_text("secret")
    (tmp_path / "kit2").mkdir()  # its name begins like the folder's own
    (tmp_path / "kit2" / "key").write_text("secret")
    (folder / "file").symlink_to(tmp_path / "outside" / "key")
    (folder / "folder").symlink_to("../outside")
    (folder / "neighbour").symlink_to("../kit2/key")
    (folder / "parent").symlink_to("..")
    (folder / "hop").symlink_to("folder/key")
    taken = take_snapshot(folder, [], store)
    assert tree(taken) == {"toolkit.py"}
    assert [line.partition(": ")[2] for line in taken.skipped] == ["a link out of the folder"] * 5


def test_link_inside_the_folder_becomes_a_file(folder: Path, store: Path) -> None:
    (folder / "real").mkdir()
    (folder / "real" / "a.py").write_text("a")
    (folder / "alias.py").symlink_to("real/a.py")
    (folder / "absolute.py").symlink_to(folder / "real" / "a.py")
    (folder / "also").symlink_to("real")
    taken = take_snapshot(folder, [], store)
    assert tree(taken) == {
        *("toolkit.py", "real", "real/a.py", "alias.py", "absolute.py", "also", "also/a.py")
    }
    assert not any(path.is_symlink() for path in taken.directory.rglob("*"))


def test_mounted_kubernetes_volume_is_taken_whole(tmp_path: Path, store: Path) -> None:
    kit = tmp_path / "volume"
    (kit / "..2026_11_22").mkdir(parents=True)
    (kit / "..2026_11_22" / "toolkit.py").write_text("x")
    (kit / "..data").symlink_to("..2026_11_22")
    (kit / "toolkit.py").symlink_to("..data/toolkit.py")
    assert tree(take_snapshot(kit, [], store)) == {"toolkit.py"}


def test_link_loops_and_dead_links_are_left_out(folder: Path, store: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")
    (folder / "sub" / "self").symlink_to(".")
    (folder / "round").symlink_to("round")
    (folder / "dead").symlink_to("nowhere")
    taken = take_snapshot(folder, [], store)
    assert tree(taken) == {"toolkit.py", "sub"}
    assert taken.skipped == (
        "dead: a link to nothing",
        "round: a link to nothing",
        "sub/self: a link to a folder that it lies in",
        "sub/up: a link to a folder that it lies in",
    )


@pytest.mark.parametrize("guarded", [True, False])
def test_file_that_turns_into_a_link_while_it_is_read_never_brings_what_lies_outside(
    folder: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Unguarded, what lies outside comes in: so the exchange does hit the moment it is meant to."""
    (tmp_path / "key").write_text("secret")
    (folder / "turning").write_text("plain")
    if not guarded:
        monkeypatch.setattr(_tree_copy, "_OPEN", _tree_copy._OPEN & ~os.O_NOFOLLOW)
    real_stat = os.stat

    def stat_and_exchange(path: str, **options: object) -> os.stat_result:
        status = real_stat(path, **options)  # type: ignore[arg-type]
        if path == "turning":
            (folder / "turning").unlink()
            (folder / "turning").symlink_to(tmp_path / "key")
        return status

    monkeypatch.setattr(os, "stat", stat_and_exchange)
    if guarded:
        with pytest.raises(ToolkitError, match="cannot read turning"):
            take_snapshot(folder, [], store)
        assert os.listdir(store) == []
    else:
        taken = take_snapshot(folder, [], store)
        assert (taken.directory / "turning").read_text() == "secret"


def test_file_that_turns_into_a_fifo_while_it_is_read_holds_nobody_up(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "turning").touch()
    real_stat = os.stat

    def stat_and_exchange(path: str, **options: object) -> os.stat_result:
        status = real_stat(path, **options)  # type: ignore[arg-type]
        if path == "turning":
            (folder / "turning").unlink()
            os.mkfifo(folder / "turning")
        return status

    monkeypatch.setattr(os, "stat", stat_and_exchange)
    assert take_snapshot(folder, [], store).skipped == ("turning: a FIFO",)


@pytest.mark.parametrize("guarded", [True, False])
def test_link_whose_way_changes_after_it_was_judged_leads_nowhere(
    folder: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("secret")
    (folder / ".real").mkdir()
    (folder / ".real" / "file").write_text("plain")
    (folder / "alias").symlink_to(".real/file")
    if not guarded:
        monkeypatch.setattr(_tree_copy, "_OPEN", _tree_copy._OPEN & ~os.O_NOFOLLOW)
    real_path = os.path.realpath

    def judge_and_exchange(path: Path, *, strict: bool = False) -> str:
        target = real_path(path, strict=strict)
        if path == folder / "alias":
            (folder / ".real").rename(folder / ".was")
            (folder / ".real").symlink_to("../outside")
        return target

    monkeypatch.setattr(os.path, "realpath", judge_and_exchange)
    if guarded:
        with pytest.raises(ToolkitError, match="cannot read alias"):
            take_snapshot(folder, [], store)
    else:
        taken = take_snapshot(folder, [], store)
        assert (taken.directory / "alias").read_text() == "secret"


# Refusals


@pytest.mark.parametrize("place", ["/", "/tmp", "/etc", "/root", "/home", "/var", "/usr", "/dev"])
def test_system_directory_is_no_toolkit_and_no_data(folder: Path, store: Path, place: str) -> None:
    for toolkit, data in ((Path(place), []), (folder, [Path(place)])):
        with pytest.raises(ToolkitError, match="more than a toolkit") as caught:
            take_snapshot(toolkit, data, store)
        assert caught.value.tip
    assert os.listdir(store) == []


def test_home_and_what_contains_it_are_refused_by_any_name(
    folder: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "homes" / "me"
    home.mkdir(parents=True)
    (home / "toolkit.py").touch()
    (home.parent / "toolkit.py").touch()
    (tmp_path / "other-name").symlink_to(home)
    monkeypatch.setenv("HOME", str(home))
    for path in (home, home.parent, tmp_path / "other-name", home / ".." / "me"):
        with pytest.raises(ToolkitError, match="more than a toolkit"):
            take_snapshot(path, [], store)
    (home / "kit").mkdir()
    (home / "kit" / "toolkit.py").touch()
    (home / "words").touch()
    take_snapshot(home / "kit", [home / "words"], store)


def test_state_directory_and_earlier_snapshots_are_refused(folder: Path, store: Path) -> None:
    earlier = take_snapshot(folder, [], store)
    for path in (store.parent, store, earlier.directory):
        with pytest.raises(ToolkitError):
            take_snapshot(folder, [path], store)


@pytest.mark.parametrize("place", ["/proc", "/proc/self", "/proc/self/environ", "/sys/kernel"])
def test_kernel_views_are_no_data(folder: Path, store: Path, place: str) -> None:
    with pytest.raises(ToolkitError):
        take_snapshot(folder, [Path(place)], store)


def test_toolkit_that_is_not_there_is_named(tmp_path: Path, store: Path) -> None:
    for toolkit, data in (
        (tmp_path / "no.py", []),
        (tmp_path / "no\0.py", []),
        (Path(__file__), [tmp_path / "gone"]),
    ):
        with pytest.raises(ToolkitError, match="cannot be found") as caught:
            take_snapshot(toolkit, data, store)
        assert caught.value.tip


def test_file_without_py_is_refused(tmp_path: Path, store: Path) -> None:
    (tmp_path / "toolkit.txt").touch()
    with pytest.raises(ToolkitError, match=r"toolkit\.txt is not a Python file"):
        take_snapshot(tmp_path / "toolkit.txt", [], store)


def test_folder_without_entry_names_the_three_that_were_looked_for(
    tmp_path: Path, store: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolkitError) as caught:
        take_snapshot(tmp_path / "empty", [], store)
    assert caught.value.cause == "none of __main__.py, toolkit.py, main.py is there"


@pytest.mark.parametrize("package", [False, True])
def test_entry_that_was_left_out_is_refused_with_the_reason(
    tmp_path: Path, store: Path, package: bool
) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    (tmp_path / "real.py").touch()
    (kit / "main.py").symlink_to("../real.py")
    if package:
        (kit / "__init__.py").touch()
    with pytest.raises(ToolkitError) as caught:
        take_snapshot(kit, [], store)
    assert "main.py: a link out of the folder" in caught.value.cause


def test_data_of_a_name_that_is_taken_is_refused(folder: Path, tmp_path: Path, store: Path) -> None:
    (tmp_path / "toolkit.py").touch()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    (tmp_path / "x").touch()
    for toolkit, data in (
        (folder / "toolkit.py", [tmp_path / "toolkit.py"]),
        (folder, [tmp_path / "toolkit.py"]),
        (folder, [tmp_path / "x", tmp_path / "a" / "x"]),
    ):
        with pytest.raises(ToolkitError, match="two things are named"):
            take_snapshot(toolkit, data, store)
    (folder / "__init__.py").touch()
    (tmp_path / "a" / "kit").touch()
    with pytest.raises(ToolkitError, match="two things are named"):
        take_snapshot(folder, [tmp_path / "a" / "kit"], store)


@pytest.mark.parametrize("shape", ["one file", "two files", "data"])
def test_more_than_the_permitted_size_is_refused_and_leaves_nothing(
    folder: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    (folder / "toolkit.py").write_bytes(b"#" * 10)
    if shape == "one file":
        (folder / "big").write_bytes(b"x" * 991)
    else:
        (folder / "half").write_bytes(b"x" * 500)
        place = folder if shape == "two files" else tmp_path
        (place / "rest").write_bytes(b"x" * 491)
    data = [tmp_path / "rest"] if shape == "data" else []
    monkeypatch.setattr(limits, "MAX_SNAPSHOT_BYTES", 1001)
    assert take_snapshot(folder, data, store)
    monkeypatch.setattr(limits, "MAX_SNAPSHOT_BYTES", 1000)
    with pytest.raises(ToolkitError, match="larger than 1000 B"):
        take_snapshot(folder, data, store)
    assert drafts(store) == []


def test_file_of_a_terabyte_is_refused_without_being_read(folder: Path, store: Path) -> None:
    with open(folder / "sparse", "wb") as sparse:
        sparse.truncate(1 << 40)
    started = time.monotonic()
    with pytest.raises(ToolkitError, match="larger than 256 MiB"):
        take_snapshot(folder, [], store)
    assert time.monotonic() - started < 5


def test_too_many_files_are_refused(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "empty").mkdir()
    for number in range(8):
        (folder / f"f{number}").touch()
    monkeypatch.setattr(_tree_copy, "MAX_ENTRIES", 10)
    take_snapshot(folder, [], store)
    (folder / "empty" / ".even-hidden").touch()
    with pytest.raises(ToolkitError, match="more than 10 files"):
        take_snapshot(folder, [], store)


def test_folders_that_multiply_through_links_end_at_a_bound(
    folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tree_copy, "MAX_ENTRIES", 500)
    for level in range(30):
        (folder / f"d{level}").mkdir()
        for twin in "ab":
            (folder / f"d{level}" / twin).symlink_to(f"../d{level + 1}")
    with pytest.raises(ToolkitError, match="more than 500"):
        take_snapshot(folder, [], store)
    assert drafts(store) == []


def test_folders_too_deep_are_refused(folder: Path, store: Path) -> None:
    (folder / "/".join(["d"] * 63)).mkdir(parents=True)
    take_snapshot(folder, [], store)
    (folder / "/".join(["d"] * 64)).mkdir()
    with pytest.raises(ToolkitError, match="folders deep"):
        take_snapshot(folder, [], store)


@pytest.mark.parametrize("shape", ["file", "folder"])
def test_what_cannot_be_read_is_named_and_refuses_the_toolkit(shape: str) -> None:
    # pytest's own directories are closed to the user that this test becomes.
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o777)
        with as_ordinary_user():
            kit = Path(open_to_all, "kit")
            kit.mkdir()
            (kit / "toolkit.py").touch()
            (kit / "closed").mkdir() if shape == "folder" else (kit / "closed").touch()
            (kit / "closed").chmod(0)
            try:
                with pytest.raises(ToolkitError, match="cannot read closed") as caught:
                    take_snapshot(kit, [], Path(open_to_all, "store"))
                assert caught.value.cause == "EACCES: Permission denied"
            finally:
                (kit / "closed").chmod(0o700)


def test_store_that_cannot_be_written_is_not_the_toolkits_fault(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SandboxError, match="cannot store") as caught:
        take_snapshot(folder, [], tmp_path / "file" / "store")
    assert not isinstance(caught.value, ToolkitError)


def test_names_from_the_toolkit_cannot_move_the_cursor(folder: Path, store: Path) -> None:
    (folder / ".\x1b[2J").touch()
    assert take_snapshot(folder, [], store).skipped == (".\\x1b[2J: hidden",)


# The digest, and what is on disk


def test_same_content_gives_the_same_digest_wherever_and_whenever(
    folder: Path, tmp_path: Path, store: Path
) -> None:
    other = tmp_path / "elsewhere" / "kit"
    other.mkdir(parents=True)
    (other / "toolkit.py").write_bytes((folder / "toolkit.py").read_bytes())
    os.utime(other / "toolkit.py", (1, 1))
    (other / "toolkit.py").chmod(0o600)
    (other / ".ignored").touch()
    assert take_snapshot(folder, [], store).digest == take_snapshot(other, [], store).digest
    assert len(os.listdir(store)) == 1


@pytest.mark.parametrize("change", ["content", "name", "executable", "empty folder", "folder"])
def test_every_difference_gives_another_digest(folder: Path, store: Path, change: str) -> None:
    (folder / "a").write_text("text")
    before = take_snapshot(folder, [], store)
    match change:
        case "content":
            (folder / "a").write_text("tex!")
        case "name":
            (folder / "a").rename(folder / "b")
        case "executable":
            (folder / "a").chmod(0o755)
        case "empty folder":
            (folder / "b").mkdir()
        case "folder":
            (folder / "a").unlink()
            (folder / "a").mkdir()
    assert take_snapshot(folder, [], store).digest != before.digest


def test_modes_and_times_are_the_same_for_all_whatever_the_umask(folder: Path, store: Path) -> None:
    (folder / "run.sh").touch()
    (folder / "run.sh").chmod(0o4711)
    (folder / "toolkit.py").chmod(0o666)
    (folder / "sub").mkdir(mode=0o700)
    (folder / "sub" / "deep").mkdir()
    before = os.umask(0o077)
    try:
        taken = take_snapshot(folder, [], store)
    finally:
        os.umask(before)
    found = {path: path.lstat() for path in (taken.directory, *taken.directory.rglob("*"))}
    modes = {path.name: stat.S_IMODE(status.st_mode) for path, status in found.items()}
    assert modes == {
        taken.digest: 0o755,
        "sub": 0o755,
        "deep": 0o755,
        "run.sh": 0o755,
        "toolkit.py": 0o644,
    }
    assert {status.st_mtime for status in found.values()} == {315_532_800.0}
    assert stat.S_IMODE(store.stat().st_mode) == 0o700


def test_edit_on_disk_changes_no_snapshot(folder: Path, store: Path) -> None:
    taken = take_snapshot(folder, [], store)
    (folder / "toolkit.py").write_text("changed")
    assert (taken.directory / "toolkit.py").read_text() == "print('hi')\n"


def test_name_that_is_no_text_is_kept(folder: Path, store: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (folder / name).touch()
    assert name in os.listdir(take_snapshot(folder, [], store).directory)


# The store


def test_existing_snapshot_is_reused_and_no_draft_stays(folder: Path, store: Path) -> None:
    first = take_snapshot(folder, [], store)
    inode = first.directory.stat().st_ino
    assert take_snapshot(folder, [], store) == first
    assert first.directory.stat().st_ino == inode
    assert os.listdir(store) == [first.digest]


@pytest.mark.parametrize("harm", ["missing", "short", "mode"])
def test_damaged_snapshot_is_replaced(folder: Path, store: Path, harm: str) -> None:
    taken = take_snapshot(folder, [], store)
    file = taken.directory / "toolkit.py"
    if harm == "missing":
        file.unlink()
    elif harm == "short":
        os.truncate(file, 0)
    else:
        file.chmod(0o600)
    assert take_snapshot(folder, [], store) == taken
    assert file.read_text() == "print('hi')\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644
    assert os.listdir(store) == [taken.digest]


def test_many_takers_at_once_all_get_the_one_whole_snapshot(folder: Path, store: Path) -> None:
    for number in range(50):
        (folder / f"f{number}").write_bytes(os.urandom(1000))
    with ThreadPoolExecutor(8) as takers:
        taken = set(takers.map(lambda _: take_snapshot(folder, [], store), range(32)))
    assert len(taken) == 1
    assert len(tree(taken.pop())) == 51
    assert len(os.listdir(store)) == 1


def test_failed_taker_leaves_nothing(folder: Path, tmp_path: Path, store: Path) -> None:
    with pytest.raises(ToolkitError):
        take_snapshot(folder, [tmp_path / "gone"], store)
    assert os.listdir(store) == []


def test_pruning_keeps_what_is_named_and_removes_other_snapshots(folder: Path, store: Path) -> None:
    old = take_snapshot(folder, [], store)
    (folder / "toolkit.py").write_text("new")
    new = take_snapshot(folder, [], store)
    prune(store, {new.digest})
    assert os.listdir(store) == [new.digest]
    with pytest.raises(SandboxError, match="cannot be used any more"):
        SnapshotHold(old)


def test_pruning_removes_drafts_only_once_they_are_old(store: Path) -> None:
    store.mkdir(parents=True)
    for name, age_s in (("draft-old", 3_700), ("draft-young", 3_500), ("foreign", 9_999)):
        (store / name / "tree").mkdir(parents=True)
        os.utime(store / name, (time.time() - age_s,) * 2)
    prune(store, set())
    assert sorted(os.listdir(store)) == ["draft-young", "foreign"]


def test_pruning_a_store_that_is_not_there_does_nothing(store: Path) -> None:
    prune(store, set())
    assert not store.exists()


def test_snapshot_that_another_process_holds_is_not_pruned(folder: Path, store: Path) -> None:
    taken = take_snapshot(folder, [], store)
    program = (
        "import sys, pathlib\n"
        "from atp_sandbox.jails.snapshot import Snapshot, SnapshotHold\n"
        "held = SnapshotHold(Snapshot('', pathlib.Path(sys.argv[1]), '', False))\n"
        "print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(taken.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        prune(store, set())
        assert taken.directory.exists()
        holder.kill()
    prune(store, set())
    assert not taken.directory.exists()


def test_hold_may_be_closed_again_and_several_may_hold(folder: Path, store: Path) -> None:
    taken = take_snapshot(folder, [], store)
    with SnapshotHold(taken) as first, SnapshotHold(taken):
        first.close()
        prune(store, set())
        assert taken.directory.exists()
    first.close()
    prune(store, set())
    assert not taken.directory.exists()
