"""`doctor` says what this machine can enforce, by doing it, and refuses where `serve` would.

First for real, here and on machines where the kernel refuses something (`around.py`); then what it
says of machines that are described to it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from atp_sandbox import doctor
from atp_sandbox.cli.doctor import render
from atp_sandbox.doctor import Evidence, Finding, Machine, State, Trial
from atp_sandbox.errors import IsolationError, SandboxError
from atp_sandbox.isolation import Isolation, Level, Waivable
from atp_sandbox.jails.cgroup_files import CgroupError
from atp_sandbox.jails.cgroups import CgroupSupport
from atp_sandbox.jails.remedies import REMEDIES
from workers.confinement.syscall_numbers import NUMBERS

ROOT = Path(__file__).resolve().parents[1]
IS_ROOT = os.geteuid() == 0
NEWUSER = 0x10000000
NAMESPACES = [0x00020000, *(1 << bit for bit in range(25, 31))]
LAYERS = ("capabilities", "no_new_privs", "seccomp", "landlock", "files", "network", "processes")
OF_NAMESPACES = ("namespaces", "pid", "root")
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root can make such a machine")


def run(
    *options: str, lacking: dict[str, Any] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`atp-sandbox doctor`, here or on a machine that lacks something."""
    command = [sys.executable, "-m", "atp_sandbox", "doctor", *options]
    if lacking is not None:
        command = [sys.executable, str(ROOT / "tests" / "around.py"), json.dumps(lacking), *command]
    return subprocess.run(
        command,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )


def told(
    *options: str, lacking: dict[str, Any] | None = None, status: int = 0
) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """The JSON object, and its findings by id."""
    done = run("--json", *options, lacking=lacking)
    assert done.returncode == status, done.stdout + done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["would_serve"] is (status == 0)
    rows = {row["id"]: row for row in report["findings"]}
    assert len(rows) == len(report["findings"])
    for row in rows.values():
        assert row["state"] in ("ok", "skip") or row["remedy"], row
    return report, rows


def states(rows: dict[str, dict[str, str]], *names: str) -> set[str]:
    return {rows[f"jail.{name}"]["state"] for name in names}


# -- here ------------------------------------------------------------------------------------------


def test_doctor_starts_a_real_worker_and_finds_its_confinement() -> None:
    report, rows = told()
    assert report["isolation"] == {"level": "strict", "waived": [], "warnings": []}
    assert states(rows, "start", *OF_NAMESPACES, *LAYERS) == {"ok"}
    assert "ENOENT" in rows["jail.files"]["text"]
    assert "ECONNREFUSED" in rows["jail.network"]["text"]
    assert "EPERM" in rows["jail.processes"]["text"]
    degraded = rows["limits.cgroup"]["state"] == "warn"
    assert degraded is bool(report["notes"])


def test_doctor_ends_with_a_count_and_what_serve_would_do() -> None:
    done = run()
    last = done.stdout.rstrip("\n").splitlines()[-1]
    assert re.fullmatch(r"\d+ ok(, .*)?: serve would start, with isolation strict", last)
    lines = done.stdout.splitlines()
    assert {"System", "Limits", "Jail"} <= set(lines)
    # A path is not cut; it may be a long one here.
    assert all(len(line) <= 80 or max(map(len, line.split())) > 50 for line in lines)


def test_without_isolation_nothing_is_claimed() -> None:
    report, rows = told("--isolation", "none")
    assert report["notes"][0].startswith("isolation NONE: ")
    assert states(rows, *OF_NAMESPACES, *LAYERS) == {"skip"}
    assert rows["jail.start"]["text"] == "A worker was started, as a plain process"


def test_what_is_waived_is_noted_first_and_not_looked_for() -> None:
    waived = ("--waive", "seccomp", "--waive", "landlock", "--waive", "cgroup")
    done = run(*waived)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("Note: waived cgroup: ")
    assert done.stdout.splitlines()[-1].endswith("strict without cgroup and landlock and seccomp")
    _, rows = told(*waived)
    assert states(rows, "seccomp", "landlock", "processes") == {"skip"}
    assert rows["limits.cgroup"]["state"] == "skip"
    assert rows["jail.landlock"]["text"].startswith("Waived: ")
    assert states(rows, "start", *OF_NAMESPACES, "capabilities", "files", "network") == {"ok"}


def test_output_that_has_no_such_signs_gets_others() -> None:
    done = run(PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "  + jail.start " in done.stdout


def test_help_teaches_signs_and_exit_code_with_an_example() -> None:
    shown = run("--help").stdout
    for part in ("atp-sandbox doctor --isolation container", "✗", "exit code", "--waive"):
        assert part in shown


def test_what_cannot_be_asked_for_is_an_error_of_use() -> None:
    done = run("--isolation", "container", "--waive", "landlock")
    assert done.returncode == 2
    assert "landlock cannot be waived at isolation container" in done.stderr


# -- where the kernel refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "layer", "remedy"),
    [
        ({"unshare": ["EPERM", 0, NEWUSER]}, "user namespaces", "sysctl"),
        ({"chroot": "EPERM"}, "a root directory for each call", "--isolation container"),
        ({"capset": "EPERM"}, "capabilities", "report it"),
        ({"prlimit64": "EPERM"}, "resource limits", "ulimit"),
        ({"landlock_create_ruleset": "ENOSYS"}, "Landlock", "--waive landlock"),
        ({"seccomp": "ENOSYS"}, "seccomp", "--waive seccomp"),
    ],
)
def test_layer_that_is_refused_is_named_with_its_remedy(
    refused: dict[str, Any], layer: str, remedy: str
) -> None:
    _, rows = told(lacking={"refuse": refused}, status=1)
    failed = [row for row in rows.values() if row["state"] == "fail"]
    assert [row["id"] for row in failed] == ["jail.start"]
    assert f"cannot enforce: {layer} (step " in failed[0]["text"]
    assert remedy in failed[0]["remedy"]


def test_layer_that_is_refused_and_waived_is_no_obstacle() -> None:
    lacking = {"refuse": {"landlock_create_ruleset": "EOPNOTSUPP"}}
    _, rows = told("--waive", "landlock", lacking=lacking)
    assert states(rows, "landlock") == {"skip"}
    assert states(rows, "start", "seccomp", *OF_NAMESPACES) == {"ok"}


def test_ordinary_container_is_told_of_the_level_for_containers() -> None:
    _, rows = told(lacking={"ordinary_container": True}, status=1)
    assert "namespace" in rows["jail.start"]["text"]
    assert "--isolation container" in rows["jail.start"]["remedy"]


def test_container_level_is_seen_to_hold_inside_an_ordinary_container() -> None:
    report, rows = told("--isolation", "container", lacking={"ordinary_container": True})
    assert report["notes"][0].startswith("isolation container: ")
    assert states(rows, "start", *LAYERS) == {"ok"}
    for name in ("files", "network"):
        assert "EACCES" in rows[f"jail.{name}"]["text"]
    for id_ in ("jail.namespaces", "jail.pid", "jail.root", "system.apparmor", "system.userns"):
        assert rows[id_]["state"] == "skip"
        assert "isolation container" in rows[id_]["text"]


DOCKER_REFUSES = """
    bpf fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie move_mount open_tree
    perf_event_open quotactl quotactl_fd setdomainname setns syslog keyctl add_key
"""
"""What its default filter refuses without privileges, beside those that it is told to allow."""


def test_calls_that_a_container_is_told_to_allow_are_enough() -> None:
    refused: dict[str, Any] = dict.fromkeys(DOCKER_REFUSES.split(), "EPERM")
    refused |= {"clone3": "ENOSYS", "clone": ["EPERM", 0, *NAMESPACES]}
    _, rows = told(lacking={"refuse": refused})
    assert states(rows, "start") == {"ok"}


@pytest.mark.parametrize("call", doctor.NEEDED_CALLS)
def test_calls_that_a_container_is_told_to_allow_are_all_needed(
    call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    _, rows = told(lacking={"refuse": {call: "EPERM"}}, status=1)
    assert rows["system.container"]["state"] == "warn"
    assert call in rows["system.container"]["remedy"]


UNDER = """
import os, subprocess, sys
from workers.confinement import namespaces, syscalls
{before}
os.execv(sys.executable, [sys.executable, "-m", "atp_sandbox", "doctor", "--json"])
"""


def under(before: str) -> dict[str, dict[str, str]]:
    """What doctor finds after these lines, which take a jail from the machine."""
    done = subprocess.run(
        [sys.executable, "-c", UNDER.format(before=before)],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return {row["id"]: row for row in json.loads(done.stdout)["findings"]}


def test_limit_of_no_user_namespaces_is_found_as_the_cause() -> None:
    # In a user namespace of our own, whose limit is ours to set.
    rows = under(
        "uid, gid = os.getuid(), os.getgid()\n"
        "syscalls.unshare(syscalls.CLONE_NEWUSER)\n"
        "open('/proc/self/setgroups', 'w').write('deny')\n"
        "open('/proc/self/uid_map', 'w').write(f'1000 {uid} 1')\n"
        "open('/proc/self/gid_map', 'w').write(f'1000 {gid} 1')\n"
        "namespaces.forbid_nested_user_namespaces()"
    )
    found = rows["system.max_userns"]
    assert found["state"] == "fail"
    assert found["text"].endswith("user.max_user_namespaces = 0")
    assert "\n  sysctl -w user.max_user_namespaces=15000" in found["remedy"]
    assert rows["system.userns"]["state"] == "ok"


@needs_root
@pytest.mark.parametrize(
    "before",
    [
        pytest.param(
            "syscalls.mount('mask', '/proc/irq', 'tmpfs', syscalls.MS_RDONLY)", id="masked /proc"
        ),
        pytest.param(
            "syscalls.mount('/proc/sys', '/proc/sys', None, syscalls.MS_BIND)\n"
            "syscalls.mount('none', '/proc/sys', None, 32 | syscalls.MS_BIND | syscalls.MS_RDONLY)",
            id="read-only /proc/sys",
        ),
    ],
)
def test_proc_of_a_container_is_a_reason_and_is_named(before: str) -> None:
    rows = under("namespaces.enter_mount_namespace()\n" + before)
    assert "/proc" in rows["jail.start"]["text"]
    assert "--isolation container" in rows["jail.start"]["remedy"]


@needs_root
def test_root_without_control_groups_sees_that_all_else_would_do() -> None:
    lacking = {"read_only_cgroups": True}
    _, rows = told(lacking=lacking, status=1)
    assert [id_ for id_, row in rows.items() if row["state"] == "fail"] == ["limits.cgroup"]
    assert "--waive cgroup" in rows["limits.cgroup"]["remedy"]
    assert states(rows, "start", *OF_NAMESPACES, *LAYERS) == {"ok"}
    report, rows = told("--waive", "cgroup", lacking=lacking)
    assert report["notes"] == report["isolation"]["warnings"]
    assert rows["limits.cgroup"]["state"] == "skip"


# -- other machines --------------------------------------------------------------------------------

OURS = {"pid": "pid:[1]", "net": "net:[1]"}
SEEN: dict[str, Any] = {
    "capabilities": 0,
    "no_new_privs": 1,
    "seccomp": 2,
    "namespaces": {"pid": "pid:[2]", "net": "net:[2]"},
    "root": 2,
    "others": [],
    "tried": {
        "file": "ENOENT",
        "unshare": "EPERM",
        "connect": "ECONNREFUSED",
        "fork": "EPERM",
    },
}
GROUPS = CgroupSupport(2, {"memory": "/sys/fs/cgroup", "pids": "/sys/fs/cgroup"})
NO_GROUPS = CgroupSupport(2, reason="it cannot be written", remedy="systemd-run --scope")
REFUSED = Trial(IsolationError("user namespaces", "No.", cause="EPERM", tip="Allow them."))
REFUSED_OTHERWISE = Trial(IsolationError("Landlock", "No.", cause="ENOSYS", tip="Get it."))
STARTED = Trial(landlock_abi=7, seen=SEEN)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "proc" / "sys" / "kernel").mkdir(parents=True)
    (tmp_path / "proc" / "sys" / "user").mkdir()
    return Machine(tmp_path, {}, "6.8.0-31-generic", "x86_64", 1000)


@pytest.fixture
def evidence(machine: Machine) -> Evidence:
    return Evidence(machine, Isolation(), GROUPS, STARTED, None, OURS, 1)


def found(evidence: Evidence) -> dict[str, Finding]:
    return {finding.id: finding for finding in doctor.findings(evidence)}


def test_ids_are_documented_and_no_others() -> None:
    documented = re.findall(r"^    (\w+\.\w+) ", doctor.__doc__ or "", re.M)
    known = [id_ for id_, _ in (*doctor._ALWAYS, *doctor._WITH_A_WORKER)]
    known.insert(known.index("jail.start") + 1, "jail.worker")
    assert documented == known


def test_whole_machine_is_ok_and_has_no_notes(evidence: Evidence) -> None:
    assert {finding.state for finding in doctor.findings(evidence)} == {State.OK}
    assert doctor.notes(evidence) == []


SYSCTLS = [
    ("system.apparmor", "kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ("system.userns", "kernel.unprivileged_userns_clone", "0", "1"),
    ("system.max_userns", "user.max_user_namespaces", "0", "15000"),
]


@pytest.mark.parametrize(("id_", "name", "limiting", "setting"), SYSCTLS)
@pytest.mark.parametrize("user_id", [0, 1000])
@pytest.mark.parametrize(
    ("trial", "state"),
    [(REFUSED, State.FAIL), (REFUSED_OTHERWISE, State.WARN), (STARTED, State.OK)],
)
def test_limits_on_user_namespaces_are_found_with_the_setting_that_lifts_them(
    id_: str,
    name: str,
    limiting: str,
    setting: str,
    user_id: int,
    trial: Trial,
    state: State,
    evidence: Evidence,
) -> None:
    path = evidence.machine.root / "proc" / "sys" / name.replace(".", "/")
    path.write_text(f"{limiting}\n")
    machine = replace(evidence.machine, user_id=user_id)
    row = found(replace(evidence, machine=machine, trial=trial))[id_]
    assert row.state is state
    assert f"{name} = {limiting}" in row.text
    assert (f"\n  sysctl -w {name}={setting}" in row.remedy) is (state is not State.OK)
    path.write_text(f"{setting}\n")
    assert found(replace(evidence, trial=trial))[id_].state is State.OK


def test_ubuntu_is_also_told_of_a_profile_for_this_interpreter(evidence: Evidence) -> None:
    name = "kernel/apparmor_restrict_unprivileged_userns"
    (evidence.machine.root / "proc" / "sys" / name).write_text("1\n")
    remedy = found(replace(evidence, trial=REFUSED))["system.apparmor"].remedy
    assert f"profile atp-sandbox {os.path.realpath(sys.executable)} flags=(unconfined)" in remedy
    assert "\n    userns," in remedy


def test_limit_that_is_the_hosts_is_to_be_set_there(evidence: Evidence) -> None:
    (evidence.machine.root / ".dockerenv").touch()
    (evidence.machine.root / "proc/sys/kernel/unprivileged_userns_clone").write_text("0")
    remedy = found(replace(evidence, trial=REFUSED))["system.userns"].remedy
    assert "on the host of the container" in remedy


@pytest.mark.parametrize("id_", [row[0] for row in SYSCTLS])
def test_sysctl_that_cannot_be_read_or_understood_is_a_row(id_: str, evidence: Evidence) -> None:
    name = {row[0]: row[1] for row in SYSCTLS}[id_]
    path = evidence.machine.root / "proc" / "sys" / name.replace(".", "/")
    path.write_text("perhaps\n")
    assert found(evidence)[id_].state is State.SKIP
    path.unlink()
    path.mkdir()
    row = found(evidence)[id_]
    assert (row.state, row.text) == (State.SKIP, f"{name} cannot be read: Is a directory")


@pytest.mark.parametrize(
    ("file", "environ", "kind", "settings"),
    [
        ("", {"KUBERNETES_SERVICE_HOST": "::1"}, "Kubernetes", "  hostUsers: false"),
        (".dockerenv", {"KUBERNETES_SERVICE_HOST": "::1"}, "Kubernetes", "procMount: Unmasked"),
        (".dockerenv", {}, "Docker", "--security-opt systempaths=unconfined"),
        ("run/.containerenv", {"container": "oci"}, "Podman", "--security-opt unmask=ALL"),
        ("", {"container": "podman"}, "Podman", "--security-opt seccomp=PROFILE.json"),
        ("", {"container": "lxc"}, "lxc", "unshare, mount, umount2"),
    ],
)
def test_container_is_told_what_it_has_to_allow(
    file: str, environ: dict[str, str], kind: str, settings: str, evidence: Evidence
) -> None:
    if file:
        path = evidence.machine.root / file
        path.parent.mkdir(exist_ok=True)
        path.touch()
    inside = replace(evidence, machine=replace(evidence.machine, environ=environ))
    assert found(inside)["system.container"].text == f"Inside a container ({kind})"
    row = found(replace(inside, trial=REFUSED))["system.container"]
    assert row.state is State.WARN
    assert settings in row.remedy
    assert row.remedy.endswith("--isolation container")
    for call in doctor.NEEDED_CALLS:
        assert call in row.remedy
    for other in (replace(inside, trial=REFUSED_OTHERWISE), at(inside, Level.CONTAINER)):
        assert found(other)["system.container"].state is State.OK


def at(evidence: Evidence, level: Level, *waived: Waivable) -> Evidence:
    return replace(evidence, isolation=Isolation(level, frozenset(waived)))


def test_no_container_is_no_finding(evidence: Evidence) -> None:
    assert found(evidence)["system.container"].text.startswith("Not inside a container")


@pytest.mark.parametrize(
    ("release", "level", "state"),
    [
        ("5.13.0", Level.STRICT, State.OK),
        ("5.12.19", Level.STRICT, State.FAIL),
        ("5.4.0-42-generic", Level.CONTAINER, State.FAIL),
        ("5.4.0-42-generic", Level.NONE, State.OK),
        ("4.18", Level.NONE, State.FAIL),
        ("7.0-rc1", Level.STRICT, State.OK),
        ("unknown", Level.STRICT, State.SKIP),
    ],
)
def test_kernel_is_as_old_as_the_level_allows(
    release: str, level: Level, state: State, evidence: Evidence
) -> None:
    old = replace(evidence, machine=replace(evidence.machine, release=release))
    row = found(at(replace(old, trial=REFUSED_OTHERWISE), level))["system.kernel"]
    assert row.state is state
    if state is State.FAIL:
        assert re.match(r"Linux 5\.\d+ or later", row.remedy)
        # What is backported is seen by doing it.
        assert found(at(old, level))["system.kernel"].state is State.OK


def test_machine_without_numbers_of_system_calls_is_named(evidence: Evidence) -> None:
    assert set(doctor.MACHINES) == set(NUMBERS)
    strange = replace(evidence.machine, architecture="riscv64")
    row = found(replace(evidence, machine=strange, trial=REFUSED))["system.machine"]
    assert (row.state, row.remedy) == (State.FAIL, "Use x86_64 or aarch64.")


def test_missing_control_groups_stop_root_at_strict_and_nobody_else(evidence: Evidence) -> None:
    bare = replace(evidence, support=NO_GROUPS)
    root = replace(bare, machine=replace(bare.machine, user_id=0))
    row = found(root)["limits.cgroup"]
    assert row.state is State.FAIL
    assert row.remedy == "systemd-run --scope\nOr do without them, by name: --waive cgroup."
    assert doctor.notes(root) == []
    for other in (bare, at(root, Level.CONTAINER), at(root, Level.NONE)):
        row = found(other)["limits.cgroup"]
        assert (row.state, row.remedy) == (State.WARN, "systemd-run --scope")
        assert "memory of calls is sampled" in doctor.notes(other)[-1]
    waived = at(root, Level.STRICT, Waivable.CGROUP)
    assert found(waived)["limits.cgroup"].state is State.SKIP
    assert [note.split(":")[0] for note in doctor.notes(waived)] == ["waived cgroup"]


def test_control_group_that_only_looked_usable_is_a_failure(evidence: Evidence) -> None:
    error = CgroupError("make", "/sys/fs/cgroup/atp-sandbox", OSError(16, "Busy"))
    row = found(replace(evidence, cgroup_error=error))["limits.cgroup"]
    assert row.state is State.FAIL
    assert "cannot make /sys/fs/cgroup/atp-sandbox: EBUSY" in row.text
    assert "--waive cgroup" in row.remedy


@pytest.mark.parametrize(
    ("version", "blocks", "release", "tip"),
    [
        (2, True, "6.8.0", "  mount -o remount,favordynmods /sys/fs/cgroup"),
        (1, True, "6.8.0", "  cgroup_favordynmods=true"),
        (2, True, "5.15.0", ""),
        (2, False, "6.8.0", ""),
    ],
)
def test_moves_that_wait_come_with_the_option_that_makes_them_fast(
    version: int, blocks: bool, release: str, tip: str, evidence: Evidence
) -> None:
    support = CgroupSupport(version, {"memory": "/sys/fs/cgroup"}, moves_block=blocks)
    machine = replace(evidence.machine, release=release)
    row = found(replace(evidence, support=support, machine=machine))["limits.moves"]
    assert row.state is State.OK
    assert row.remedy.endswith(tip)
    assert bool(row.remedy) is bool(tip)


@pytest.mark.parametrize(
    ("change", "id_"),
    [
        ({"capabilities": 1}, "jail.capabilities"),
        ({"tried": {**SEEN["tried"], "unshare": ""}}, "jail.capabilities"),
        ({"no_new_privs": 0}, "jail.no_new_privs"),
        ({"seccomp": 0}, "jail.seccomp"),
        ({"namespaces": {**SEEN["namespaces"], "net": OURS["net"]}}, "jail.namespaces"),
        ({"root": 1}, "jail.root"),
        ({"others": [2]}, "jail.root"),
        ({"tried": {**SEEN["tried"], "file": ""}}, "jail.files"),
        ({"tried": {**SEEN["tried"], "connect": ""}}, "jail.network"),
        ({"tried": {**SEEN["tried"], "fork": ""}}, "jail.processes"),
    ],
)
def test_worker_that_is_not_confined_is_a_failure(
    change: dict[str, Any], id_: str, evidence: Evidence
) -> None:
    rows = found(replace(evidence, trial=Trial(landlock_abi=7, seen={**SEEN, **change})))
    assert [row.id for row in rows.values() if row.state is State.FAIL] == [id_]
    assert rows[id_].remedy


def test_shared_pid_namespace_is_a_failure_of_both_its_rows(evidence: Evidence) -> None:
    seen = {**SEEN, "namespaces": OURS}
    rows = found(replace(evidence, trial=Trial(seen=seen)))
    failed = [id_ for id_, row in rows.items() if row.state is State.FAIL]
    assert failed == ["jail.namespaces", "jail.pid"]
    assert rows["jail.namespaces"].text.endswith(": pid, net")


def test_what_the_kernel_does_not_say_is_no_claim(evidence: Evidence) -> None:
    tried = {"file": "EACCES", "unshare": "EPERM"}
    silent = {**SEEN, "no_new_privs": None, "seccomp": None, "tried": tried}
    rows = found(replace(evidence, trial=Trial(seen=silent), own_namespaces={}))
    skipped = {id_ for id_, row in rows.items() if row.state is State.SKIP}
    quiet = ("namespaces", "pid", "no_new_privs", "seccomp", "network", "processes")
    assert skipped == {f"jail.{name}" for name in quiet}


def test_worker_without_an_answer_is_a_failure(evidence: Evidence) -> None:
    rows = found(replace(evidence, trial=Trial(no_answer="crashed: it ended")))
    assert list(rows)[-1] == "jail.worker"
    assert rows["jail.worker"].state is State.FAIL


def test_older_landlock_is_told_with_what_stands_in_for_the_newer(evidence: Evidence) -> None:
    text = found(replace(evidence, trial=Trial(landlock_abi=4, seen=SEEN)))["jail.landlock"].text
    assert text.startswith("Landlock, ABI 4; other layers stand in for ioctl_dev (Linux 6.10), ")


def test_layers_that_make_up_a_jail_are_named_as_elsewhere() -> None:
    assert {remedy.layer for remedy in REMEDIES.values()} >= doctor.NAMESPACE_LAYERS


def raises(error: Exception) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise error

    return refuse


@pytest.mark.parametrize(
    "error", [OSError(30, "Read-only file system"), RuntimeError("of another world")]
)
def test_strange_machine_is_rows_and_no_exception(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "SingleToolkit", raises(error))
    monkeypatch.setattr(doctor, "detect", raises(error))
    monkeypatch.setattr(doctor, "find_container", raises(error))
    report = doctor.examine(machine=Machine(tmp_path / "nothing", {}, "", "", 1000))
    rows = {finding.id: finding for finding in report.findings}
    assert rows["system.kernel"].state is State.SKIP
    assert rows["system.container"].state is State.SKIP
    assert rows["system.apparmor"].state is State.OK
    assert rows["limits.cgroup"].state is State.WARN
    assert rows["jail.start"].state is State.FAIL
    assert str(error) in rows["jail.start"].text
    assert not report.would_serve


def test_text_is_readable_whatever_the_machine_says(evidence: Evidence) -> None:
    long = "the group /sys/fs/cgroup/" + "x" * 48 + " is\x1b[31m not\nours"
    support = CgroupSupport(2, reason=long, remedy="word " * 40)
    error = SandboxError("It failed.", cause="cause " * 30, tip="tip " * 60)
    strange = replace(evidence, support=support, trial=Trial(error))
    report = doctor.Report(Isolation(), doctor.notes(strange), doctor.findings(strange))
    lines = render(report)
    assert max(map(len, lines)) <= 80
    assert all(line.isprintable() for line in lines)
    assert f"/sys/fs/cgroup/{'x' * 48}" in " ".join(lines)
    assert lines[-1].endswith("serve would not start, with isolation strict")
