"""Fail closed: with any one layer refused by the kernel, no toolkit runs and the layer is named.

`around.py` has the kernel refuse it, for the whole supervisor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import toolkit_text

ROOT = Path(__file__).resolve().parents[1]
IS_ROOT = os.geteuid() == 0
NEWUSER, NEWNET = 0x10000000, 0x40000000
needs_root = pytest.mark.skipif(not IS_ROOT, reason="only root takes this step")

BODY = """
    import os
    os.write(2, b"the import ran")
"""


def around(
    lacking: dict[str, Any], tmp_path: Path, *options: str, command: str = "call"
) -> subprocess.CompletedProcess[str]:
    """`atp-sandbox COMMAND` on a toolkit, on a machine that lacks something."""
    kit = tmp_path / "kit.py"
    kit.write_text(toolkit_text(BODY))
    probe = ["probe", "source=def f(): return 42", "name=f", "arguments:=[]"]
    arguments = [str(kit), *(probe if command == "call" else []), *options]
    sandbox = [sys.executable, "-m", "atp_sandbox", command, *arguments]
    return subprocess.run(
        [sys.executable, str(ROOT / "tests" / "around.py"), json.dumps(lacking), *sandbox],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("refused", "layer"),
    [
        pytest.param({"unshare": ["EPERM", 0, NEWUSER]}, "user namespaces", id="user namespace"),
        pytest.param({"unshare": ["EINVAL", 0, NEWNET]}, "user namespaces", id="net namespace"),
        pytest.param({"mount": "EPERM"}, "mount namespace", id="mount"),
        pytest.param({"mount_setattr": "ENOSYS"}, "mount namespace", id="recursive read-only"),
        pytest.param({"pivot_root": "EPERM"}, "mount namespace", id="pivot_root"),
        pytest.param({"setresuid": "EPERM"}, "unprivileged user", id="own user", marks=needs_root),
        pytest.param({"sethostname": "EPERM"}, "user namespaces", id="host name"),
        pytest.param({"ioctl": ["EPERM", 1, 0x8914]}, "network namespace", id="loopback"),
        pytest.param({"prlimit64": "EPERM"}, "resource limits", id="resource limits"),
        pytest.param({"capset": "EPERM"}, "capabilities", id="capabilities"),
        pytest.param(
            {"prctl": ["EINVAL", 0, 1 << 30]}, "", id="control: a filter that refuses nothing"
        ),
        pytest.param({"chroot": "EPERM"}, "a root directory for each call", id="own root"),
        pytest.param({"landlock_create_ruleset": "ENOSYS"}, "Landlock", id="landlock absent"),
        pytest.param({"landlock_add_rule": "EINVAL"}, "Landlock", id="landlock rules"),
        pytest.param({"landlock_restrict_self": "EPERM"}, "Landlock", id="landlock refused"),
        pytest.param({"seccomp": "ENOSYS"}, "seccomp", id="seccomp"),
    ],
)
def test_layer_that_is_refused_stops_the_start_by_name(
    refused: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    done = around({"refuse": refused}, tmp_path)
    if not layer:
        assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
        return
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "the import ran" not in done.stderr
    rows = [line for line in done.stderr.splitlines() if line.startswith(("error", "cause", "tip"))]
    assert rows[0].startswith(f"error: This machine cannot enforce: {layer} (step ")
    assert rows[1].startswith("cause: ")
    assert rows[2].startswith("tip: ")


@pytest.mark.parametrize(
    ("refused", "layer"),
    [
        ({"landlock_create_ruleset": "EOPNOTSUPP"}, "landlock"),
        ({"seccomp": "ENOSYS"}, "seccomp"),
    ],
)
def test_layer_that_is_waived_by_name_is_done_without_and_that_is_said(
    refused: dict[str, Any], layer: str, tmp_path: Path
) -> None:
    done = around({"refuse": refused}, tmp_path)
    assert f"--waive {layer}" in done.stderr
    done = around({"refuse": refused}, tmp_path, "--waive", layer)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert f"waived {layer}: " in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="for an ordinary user they are not required")
def test_root_with_read_only_control_groups_is_told_and_may_waive_them(tmp_path: Path) -> None:
    lacking = {"read_only_cgroups": True}
    done = around(lacking, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "error: This machine cannot enforce: control groups (step cgroup)." in done.stderr
    assert "--waive cgroup" in done.stderr
    assert "the import ran" not in done.stderr
    done = around(lacking, tmp_path, "--waive", "cgroup")
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    assert "waived cgroup: memory of calls is sampled" in done.stderr


def test_machine_without_namespaces_is_told_of_the_level_for_containers(tmp_path: Path) -> None:
    done = around({"ordinary_container": True}, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "namespace" in done.stderr.partition("error: ")[2].splitlines()[0]
    assert "--isolation container" in done.stderr
    assert "the import ran" not in done.stderr


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--waive", "everything"], "'everything' cannot be waived; what can: cgroup, landlock"),
        (
            ["--isolation", "container", "--waive", "landlock"],
            "landlock cannot be waived at isolation container",
        ),
        (["--isolation", "loose"], "'loose' is not one of"),
    ],
)
def test_what_cannot_be_asked_for_is_an_error_of_use(
    options: list[str], sentence: str, tmp_path: Path
) -> None:
    done = around({}, tmp_path, *options)
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], "Isolation strict: namespaces, "),
        (["--waive", "seccomp"], "waived seccomp: every system call"),
        (["--isolation", "none"], "isolation NONE: "),
    ],
)
def test_inspect_shows_what_confines_a_toolkit(
    options: list[str], told: str, tmp_path: Path
) -> None:
    done = around({}, tmp_path, *options, command="inspect")
    assert done.returncode == 0, done.stderr
    assert told in done.stdout
    found = json.loads(around({}, tmp_path, *options, "--json", command="inspect").stdout)
    assert found["isolation"]["level"] == ("none" if "none" in options else "strict")
    assert found["isolation"]["waived"] == (["seccomp"] if "seccomp" in options else [])
