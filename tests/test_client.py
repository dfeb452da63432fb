"""The library: a script's own functions, served from a jail, over the embedded backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from atp_sandbox.backend.embedded import EmbeddedBackend

ROOT = Path(__file__).parent.parent
HEAD = """
import json, os, sys, threading, time, urllib.request
from atp_sandbox import ToolKitClient

URL = os.environ.get("TEST_URL", "http://127.0.0.1:1")
STATE = os.environ.get("TEST_STATE")
client = ToolKitClient("a-key", "library", URL, state_dir=STATE)


@client.register_tool("where", ["n"], ["n"], "Where it runs.", None, None, None)
def where(**kwargs):
    return {"n": kwargs["n"], "file": __file__, "name": __name__, "key": os.environ["ATP_API_KEY"],
            "url": "TEST_URL" in os.environ}


def ask():
    body = json.dumps({"params": {"n": 1}}).encode()
    with urllib.request.urlopen(URL + "/tools/where", body, timeout=60) as answer:
        return json.load(answer)["result"]


"""


@pytest.fixture(scope="module")
def backend() -> Iterator[EmbeddedBackend]:
    with EmbeddedBackend() as started:
        yield started


def run(backend: EmbeddedBackend, folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(HEAD + body)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TEST_URL": backend.url,
        "TEST_STATE": str(folder / "state"),
    }
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=90,
        env=environment,
        check=False,
    )


def test_background_start_serves_the_scripts_functions_from_a_jail(
    backend: EmbeddedBackend, tmp_path: Path
) -> None:
    done = run(
        backend,
        tmp_path,
        "client.start_in_background()\nprint(json.dumps(ask()))\nclient.stop()\nprint('stopped')\n",
    )
    assert done.returncode == 0, done.stderr
    answer, stopped = done.stdout.splitlines()
    assert json.loads(answer) == {
        "n": 1,
        "file": "/toolkit/script.py",
        "name": "__main__",
        "key": "sandbox-placeholder",
        "url": False,
    }
    assert stopped == "stopped"
    assert "a-key" not in done.stderr


def test_stop_from_a_thread_makes_start_return(backend: EmbeddedBackend, tmp_path: Path) -> None:
    body = """
def stop_once_served():
    while True:
        try:
            ask()
            break
        except OSError:
            time.sleep(0.05)
    client.stop()

if "TEST_URL" in os.environ:
    threading.Thread(target=stop_once_served).start()
client.start()
print("returned")
"""
    done = run(backend, tmp_path, body)
    assert (done.returncode, done.stdout) == (0, "returned\n"), done.stderr


def test_stop_before_start_is_quiet(backend: EmbeddedBackend, tmp_path: Path) -> None:
    done = run(backend, tmp_path, "client.stop()\nprint('quiet')\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "quiet\n", "")


def test_interactive_session_is_refused_with_what_to_do() -> None:
    code = "from atp_sandbox import ToolKitClient\nToolKitClient('k', 'a').start()\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 1
    assert "needs a script file" in done.stderr
    assert "tip: save the code as a file" in done.stderr


def test_each_client_of_a_script_serves_its_own_tools(
    backend: EmbeddedBackend, tmp_path: Path
) -> None:
    body = """
other = ToolKitClient("other-key", "second", URL, state_dir=STATE)


@other.register_tool("second_tool", [], [], "d", None, None, None)
def second_tool(**kwargs):
    return 2


client.start_in_background()
other.start_in_background()
with urllib.request.urlopen(URL + "/tools", timeout=60) as answer:
    tools = json.load(answer)
tools = tools["tools"] if isinstance(tools, dict) else tools
print(sorted((tool["app"], tool["name"]) for tool in tools if tool["connected"]))
client.stop()
other.stop()
"""
    done = run(backend, tmp_path, body)
    assert done.returncode == 0, done.stderr
    assert "('library', 'where')" in done.stdout
    assert "('second', 'second_tool')" in done.stdout
