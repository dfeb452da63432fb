"""What this machine can enforce, found by asking the kernel and by starting a real jail.

Each finding has a stable id, a state and, where something is missing, a remedy.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from atp_sandbox.confinement.landlock_features import Standing, substitutes
from atp_sandbox.errors import IsolationError, SandboxError
from atp_sandbox.jails.cgroups import detect
from atp_sandbox.settings import ToolkitSettings
from atp_sandbox.single import SingleToolkit

OLDEST_KERNEL = (5, 13)
"""mount_setattr came with 5.12, Landlock with 5.13."""
_PROBE = """
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="none", app_name="doctor")


@client.register_tool("status", [], [], "What the kernel says of a worker.", None, None, None)
def status(**kwargs):
    with open("/proc/self/status") as file:
        return dict(line.rstrip("\\n").split(":\\t", 1) for line in file if ":\\t" in line)


client.start()
"""


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row. `id` is stable; `remedy` says what to do on warn and fail."""

    id: str
    group: str
    state: State
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    findings = [*_system(), *_groups()]
    findings += _jail()
    return findings


def would_serve(findings: list[Finding]) -> bool:
    """Whether `serve` would start."""
    return not any(finding.state is State.FAIL for finding in findings)


def _system() -> Iterator[Finding]:
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2] if part.isdigit())
    is_new = numbers >= OLDEST_KERNEL
    yield Finding(
        "system.kernel",
        "System",
        State.OK if is_new else State.FAIL,
        f"Linux {release} on {platform.machine()}",
        "" if is_new else "Linux 5.13 or later is needed (mount_setattr, Landlock).",
    )
    version = ".".join(str(n) for n in sys.version_info[:3])
    yield Finding("system.python", "System", State.OK, f"CPython {version}, {sys.executable}")
    who = "root: each jail gets a user id of its own" if os.geteuid() == 0 else "an ordinary user"
    yield Finding("system.user", "System", State.OK, f"Running as {who}")
    yield _restriction()


def _restriction() -> Finding:
    """Ubuntu's limit on unprivileged user namespaces, which is easy to miss."""
    path = Path("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
    is_limited = os.geteuid() != 0 and path.exists() and path.read_text().strip() == "1"
    if not is_limited:
        return Finding(
            "system.apparmor", "System", State.OK, "No AppArmor limit on user namespaces for us"
        )
    return Finding(
        "system.apparmor",
        "System",
        State.WARN,
        "AppArmor restricts user namespaces of ordinary users",
        "Run as root, or: sysctl kernel.apparmor_restrict_unprivileged_userns=0",
    )


def _groups() -> Iterator[Finding]:
    support = detect()
    if support.is_usable:
        names = ", ".join(support.controllers)
        yield Finding(
            "limits.cgroup",
            "Limits",
            State.OK,
            f"Control groups, version {support.version}: {names}",
        )
    else:
        yield Finding(
            "limits.cgroup",
            "Limits",
            State.WARN,
            f"No writable control group ({support.reason}): memory of calls is sampled every "
            "20 ms, processes are limited per jail only",
            support.remedy,
        )


def _jail() -> list[Finding]:
    """Start a jail and a worker, and have the worker look at itself."""
    with tempfile.TemporaryDirectory(prefix="atp-doctor-") as directory:
        path = Path(directory, "doctor.py")
        path.write_text(_PROBE)
        try:
            with SingleToolkit(ToolkitSettings("doctor", path)) as single:
                (tool,) = single.discovery.registrations
                outcome, _ = single.call(tool, b"{}", None)
                landlock_abi = single.landlock_abi
        except IsolationError as error:
            return [
                Finding(
                    "jail.start", "Jail", State.FAIL, f"{error.message} {error.cause}", error.tip
                )
            ]
        except SandboxError as error:
            return [Finding("jail.start", "Jail", State.FAIL, error.message, error.cause)]
    return [
        Finding("jail.start", "Jail", State.OK, "A jail was started and verified"),
        *_worker(outcome),
        *_landlock(landlock_abi),
    ]


def _worker(outcome: object) -> Iterator[Finding]:
    import json

    from atp_sandbox.outcome import Success

    if not isinstance(outcome, Success):
        yield Finding("jail.worker", "Jail", State.FAIL, f"A worker did not answer: {outcome}")
        return
    status: dict[str, str] = json.loads(outcome.result_json)
    for id_, claim, holds in (
        ("jail.capabilities", "has no capability", int(status["CapEff"], 16) == 0),
        ("jail.no_new_privs", "has no_new_privs set", status.get("NoNewPrivs") == "1"),
        ("jail.seccomp", "has its system calls filtered", status.get("Seccomp") == "2"),
        ("jail.pid", "has a PID namespace of its own", int(status["Pid"]) < 100),
    ):
        state = State.OK if holds else State.FAIL
        text = f"A worker {claim}" if holds else f"It does not hold that a worker {claim}"
        yield Finding(id_, "Jail", state, text)


def _landlock(abi: int) -> Iterator[Finding]:
    missing = [f for f in substitutes(abi) if f.standing is not Standing.WAIVABLE]
    if not missing:
        yield Finding("jail.landlock", "Jail", State.OK, f"Landlock, ABI {abi}")
        return
    names = "; ".join(f"{feature.name} (Linux {feature.since_kernel})" for feature in missing)
    yield Finding(
        "jail.landlock",
        "Jail",
        State.OK,
        f"Landlock, ABI {abi}; substituted by other layers: {names}",
    )
