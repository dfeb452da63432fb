"""Huge pages under what a zygote holds after its import: each fork, and its end, then costs less.

A fork copies one entry of the page table for 512 pages, and a child undoes as little. madvise(2),
MADV_COLLAPSE (Linux 6.1); Documentation/admin-guide/mm/transhuge.rst.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import syscalls

_HUGE_BYTES = 2 * 1024 * 1024
_MOSTLY = 0.9
"""Of a mapping that must be in memory already: what is not would be taken as well."""


def collapse() -> None:
    """As far as the kernel has huge pages to give; never raises, never changes what is there."""
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            ranges = list(whole_ranges(file))
    except OSError:
        return
    for start, end in ranges:
        if not syscalls.collapse_pages(start, end - start):
            return


def whole_ranges(smaps: Iterator[str]) -> Iterator[tuple[int, int]]:
    """PURE: start and end of the whole huge pages in writable anonymous mappings.

    Of those that are mostly in use; `smaps` are the lines of proc(5)'s file of that name.
    """
    start = end = 0
    for line in smaps:
        first, *rest = line.split()
        if "-" in first and rest[0].startswith("rw-p") and rest[3] == "0" and rest[4:] in _NAMES:
            low, high = (int(part, 16) for part in first.split("-"))
            start, end = -(-low // _HUGE_BYTES) * _HUGE_BYTES, high // _HUGE_BYTES * _HUGE_BYTES
            size_bytes = high - low
        elif "-" in first:
            end = start
        elif first == "Rss:" and start < end and int(rest[0]) * 1024 >= _MOSTLY * size_bytes:
            yield start, end


_NAMES: tuple[list[str], ...] = ([], ["[heap]"])
