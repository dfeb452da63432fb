"""Whether and where we may put limits on groups of processes here: only looks, changes nothing.

Reads `/proc/self/cgroup` and `mountinfo` (cgroups(7), proc(5)) and asks the file system for
permission. Version 2 is taken where it has the controllers, else version 1.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from atp_sandbox.jails import cgroups_v1, cgroups_v2
from atp_sandbox.jails.cgroup_files import CgroupError, read_value


@dataclass(frozen=True, slots=True)
class CgroupSupport:
    """What this machine offers. Usable if there is no `reason` against it."""

    version: int
    """1 or 2; the one that `reason` is about if neither is usable; 0 if there is none at all."""
    directories: Mapping[str, str] = field(default_factory=dict)
    """Controller → directory of the group, ours or above our leaf, in which we may make others."""
    reason: str = ""
    remedy: str = ""
    moves_block: bool = False
    """Whether a move, unless one came just before, takes 10 ms: to be done by a `Mover`.

    The kernel waits for an RCU grace period, since Linux 6.0 unless mounted with `favordynmods`.
    """

    @property
    def is_usable(self) -> bool:
        return not self.reason

    @property
    def controllers(self) -> tuple[str, ...]:
        return tuple(self.directories)


@dataclass(frozen=True, slots=True)
class _Mount:
    kind: str
    root: str
    point: str
    options: frozenset[str]

    def find(self, group: str) -> str | None:
        """Where `group` is seen under this mount; None if it is outside of it."""
        root = self.root.rstrip("/")
        if group != root and not group.startswith(f"{root}/"):
            return None
        directory = f"{self.point}{group[len(root) :]}".rstrip("/")
        return directory if os.path.isdir(directory) else None


def detect(
    *, proc: Path = Path("/proc/self"), environ: Mapping[str, str] | None = None
) -> CgroupSupport:
    """Look. `proc` is the directory of our own process, `environ` our environment."""
    mounts = list(_read_mounts(proc / "mountinfo"))
    own = _read_own_groups(proc / "cgroup")
    tried = [_detect_v2(mounts, own), _detect_v1(mounts, own)]
    for support in tried:
        if support.is_usable:
            return support
    # Where version 1 has the memory controller, version 2 cannot have it.
    best = max(tried, key=lambda support: support.version == 1)
    remedy = _remedy(best.version, os.environ if environ is None else environ)
    return CgroupSupport(best.version, reason=best.reason, remedy=remedy)


def _detect_v2(mounts: Iterable[_Mount], own: Mapping[str, str]) -> CgroupSupport:
    group = own.get("")
    places = [
        (mount, directory)
        for mount in mounts
        if mount.kind == "cgroup2" and group and (directory := mount.find(group))
    ]
    if not places:
        return CgroupSupport(0, reason="no cgroup hierarchy is mounted here")
    mount, directory = places[0]
    if os.path.basename(directory) == cgroups_v2.SUPERVISOR and _is_writable(
        os.path.dirname(directory)
    ):
        directory = os.path.dirname(directory)
    try:
        there = read_value(f"{directory}/cgroup.controllers").split()
        reason = _reason_against_v2(directory, there)
    except CgroupError as error:
        return CgroupSupport(2, reason=f"{error.message}: {error.cause}")
    wanted = [name for name in (*cgroups_v2.REQUIRED, *cgroups_v2.OPTIONAL) if name in there]
    return CgroupSupport(
        2,
        dict.fromkeys(wanted, directory),
        reason,
        moves_block="favordynmods" not in mount.options,
    )


def _reason_against_v2(directory: str, controllers: list[str]) -> str:
    missing = [name for name in cgroups_v2.REQUIRED if name not in controllers]
    if missing:
        return f"the group {directory} has not been given: {', '.join(missing)}"
    if not _is_writable(directory):
        return f"the group {directory} cannot be written by user {os.geteuid()}"
    if cgroups_v2.is_root(directory):
        return ""
    if read_value(f"{directory}/cgroup.type") != "domain":
        return f"the group {directory} is a threaded one"
    others = set(read_value(f"{directory}/cgroup.procs").split()) - {str(os.getpid())}
    if others:
        return f"{len(others)} processes beside this one are in the group {directory}"
    return ""


def _detect_v1(mounts: Iterable[_Mount], own: Mapping[str, str]) -> CgroupSupport:
    seen: dict[str, str] = {}
    moves_block = False
    for controller in (*cgroups_v1.REQUIRED, *cgroups_v1.OPTIONAL):
        for mount in mounts:
            if mount.kind == "cgroup" and controller in mount.options and controller in own:
                directory = mount.find(own[controller])
                if directory is not None and not _is_writable(seen.get(controller, "")):
                    seen[controller] = directory
                    moves_block |= "favordynmods" not in mount.options
    if "memory" not in seen:
        return CgroupSupport(0, reason="no memory controller is mounted here")
    for controller in cgroups_v1.REQUIRED:
        if controller not in seen:
            return CgroupSupport(1, reason=f"the {controller} controller is not mounted here")
        if not _is_writable(seen[controller]):
            reason = f"the group {seen[controller]} cannot be written by user {os.geteuid()}"
            return CgroupSupport(1, reason=reason)
    usable = {name: directory for name, directory in seen.items() if _is_writable(directory)}
    return CgroupSupport(1, usable, moves_block=moves_block)


def _is_writable(directory: str) -> bool:
    """Whether we may make groups in `directory` and move processes there."""
    names = [".", "cgroup.procs"]
    if os.path.exists(f"{directory}/cgroup.subtree_control"):
        names.append("cgroup.subtree_control")
    return all(os.access(os.path.join(directory, n), os.W_OK, effective_ids=True) for n in names)


def _read_own_groups(path: Path) -> dict[str, str]:
    """Controller → path of our group as our cgroup namespace has it; `""` is version 2."""
    own: dict[str, str] = {}
    for line in _lines(path):
        number, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        for controller in controllers.split(",") if controllers else [""] if number == "0" else []:
            own[controller] = group
    return own


def _read_mounts(path: Path) -> Iterator[_Mount]:
    for line in _lines(path):
        left, _, right = line.partition(" - ")
        first, last = left.split(" "), right.split(" ")
        if last[0] in ("cgroup", "cgroup2"):
            options = frozenset(last[2].split(","))
            yield _Mount(last[0], _unescape(first[3]), _unescape(first[4]), options)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []  # no /proc, or a kernel without cgroups: nothing is found, and that is said


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _remedy(version: int, environ: Mapping[str, str]) -> str:
    """What to do, for what seems to be around us."""
    if "KUBERNETES_SERVICE_HOST" in environ:
        return (
            "Kubernetes mounts groups read-only: have the container runtime mount them writable "
            "(containerd 2.1: cgroup_writable = true for the runtime class; CRI-O: annotation "
            "io.kubernetes.cri-o.cgroup2-mount-hierarchy-rw) and make this the container's only "
            "process."
        )
    if environ.get("container") or os.path.exists("/.dockerenv"):
        return (
            "The container needs groups that it may write, and this as its only process: "
            "docker run --cgroupns=private --security-opt writable-cgroups=true (Docker 28; before "
            "that --privileged), podman run --cgroupns=private --security-opt "
            "unmask=/sys/fs/cgroup."
        )
    if os.path.isdir("/run/systemd/system"):
        if os.geteuid() == 0:
            return (
                "Start it in a group of its own: systemd-run --scope -p Delegate=yes COMMAND; "
                "in a service's unit: Delegate=yes."
            )
        return (
            "Start it in a group of its own: systemd-run --user --scope -p Delegate=yes COMMAND; "
            "in a service's unit: Delegate=yes. If memory is still missing, as root: systemctl "
            "edit user@.service, with Delegate=cpu memory pids in [Service]."
        )
    if version == 1:
        return "Run as root, or chown a group in each hierarchy to this user and start inside them."
    return (
        "Start it as the only process of a group whose directory, cgroup.procs and "
        "cgroup.subtree_control belong to this user, with memory and pids in cgroup.controllers."
    )
