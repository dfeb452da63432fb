"""Scratch slots: one small tmpfs a call, mounted and unmounted by the warden alone. tmpfs(5).

A slot is empty when a worker gets it and gone, with everything in it, after that worker. The
supervisor never looks inside.
"""

from __future__ import annotations

import os
from typing import Any

from . import syscalls

_FLAGS = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC


IMPORT_SLOT = 0


def slot_path(slot: int) -> str:
    """Where slot number `slot` is inside the jail."""
    return f"/scratch/{slot}"


class Slots:
    """The mounted slots of one jail; owned by the warden."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._options = f"mode=0700,size={plan['scratch_bytes']},nr_inodes={plan['scratch_files']}"
        self._mounted: set[int] = set()

    def mount(self, slot: int) -> None:
        """Give `slot` a fresh, empty scratch directory; what was there is dropped."""
        if slot in self._mounted:
            self._mounted.discard(slot)
            syscalls.unmount(slot_path(slot), syscalls.MNT_DETACH)
        syscalls.mount("scratch", slot_path(slot), "tmpfs", _FLAGS, self._options)
        self._mounted.add(slot)

    def seal_import(self) -> None:
        """Make the import's scratch read-only: no call can harm what later calls find there.

        A bind over itself, since a mount in use for writing cannot be made read-only in place.
        """
        path = slot_path(IMPORT_SLOT)
        syscalls.mount(path, path, None, syscalls.MS_BIND)
        syscalls.mount_set_attributes(path, syscalls.MOUNT_ATTR_RDONLY, recursive=False)

    def is_full(self, slot: int) -> bool:
        """Whether no further page or no further file fits into the slot (statvfs(3))."""
        if slot not in self._mounted:
            return False
        usage = os.statvfs(slot_path(slot))
        return usage.f_bfree == 0 or usage.f_ffree == 0
