"""The jail's file system: built from nothing on a tmpfs, entered with pivot_root.

What the plan names is bound read-only with every submount (mount_setattr, Linux 5.12); the rest of
the machine's files has no name inside. mount_namespaces(7), pivot_root(2), proc(5).
"""

from __future__ import annotations

import os
from typing import Any

from . import syscalls

_READ_ONLY = syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV
_PLAIN = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
_DEVICES = ("null", "zero", "full", "random", "urandom")


def build(plan: dict[str, Any]) -> None:
    """Put the new root together at `plan["directory"]`; run where its sources can be reached."""
    new, parts = plan["directory"], plan["root"]
    syscalls.mount("jail", new, "tmpfs", _PLAIN, "mode=0755,size=1m,nr_inodes=16k")
    for directory in parts["directories"]:
        os.makedirs(new + directory, mode=0o755, exist_ok=True)
    for link in parts["symlinks"]:
        os.makedirs(os.path.dirname(new + link["path"]), mode=0o755, exist_ok=True)
        os.symlink(link["target"], new + link["path"])
    for bind in parts["binds"]:
        _bind(bind["source"], new + bind["target"])
    for name in _DEVICES:
        _bind_device("/dev/" + name, f"{new}/dev/{name}")
    for entry in parts["files"]:
        _write(new + entry["path"], entry["text"])
    for path in parts["masks"]:
        syscalls.mount(
            "mask", new + path, "tmpfs", _PLAIN | syscalls.MS_RDONLY, "mode=0755,size=4k"
        )


def enter(plan: dict[str, Any]) -> None:
    """Make the built root this process's root, with a /proc of its own PID namespace.

    To be called by the first process of the PID namespace. The machine's files are gone afterwards.
    """
    new = plan["directory"]
    # Mounts that came from a more privileged namespace are locked, and pivot_root refuses them.
    syscalls.mount(new, new, None, syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount("proc", new + "/proc", "proc", _PLAIN, "hidepid=4,subset=pid")
    os.chdir(new)
    syscalls.pivot_root_here()
    syscalls.unmount(".", syscalls.MNT_DETACH)
    os.chdir("/")
    # The tmpfs itself: from here on nothing can be added to the root.
    syscalls.mount_set_attributes("/", _READ_ONLY, recursive=False)


def _bind(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.makedirs(target, mode=0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        _write(target, "")
    syscalls.mount(source, target, None, syscalls.MS_BIND | syscalls.MS_REC)
    syscalls.mount_set_attributes(target, _READ_ONLY, recursive=True)


def _bind_device(source: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
    _write(target, "")
    syscalls.mount(source, target, None, syscalls.MS_BIND)
    syscalls.mount_set_attributes(target, syscalls.MOUNT_ATTR_NOSUID, recursive=False)


def _write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(path, 0o644)
