"""What one jail consists of, as data: the plan that `workers.warden` carries out step by step.

PURE: from what the machine has (`HostView`) and what the toolkit may do to a JSON object.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atp_sandbox.limits import Limits

INSIDE_ID = 1000
JAIL_NAME = "jail"
MIN_LANDLOCK_ABI = 1
"""Linux 5.13. What a later one brings is substituted: see `landlock_features`."""
FIRST_SLOTS = 3
"""Mounted by the warden unasked: the import's, and two with which the layers are verified."""
RESTING_PROCESSES = 8
"""Warden, zygote, and those that build and verify the jail."""
SPARE_SLOTS = 4
"""Scratch slots beyond one a call and one forked ahead: those that are just being freed."""


@dataclass(frozen=True, slots=True)
class HostView:
    """What of this machine a jail may see; found once by `jails.host`."""

    read_only: tuple[str, ...]
    """Existing absolute paths of files and directories, bound at their own place."""
    symlinks: tuple[tuple[str, str], ...]
    """(path, target) for directories that are links on this machine, such as /lib."""
    site_path: tuple[str, ...]
    """Directories of installed packages, appended to `sys.path`."""
    hidden: tuple[str, ...]
    """Paths inside `read_only` that a toolkit must not see: this project's own code."""
    msgpack_path: str
    """The directory from which `workers` imports msgpack."""
    executable: str
    """The interpreter, which is in `read_only` and becomes `sys.executable` inside."""


@dataclass(frozen=True, slots=True)
class ToolkitView:
    """The toolkit's side of a jail."""

    directory: str
    """Its snapshot."""
    entry: str
    """The file to run, relative to the snapshot."""
    package: str
    """The package it runs in; empty for a plain script."""
    import_path: tuple[str, ...]
    """What goes first on `sys.path`, as seen inside."""
    env: Mapping[str, str]


def slot_count(limits: Limits) -> int:
    """How many scratch slots a jail has: the import's, one for every worker, some to spare."""
    return 1 + 2 * limits.concurrency + SPARE_SLOTS


def jail_processes(limits: Limits) -> int:
    """Processes and threads that a whole jail may have: its own few, and those of all its calls."""
    return RESTING_PROCESSES + 2 * limits.concurrency * limits.processes


def jail_plan(
    host: HostView,
    toolkit: ToolkitView,
    limits: Limits,
    *,
    outside_id: int | None,
    mountpoint: str,
    calls_per_worker: int,
) -> dict[str, object]:
    """The plan of one jail. `outside_id` is the unprivileged id a root supervisor gives it."""
    slots = slot_count(limits)
    return {
        "outside_id": outside_id,
        "mountpoint": mountpoint,
        "directories": [
            "/dev",
            "/proc",
            "/tmp",
            "/toolkit",
            *(f"/scratch/{slot}" for slot in range(slots)),
        ],
        "symlinks": [
            {"path": path, "target": target}
            for path, target in (
                *host.symlinks,
                ("/dev/fd", "/proc/self/fd"),
                ("/dev/stdin", "/proc/self/fd/0"),
                ("/dev/stdout", "/proc/self/fd/1"),
                ("/dev/stderr", "/proc/self/fd/2"),
            )
        ],
        "binds": [
            *({"source": path, "target": path} for path in outermost(host.read_only)),
            {"source": toolkit.directory, "target": "/toolkit"},
        ],
        "files": [{"path": path, "text": text} for path, text in _etc().items()],
        "masks": [path for path in host.hidden if _is_under(path, host.read_only)],
        "scratch_bytes": limits.scratch_bytes,
        "scratch_files": limits.scratch_files,
        "first_slots": FIRST_SLOTS,
        "landlock_abi": MIN_LANDLOCK_ABI,
        "rlimits": {
            # Not 0, which a core dump that is piped to a program ignores; 1 forbids both: core(5).
            "core": 1,
            "nofile": limits.open_files,
            # Counts for the whole jail; what one call may have is its control group's matter.
            "nproc": jail_processes(limits),
            # The tmpfs bounds what is stored; this bounds what a sparse file may claim.
            "fsize": 4 * limits.scratch_bytes,
            "memlock": 64 * 1024,
            "msgqueue": 0,
            "nice": 0,
            "rtprio": 0,
            "sigpending": 256,
        },
        "env": jail_environment(toolkit.env),
        "toolkit_path": list(toolkit.import_path),
        "site_path": list(host.site_path),
        "entry": toolkit.entry,
        "package": toolkit.package,
        "msgpack_path": host.msgpack_path,
        "executable": host.executable,
        "calls_per_worker": calls_per_worker,
        "output_bytes": limits.output_bytes,
    }


def jail_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a toolkit; nothing of the supervisor's own is in it."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": "/scratch/0",
        "TMPDIR": "/scratch/0",
        "LANG": "C.UTF-8",
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "ATP_API_KEY": "sandbox-placeholder",
    }
    # One thread each: a zygote with threads cannot be forked safely.
    for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
        environment[f"{library}_NUM_THREADS"] = "1"
    environment.update(extra)
    return environment


def outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that another one contains, sorted."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not _is_under(path, kept):
            kept.append(path)
    return kept


def _is_under(path: str, directories: Sequence[str]) -> bool:
    return any(path == d or path.startswith(d.rstrip(os.sep) + os.sep) for d in directories)


def _etc() -> dict[str, str]:
    return {
        "/etc/passwd": f"sandbox:x:{INSIDE_ID}:{INSIDE_ID}:sandbox:/scratch:/bin/false\n",
        "/etc/group": f"sandbox:x:{INSIDE_ID}:\n",
        "/etc/hostname": f"{JAIL_NAME}\n",
        "/etc/hosts": f"127.0.0.1 localhost {JAIL_NAME}\n::1 localhost\n",
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "/etc/resolv.conf": "",
    }
