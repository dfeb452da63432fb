"""`--isolation container` holds where namespaces are forbidden: `container_level.py`, run there."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
_TESTS = 21
"""How many there are at least; that none is lost."""


@pytest.mark.timeout(300)  # half a minute where nothing else runs
def test_container_level_holds_inside_a_container() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    around = [sys.executable, str(ROOT / "tests" / "around.py"), '{"ordinary_container": true}']
    # Not in pytest's own folder, which every session closes to others anew.
    with tempfile.TemporaryDirectory(prefix="atp-container-") as folder:
        Path(folder).chmod(0o755)
        command += ["-o", "addopts=", f"--basetemp={folder}/inner", "tests/container_level.py"]
        done = subprocess.run(
            [*around, *command], capture_output=True, text=True, timeout=240, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= _TESTS
