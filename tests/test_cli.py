"""The command line: results on standard output alone, errors in three lines, exit codes 0, 1, 2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import toolkit_text, write_tree

ROOT = Path(__file__).resolve().parents[1]

KIT = """
    import sys

    @tool
    def echo(**kw):
        return kw

    @client.register_tool(
        function_name="contacts", params=["limit"], required_params=["limit"],
        description="Lists contacts.\\nAt length.", auth_provider="hubspot", auth_type="OAuth2",
        auth_with="access_token",
    )
    def contacts(**kw):
        return kw

    @tool
    def chatty(**_):
        print("\\x1b[31mto standard output")
        print("to standard error", file=sys.stderr)
        return "said"

    @tool
    def fail(**_):
        raise ValueError("no such city")

    print("printed by the import")
"""


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "kit.py"
    path.write_text(toolkit_text(KIT))
    return path


def run(
    *arguments: object, cwd: Path | None = None, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """`python -m atp_sandbox` as an operator runs it."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ATP_")}
    done = subprocess.run(
        [sys.executable, "-m", "atp_sandbox", *map(str, arguments)],
        env={**ours, "PYTHONPATH": str(ROOT), **environment},
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    # Said on each machine where it is so; no part of what is tested here.
    done.stderr = re.sub(r"(?m)^[0-9:]{8} warning no control group.*\n", "", done.stderr)
    return done


def assert_refused(
    done: subprocess.CompletedProcess[str], status: int, *said: str
) -> dict[str, str]:
    """It ended with `status` and nothing but error, cause and tip; returns these."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    rows = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    labels = [row.split(": ")[0] for row in rows]
    assert labels[0] == "error"
    assert labels[1:] in ([], ["cause"], ["tip"], ["cause", "tip"])
    for part in said:
        assert part in done.stderr
    return {row.split(": ")[0]: row.split(": ", 1)[1] for row in rows}


# -- help and usage --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), ("serve toolkit.py --embedded", "inspect", "call", "backend", "doctor")),
        (("serve",), ("--embedded", "never from", "drains", "call|calls:N|jail")),
        (("call",), ("NAME:=JSON", "--auth-token-env", "exit")),
        (("inspect",), ("--json", "nothing is registered")),
        (("backend",), ("--port", "--allow-remote", "loopback")),
    ],
)
def test_help_explains_each_command_with_an_example(
    arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    done = run(*arguments, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    assert done.stdout.startswith("Usage: atp-sandbox")
    assert "atp-sandbox " in done.stdout.partition("\n")[2]
    for part in said:
        assert part in done.stdout
    short = run(*arguments, "-h")
    assert (short.returncode, short.stdout) == (0, done.stdout)


def test_help_shows_the_default_of_every_limit() -> None:
    shown = " ".join(run("serve", "--help").stdout.split())
    for default in ("[30 s]", "[256 MiB]", "[1 MiB]", "[4]", "[256]", "[call]", "[0.2]"):
        assert default in shown


def test_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("atp-sandbox, version ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("srve",), ("there is no command 'srve'", "did you mean 'serve'?")),
        (("call",), ("Missing argument 'TOOLKIT'", "see atp-sandbox call --help")),
        (("serve", "a.py", "--api-key", "k"), ("No such option '--api-key'", "--api-key-file")),
        (("serve", "a.py", "--memory", "12Q"), ("'12Q' is no size",)),
        (("serve", "a.py", "--time", "soon"), ("'soon' is no duration",)),
        (("serve", "a.py", "--time", "0"), ("must be more than 0",)),
        (("serve", "a.py", "--lifetime", "calls:0"), ("'calls:0' is no lifetime",)),
        (("serve", "a.py", "--env", "1X=2"), ("is no name of an environment variable",)),
        (("serve", "a.py", "--env", "ATP_API_KEY=k"), ("ATP_API_KEY is reserved",)),
        (("serve", "a.py", "--env", "NOT_SET_HERE"), ("NOT_SET_HERE is not set here",)),
        (
            ("serve", "a.py", "b.py", "--env", "A=1"),
            ("--env, --data and --allow are for one toolkit",),
        ),
        (
            ("serve", "a.py", "--embedded", "--base-url", "http://x"),
            ("--embedded and --base-url exclude each other",),
        ),
        (
            ("serve", "a.py", "--as-written", "--api-key-file", "k"),
            ("--as-written and --api-key-file exclude each other",),
        ),
        (("serve", "--config", "no.toml"), ("no.toml",)),
        (("serve", "a.py", "--config", "no.toml"), ("TOOLKIT cannot be given together",)),
        (("call", "a.py", "t", "--params", "[1]"), ("--params must be a JSON object",)),
        (("call", "a.py", "t", "--params", "{"), ("--params is not JSON",)),
        (("call", "a.py", "t", "novalue"), ("'novalue' is no parameter", "NAME:=JSON")),
        (("call", "a.py", "t", "=x"), ("is no parameter",)),
        (("call", "a.py", "t", "a:=nope"), ("is not followed by JSON",)),
        (("call", "a.py", "t", "a:=NaN"), ("no NaN",)),
        (("call", "a.py", "t", "--auth-token-env", "NOT_SET"), ("NOT_SET is not set here",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_wrong_usage_ends_with_2_and_says_what_to_do(
    tmp_path: Path, arguments: tuple[str, ...], said: tuple[str, ...]
) -> None:
    assert_refused(run(*arguments, cwd=tmp_path), 2, *said)


def test_serve_without_toolkit_and_without_configuration_is_an_error(tmp_path: Path) -> None:
    shown = assert_refused(run("serve", cwd=tmp_path), 2)
    assert shown == {
        "error": "no toolkit to serve",
        "cause": "none was named, and there is no atp-sandbox.toml here",
        "tip": "atp-sandbox serve toolkit.py --embedded",
    }


def test_serve_without_backend_names_where_the_toolkit_would_connect(
    kit: Path, tmp_path: Path
) -> None:
    done = run("serve", kit, "--state-dir", tmp_path / "state")
    assert done.returncode == 2
    assert "error: The backend is not known" in done.stderr
    assert "https://chatatp-backend.onrender.com (toolkit kit, app tests)" in done.stderr
    assert "--embedded" in done.stderr
    assert "key-in-the-toolkit" not in done.stderr


@pytest.mark.parametrize("where", ["/", "/tmp", "/etc", "/proc/self", "home"])
def test_whole_machine_is_no_toolkit(where: str) -> None:
    path = str(Path.home()) if where == "home" else where
    assert_refused(run("call", path, "x"), 1)


def test_missing_toolkit_and_folder_without_entry_are_named(tmp_path: Path) -> None:
    shown = assert_refused(run("inspect", tmp_path / "no.py"), 1)
    assert "no.py cannot be found" in shown["error"]
    folder = write_tree(tmp_path / "kit", {"other.py": ""})
    done = run("inspect", folder)
    assert_refused(done, 1, "__main__.py", "toolkit.py", "main.py")


def test_import_that_fails_shows_the_end_of_its_traceback(tmp_path: Path) -> None:
    path = tmp_path / "kit.py"
    path.write_text("\n\nraise RuntimeError('no \\x1b[31m licence')\n")
    done = run("inspect", path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: Toolkit kit could not be imported: it raised RuntimeError." in done.stderr
    assert 'File "/toolkit/kit.py", line 3' in done.stderr
    assert "no \\x1b[31m licence" in done.stderr


# -- call ------------------------------------------------------------------------------------------


def call(kit: Path, *arguments: object, **environment: str) -> tuple[int, Any, str]:
    """Exit code, the one JSON value on standard output, standard error."""
    done = run("call", kit, *arguments, **environment)
    assert done.stdout.count("\n") == 1, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_call_prints_the_result_as_json_and_nothing_else(kit: Path) -> None:
    status, result, printed = call(
        kit, "echo", "name=Ada=1", "n:=1.5", "deep:={\"a\": [null]}", "empty=", "--params",
        '{"name": "replaced", "kept": true}',
    )  # fmt: skip
    assert (status, printed) == (0, "")
    assert result == {"name": "Ada=1", "n": 1.5, "deep": {"a": [None]}, "empty": "", "kept": True}


def test_call_of_a_failing_tool_ends_with_1_and_the_answer_of_the_wire(kit: Path) -> None:
    status, result, _ = call(kit, "fail")
    assert status == 1
    assert result == {"error": "no such city", "error_type": "tool_error", "retryable": False}
    status, result, _ = call(kit, "contacts", "--params", "{}")
    assert (status, result["error_type"], result["missing"]) == (1, "invalid_params", ["limit"])
    status, result, _ = call(kit, "ecko")
    assert (status, result["error"]) == (1, "Unknown tool: ecko. Did you mean echo?")


def test_what_a_called_tool_prints_goes_to_standard_error_made_harmless(kit: Path) -> None:
    status, result, printed = call(kit, "chatty")
    assert (status, result) == (0, "said")
    assert printed == "\\x1b[31mto standard output\nto standard error\n"


def test_token_of_a_call_comes_from_the_environment(kit: Path) -> None:
    status, result, printed = call(
        kit, "contacts", "limit:=1", "--auth-token-env", "TOKEN", TOKEN="tok-123"
    )
    assert (status, printed) == (0, "")
    assert result == {"limit": 1, "auth_token": "tok-123"}
    status, result, _ = call(kit, "contacts", "limit:=1")
    assert (status, result["error_type"]) == (1, "auth_required")


def test_call_keeps_the_limits_that_were_given(kit: Path, tmp_path: Path) -> None:
    path = tmp_path / "kit.py"
    path.write_text(toolkit_text("@tool\ndef hang(**_):\n    while True:\n        pass\n"))
    status, result, _ = call(path, "hang", "--time", "500ms")
    assert (status, result["error_type"]) == (1, "timeout")
    assert result["limit"] == {"name": "time", "value": 0.5, "unit": "s"}


def test_environment_and_data_reach_the_toolkit(tmp_path: Path) -> None:
    path = write_tree(
        tmp_path,
        {
            "kit.py": toolkit_text(
                "import os\nREAD = open('rates.csv').read()\n"
                "@tool\ndef look(**_):\n    return [READ, os.environ['A'], os.environ['B']]\n"
            ),
            "rates.csv": "1.5",
        },
    )
    status, result, _ = call(
        path / "kit.py", "look", "--env", "A=x=y", "--env", "B", "--data", path / "rates.csv",
        B="ours",
    )  # fmt: skip
    assert (status, result) == (0, ["1.5", "x=y", "ours"])


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect_gives_one_json_object_without_any_key(kit: Path) -> None:
    done = run("inspect", kit, "--json", "--memory", "1G", "--lifetime", "calls:7")
    assert (done.returncode, done.stderr) == (0, "")
    assert "key-in-the-toolkit" not in done.stdout
    found = json.loads(done.stdout)
    assert found["toolkit"] == "kit"
    assert (found["ended"], found["lifetime"]) == ("start", "calls:7")
    assert found["limits"]["memory_bytes"] == 1024**3
    assert found["clients"] == [
        {
            "app_name": "tests",
            "base_url": "https://chatatp-backend.onrender.com",
            "started": True,
        }
    ]
    assert [tool["name"] for tool in found["tools"]] == [
        *("probe", "echo", "contacts", "chatty", "fail")
    ]
    contacts = found["tools"][2]
    assert {
        name: contacts[name] for name in ("params", "required", "auth_with", "needs_token")
    } == {
        "params": ["limit"],
        "required": ["limit"],
        "auth_with": "access_token",
        "needs_token": True,
    }
    assert any("share its memory" in s or "share" in s for s in found["separates"])


def test_inspect_tells_a_person_the_tools_and_what_separates_calls(kit: Path) -> None:
    done = run("inspect", kit)
    assert (done.returncode, done.stderr) == (0, "")
    assert "contacts(limit)" in done.stdout
    assert "echo([value])" in done.stdout
    assert "needs a token hubspot OAuth2" in done.stdout
    assert "not against a toolkit whose imported code is malicious" in done.stdout
    assert "key-in-the-toolkit" not in done.stdout


def test_inspect_makes_the_toolkits_text_harmless(tmp_path: Path) -> None:
    path = tmp_path / "kit.py"
    path.write_text(
        "from atp_sdk import ToolKitClient\n"
        "c = ToolKitClient('k', 'app\\x1b[2J', 'http://x/\\x07')\n"
        "@c.register_tool('t\\x1b]0;x\\x07', ['p\\u202e'], [], 'd\\x9b', None, None, None)\n"
        "def t(**_): pass\n"
    )
    done = run("inspect", path)
    assert done.returncode == 0
    assert not [c for c in done.stdout if ord(c) < 32 and c != "\n"]
    assert not {"\x9b", "\u202e"} & set(done.stdout)
    assert "t\\x1b]0;x\\x07" in done.stdout


def test_other_systems_are_told_that_only_linux_will_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from atp_sandbox.__main__ import main

    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SystemExit) as leaving:
        main()
    assert leaving.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: atp-sandbox runs on Linux only\ncause: this is darwin")
    assert "\ntip: " in shown
