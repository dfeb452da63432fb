"""What a measurement depends on beside the code: machine, kernel, versions, how busy it was."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess

import psutil

from benchmarks.system import ROOT

PACKAGES = (
    *("atp-sandbox", "websocket-client", "websockets", "msgpack", "psutil", "pebble"),
    *("billiard", "loky", "matplotlib"),
)


def surroundings() -> dict[str, object]:
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "processor": _processor(),
        "cores": os.process_cpu_count() if hasattr(os, "process_cpu_count") else _cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "user": "root" if os.geteuid() == 0 else "ordinary user",
        "load_before": os.getloadavg(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def summary(found: dict[str, object]) -> str:
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gb']} GB; "
        f"Linux {found['kernel']}, CPython {found['python']}, as {found['user']}; {found['date']}"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """Of the working tree, if it is one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
