"""Plain scratch directories: measured and removed whatever a tool has made of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from workers.confinement.scratch import PlainSlots

KIB = 1024


@pytest.fixture
def slots(tmp_path: Path) -> PlainSlots:
    plan: dict[str, Any] = {
        "scratch": {
            "directory": str(tmp_path),
            "has_views": False,
            "bytes": 256 * KIB,
            "files": 100,
        }
    }
    slots = PlainSlots(plan)
    slots.prepare()
    slots.renew(1)
    return slots


def renew(slots: PlainSlots) -> None:
    """To the end of what is done a bit at a time."""
    slots.renew(1)
    while slots.tidy():
        pass


def make_deep(top: Path, levels: int) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(top)
        for _ in range(levels):
            os.mkdir("deeper")
            os.chdir("deeper")
    finally:
        os.chdir(here)
        os.close(here)


def test_renewed_slot_is_empty_and_open_to_its_owner_alone(
    slots: PlainSlots, tmp_path: Path
) -> None:
    (tmp_path / "1" / "file").write_text("left")
    renew(slots)
    assert [list(path.iterdir()) for path in tmp_path.glob("[!k]*")] == [[], []]
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o700


def test_tree_deeper_than_any_recursion_or_path_is_removed(
    slots: PlainSlots, tmp_path: Path
) -> None:
    make_deep(tmp_path / "1", 1500)
    renew(slots)
    assert [list(path.iterdir()) for path in tmp_path.glob("[!k]*")] == [[], []]


def test_directories_that_are_closed_are_removed(slots: PlainSlots, tmp_path: Path) -> None:
    closed = tmp_path / "1" / "closed" / "inner" / "innermost"
    closed.mkdir(parents=True)
    (closed / "file").write_text("left")
    for path in (closed, closed.parent, closed.parent.parent):
        path.chmod(0)
    renew(slots)
    assert [list(path.iterdir()) for path in tmp_path.glob("[!k]*")] == [[], []]


def test_what_a_link_names_is_neither_removed_nor_changed(
    slots: PlainSlots, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    (tmp_path / "1" / "directory").symlink_to(kept)
    (tmp_path / "1" / "sub").mkdir()
    (tmp_path / "1" / "sub" / "directory").symlink_to(kept)
    renew(slots)
    slots.close()
    assert kept.stat().st_mode & 0o777 == 0o500


def test_slot_that_is_a_link_is_not_followed(slots: PlainSlots, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("kept")
    (tmp_path / "1").rmdir()
    (tmp_path / "1").symlink_to(kept)
    assert slots.is_full(1), "nobody knows"
    renew(slots)
    slots.close()
    assert (kept / "file").read_text() == "kept"


def test_large_tree_is_removed_a_bit_at_a_time(slots: PlainSlots, tmp_path: Path) -> None:
    for number in range(2000):
        (tmp_path / "1" / str(number)).touch()
    slots.renew(1)
    assert list((tmp_path / "1").iterdir()) == [], "it is fresh at once"
    turns = 1
    while slots.tidy():
        turns += 1
    assert turns > 5
    assert len(list(tmp_path.iterdir())) == 2


def test_closed_or_many_directories_hide_nothing(slots: PlainSlots, tmp_path: Path) -> None:
    closed = tmp_path / "1" / "closed"
    closed.mkdir()
    (closed / "large").write_bytes(b"x" * 300 * KIB)
    closed.chmod(0o300)
    assert slots.is_full(1)
    renew(slots)
    assert not slots.is_full(1)
    (tmp_path / "1").chmod(0)
    assert not slots.is_full(1)
    renew(slots)


def test_slot_is_full_with_too_many_bytes_or_files(slots: PlainSlots, tmp_path: Path) -> None:
    assert not slots.is_full(1)
    assert not slots.is_full(7), "one that nobody has"
    (tmp_path / "1" / "sub").mkdir()
    (tmp_path / "1" / "sub" / "large").write_bytes(b"x" * 300 * KIB)
    assert slots.is_full(1)
    renew(slots)
    assert not slots.is_full(1)
    for number in range(100):
        (tmp_path / "1" / str(number)).touch()
    assert slots.is_full(1)


def test_sparse_file_counts_as_what_is_stored(slots: PlainSlots, tmp_path: Path) -> None:
    with (tmp_path / "1" / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert not slots.is_full(1)


def test_nothing_of_ours_is_left_after_close(slots: PlainSlots, tmp_path: Path) -> None:
    make_deep(tmp_path / "1", 20)
    slots.close()
    slots.close()
    assert list(tmp_path.iterdir()) == []
