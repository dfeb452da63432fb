"""What a zygote holds after its import goes into huge pages, and nothing that it does not hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.confinement.huge_pages import whole_ranges

ROOT = Path(__file__).resolve().parents[1]
HUGE = 2 * 1024 * 1024
HELD = 0x7F0000100000
"""Where a mapping begins: in the middle of a huge page."""


def mapping(
    megabytes: int, held: int, *, rights: str = "rw-p", inode: int = 0, name: str = ""
) -> list[str]:
    """Two lines as proc(5) has them for a mapping at `HELD`, of which `held` MiB are in memory."""
    end = HELD + megabytes * 1024 * 1024
    head = f"{HELD:x}-{end:x} {rights} 00000000 00:00 {inode} {name}\n"
    return [head, f"Size: {megabytes * 1024} kB\n", f"Rss: {held * 1024} kB\n"]


@pytest.mark.parametrize("name", ["", "[heap]"])
def test_whole_huge_pages_of_what_is_held(name: str) -> None:
    found = list(whole_ranges(iter(mapping(10, 10, name=name))))
    assert found == [(HELD + HUGE // 2, HELD + HUGE // 2 + 4 * HUGE)]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param(mapping(10, 5), id="half of it is not in memory"),
        pytest.param(mapping(2, 2), id="no whole huge page"),
        pytest.param(mapping(10, 10, rights="r--p"), id="not writable"),
        pytest.param(mapping(10, 10, rights="rw-s"), id="shared"),
        pytest.param(mapping(10, 10, inode=7, name="/lib/a.so"), id="a file"),
        pytest.param(mapping(10, 10, name="[stack]"), id="the stack"),
        pytest.param([], id="nothing"),
    ],
)
def test_what_is_left_as_it_is(lines: list[str]) -> None:
    assert list(whole_ranges(iter(lines))) == []


HOLD_AND_COLLAPSE = """
import mmap
from workers.confinement import huge_pages

def of(name):
    with open("/proc/self/smaps_rollup") as file:
        return next(int(row.split()[1]) for row in file if row.startswith(name + ":"))

held = mmap.mmap(-1, 16 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
held.write(b"x" * len(held))
reserved = mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ)
before = of("Rss")
huge_pages.collapse()
assert held[:] == b"x" * len(held)
print(of("AnonHugePages"), of("Rss") - before)
"""


def test_collapse_takes_no_memory_that_was_not_held() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOLD_AND_COLLAPSE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    huge_kib, grown_kib = map(int, done.stdout.split())
    assert grown_kib < 4 * 1024
    if not huge_kib:
        pytest.skip("this kernel has no huge pages to give: MADV_COLLAPSE, Linux 6.1")
    assert huge_kib >= 12 * 1024
