"""The documentation's examples, served as they stand."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
TOKEN = "a-token-of-a-person"


def call(example: str, *arguments: str) -> tuple[int, Any]:
    """Exit code and answer of `atp-sandbox call`, with a token in the environment."""
    command = [sys.executable, "-m", "atp_sandbox", "call", str(EXAMPLES / example), *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=EXAMPLES.parent,
        env={**os.environ, "TOKEN": TOKEN},
        check=False,
    )
    assert TOKEN not in done.stderr
    return done.returncode, json.loads(done.stdout)


def test_quick_start_greets() -> None:
    assert call("quickstart.py", "hello_world", "name=Ada") == (0, {"message": "Hello, Ada!"})


def test_echo_gives_back_what_it_got() -> None:
    assert call("echo.py", "echo", "text=hi") == (0, {"echo": "hi"})


def test_token_arrives_whole_at_the_tool_that_declares_authentication() -> None:
    code, answer = call("hubspot.py", "whose_token", "--auth-token-env", "TOKEN")
    assert (code, answer) == (0, {"sha256": hashlib.sha256(TOKEN.encode()).hexdigest()})


@pytest.mark.parametrize(
    "arguments",
    [("get_contacts",), ("create_company", "name=Acme", "domain=acme.com", "industry=Tech")],
)
def test_hubspot_is_out_of_reach_and_says_so_as_the_tools_own_error(
    arguments: tuple[str, ...],
) -> None:
    code, answer = call("hubspot.py", *arguments, "--auth-token-env", "TOKEN")
    assert code == 1
    assert answer["error_type"] == "tool_error"
    assert "blocked by policy: api.hubapi.com:443 is not allowed" in answer["error"]
    reason = "is not allowed for toolkit hubspot"
    assert answer["denied"] == [{"host": "api.hubapi.com", "port": 443, "reason": reason}]


def test_hubspot_without_a_token_is_not_run() -> None:
    code, answer = call("hubspot.py", "get_contacts")
    assert (code, answer["error_type"]) == (1, "auth_required")
