"""`doctor` says what this machine can enforce, and refuses where it cannot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from atp_sandbox import doctor
from atp_sandbox.doctor import Finding, State
from atp_sandbox.errors import IsolationError

ROOT = Path(__file__).parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atp_sandbox", "doctor", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=90, cwd=ROOT, check=False
    )


def test_doctor_starts_a_real_worker_and_finds_its_confinement() -> None:
    done = run("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    states = {row["id"]: row["state"] for row in report["findings"]}
    assert report["would_serve"] is True
    for id_ in ("start", "capabilities", "no_new_privs", "seccomp", "pid", "landlock"):
        assert states[f"jail.{id_}"] == "ok"
    assert states["limits.cgroup"] in ("ok", "warn")


def test_doctor_ends_with_a_count_and_what_serve_would_do() -> None:
    last = run().stdout.strip().splitlines()[-1]
    assert "serve would start" in last
    assert last[0].isdigit()


def test_warning_and_failure_come_with_a_remedy() -> None:
    for finding in doctor.examine():
        assert finding.state in (State.OK, State.SKIP) or finding.remedy


def test_machine_that_refuses_a_layer_would_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def __init__(self, _settings: object) -> None:
            raise IsolationError("seccomp", "No seccomp.", cause="EPERM", tip="Allow it.")

    monkeypatch.setattr(doctor, "SingleToolkit", Refusing)
    findings = doctor.examine()
    assert findings[-1] == Finding(
        "jail.start", "Jail", State.FAIL, "No seccomp. EPERM", "Allow it."
    )
    assert not doctor.would_serve(findings)


def test_worker_that_is_not_confined_is_a_failure() -> None:
    from atp_sandbox.outcome import Success

    status = {"CapEff": "1", "NoNewPrivs": "0", "Seccomp": "0", "Pid": "12345"}
    found = list(doctor._worker(Success(json.dumps(status))))
    assert {finding.state for finding in found} == {State.FAIL}
