"""A protection that cannot be enforced stops the start, named with its cause and its remedy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeMaker, jail_processes, toolkit_text

import atp_sandbox.jails.launch as launch_module
from atp_sandbox.errors import IsolationError
from atp_sandbox.isolation import Isolation, Level
from atp_sandbox.jails.jail import SetupFailure
from atp_sandbox.jails.remedies import REMEDIES, isolation_error

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("key", "value", "step"),
    [
        ("directory", "/no/such/directory", "root"),
        ("root.binds", [{"source": "/no/such/source", "target": "/x"}], "root"),
        ("scratch.bytes", "much", "scratch"),
    ],
)
def test_refused_step_stops_the_start_and_names_layer_cause_and_tip(
    make_node: NodeMaker, monkeypatch: pytest.MonkeyPatch, key: str, value: Any, step: str
) -> None:
    build = launch_module.jail_plan

    def altered(*args: Any, **named: Any) -> dict[str, Any]:
        plan = build(*args, **named)
        *tables, last = key.split(".")
        table: Any = plan
        for name in tables:
            table = table[name]
        table[last] = value
        return plan

    monkeypatch.setattr(launch_module, "jail_plan", altered)
    node = make_node(toolkit_text())
    assert isinstance(node.error, IsolationError)
    assert node.error.layer == REMEDIES[step].layer
    shown = node.error.render().splitlines()
    assert shown[0] == f"error: This machine cannot enforce: {node.error.layer} (step {step})."
    assert shown[1].startswith("cause: ")
    assert "mount " in shown[1]
    assert shown[-1].startswith("tip: ")
    node.until(lambda: not jail_processes(), "no process and no zombie left", 5.0)


def test_every_step_that_the_jail_names_has_a_remedy() -> None:
    sources = (ROOT / "workers" / "warden.py", ROOT / "workers" / "confinement" / "layers.py")
    text = "".join(path.read_text() for path in sources)
    steps = set(re.findall(r'(?:_step|Refused)\(\s*"(\w+)"', text))
    assert len(steps) > 10
    for step in steps:
        for level in Level:
            error = isolation_error(SetupFailure(step, "why"), Isolation(level))
            assert error.layer
            assert error.tip


def test_machine_without_user_namespaces_is_told_how_to_allow_them(tmp_path: Path) -> None:
    """In a user namespace that allows no further ones, as a hardened machine does."""
    kit = tmp_path / "kit.py"
    kit.write_text(toolkit_text())
    script = (
        "import ctypes, os, sys\n"
        "libc = ctypes.CDLL(None)\n"
        "uid, gid = os.getuid(), os.getgid()\n"
        "assert libc.unshare(0x10000000) == 0\n"
        "open('/proc/self/setgroups', 'w').write('deny')\n"
        "open('/proc/self/uid_map', 'w').write(f'1234 {uid} 1')\n"
        "open('/proc/self/gid_map', 'w').write(f'1234 {gid} 1')\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'atp_sandbox', *sys.argv[1:]])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "call", str(kit), "probe"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "error: This machine cannot enforce: user namespaces (step namespaces)." in done.stderr
    assert "tip: Allow user namespaces to ordinary users" in done.stderr
