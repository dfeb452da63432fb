"""The network on the command line: what is granted, what is refused, and what is said of both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from backends import Serving
from conftest import toolkit_text
from test_egress_process import SECRET_BODY, StandIn

ROOT = Path(__file__).resolve().parents[1]
HOST = "api.example.com"
REFUSED = "is not allowed for toolkit kit"
KIT = """
    import requests

    @tool
    def fetch(value, **_):
        answer = requests.get(value, timeout=5)
        answer.raise_for_status()
        return answer.text

    @tool
    def look_up(value, **_):
        import socket
        return socket.getaddrinfo(value, 443)[0][4][0]
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("egress-cli") / "kit.py"
    path.write_text(toolkit_text(KIT))
    return path


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    server = StandIn()
    yield server
    server.close()


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m atp_sandbox` as an operator runs it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ATP_")}
    return subprocess.run(
        [sys.executable, "-m", "atp_sandbox", *map(str, arguments)],
        env={**ours, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def granted(stand_in: StandIn) -> list[str]:
    return [
        *("--allow", f"{HOST}:8080"),
        *("--private-ok", HOST),
        *("--reroute", f"{HOST}:8080=127.0.0.1:{stand_in.port}"),
    ]


def test_what_is_allowed_on_the_command_line_is_reached(kit: Path, stand_in: StandIn) -> None:
    done = run("call", kit, "fetch", f"value=http://{HOST}:8080/", *granted(stand_in))
    assert (done.returncode, json.loads(done.stdout)) == (0, SECRET_BODY.decode())


def test_nothing_is_reached_by_default_and_the_answer_says_so(kit: Path) -> None:
    done = run("call", kit, "fetch", f"value=https://{HOST}/")
    answer = json.loads(done.stdout)
    assert done.returncode == 1
    assert f"403 blocked by policy: {HOST}:443 {REFUSED}" in answer["error"]
    assert answer["denied"] == [{"host": HOST, "port": 443, "reason": REFUSED}]


def test_learning_refuses_as_ever_and_says_what_would_allow_it(kit: Path) -> None:
    done = run("call", kit, "fetch", f"value=https://{HOST}:8443/", "--learn-egress")
    assert json.loads(done.stdout)["denied"][0]["host"] == HOST
    assert f"To allow what was refused: --allow {HOST}:8443\n" in done.stderr
    done = run("call", kit, "look_up", "value=db.example.org", "--learn-egress")
    assert "To allow what was refused: --allow db.example.org:443\n" in done.stderr


def test_what_was_learned_allows_it(kit: Path, stand_in: StandIn) -> None:
    """Step by step, as a person would take them."""
    reroute = ["--reroute", f"{HOST}:8080=127.0.0.1:{stand_in.port}"]
    call = ["call", kit, "fetch", f"value=http://{HOST}:8080/", "--learn-egress", *reroute]
    options: list[str] = []
    for _ in range(3):
        done = run(*call, *options)
        if done.returncode == 0:
            break
        found = re.search(r"To allow what was refused: (.*)", done.stderr)
        assert found, done.stderr
        options += found[1].split()
    assert options == ["--allow", f"{HOST}:8080", "--private-ok", HOST]
    assert json.loads(done.stdout) == SECRET_BODY.decode()


def test_serve_prints_what_it_learned_as_a_table_of_the_configuration(
    kit: Path, tmp_path: Path
) -> None:
    with Serving(kit, "--embedded", "--learn-egress", state_dir=tmp_path / "state") as serve:
        url = serve.wait_for(r"curl (http://127\.0\.0\.1:\d+)/tools\n")[1]
        serve.wait_for(r"Stop:   Ctrl-C")
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            body = {"params": {"value": f"https://{HOST}/"}}
            answer = client.post("/tools/fetch", json=body).json()["result"]
        assert answer["denied"] == [{"host": HOST, "port": 443, "reason": REFUSED}]
        serve.wait_for("to allow it:")
        serve.stop()
        serve.wait_for(re.escape(f'[toolkit.kit]\negress = ["{HOST}:443"]'))


def test_inspect_shows_what_may_be_reached(kit: Path, stand_in: StandIn) -> None:
    shown = run("inspect", kit, "--allow", HOST, "--inject", f"hub={HOST}").stdout
    assert "Network   these hosts alone" in shown
    assert f"Egress    {HOST}:443" in shown
    assert f"Egress    the token of hub is filled in for {HOST} alone" in shown
    found: dict[str, Any] = json.loads(run("inspect", kit, "--json", *granted(stand_in)).stdout)
    limits = "at most 64 connections at once, 128 MiB on each, idle for 60 s"
    assert found["egress"] == [f"{HOST}:8080, may be private", limits]
    assert json.loads(run("inspect", kit, "--json").stdout)["egress"] == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--allow", "https://x.example"], "without a scheme"),
        (["--allow", "*"], "a pattern is"),
        (["--allow", "10.0.0.1:80"], "is an address"),
        (["--private-ok", "x.example"], "not among the allowed hosts"),
        (["--inject", "hub"], "no PROVIDER=HOST"),
        (["--inject", "hub=x.example"], "not an allowed host"),
        (["--reroute", "x.example"], "no HOST[:PORT]=ADDRESS"),
        (["--reroute", "x.example=y.example"], "write ADDRESS[:PORT]"),
        (["--allow", "x.example", "--isolation", "none"], "egress needs isolation strict"),
    ],
)
def test_a_wrong_grant_ends_with_2_and_says_what_is_wrong(
    kit: Path, options: list[str], complaint: str
) -> None:
    done = run("call", kit, "fetch", "value=x", *options)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


def test_a_configuration_excludes_grants_on_the_command_line(tmp_path: Path, kit: Path) -> None:
    config = tmp_path / "atp-sandbox.toml"
    config.write_text(f'[toolkit.kit]\npath = "{kit}"\n')
    done = run("serve", "--config", config, "--allow", HOST)
    assert done.returncode == 2
    assert "--allow cannot be given together with a configuration" in done.stderr
