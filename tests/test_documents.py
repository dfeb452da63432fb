"""The documents tell the truth: what they name exists, and their commands are the ones we run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "SECURITY.md", "ARCHITECTURE.md")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_every_test_that_security_md_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", text_of("SECURITY.md")))
    sources = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/*.py"))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in sources} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_that_a_document_names_exists(document: str) -> None:
    named = re.findall(r"`((?:atp_sandbox|workers|examples|tests)/[\w./]*\w)`", text_of(document))
    assert {path for path in named if not (ROOT / path).exists()} == set()


def test_readme_names_every_command_and_every_kind_of_answer() -> None:
    from atp_sandbox.cli import cli
    from atp_sandbox.outcome import Kind

    readme = text_of("README.md")
    assert {name for name in cli.list_commands(None) if name not in readme} == set()  # type: ignore[arg-type]
    assert {kind for kind in Kind if f"`{kind.value}`" not in readme} == set()


def test_readme_tells_the_default_limits() -> None:
    from atp_sandbox.limits import Limits, format_duration, format_size

    limits, readme = Limits(), text_of("README.md")
    for shown in (
        f"| time of a call | {format_duration(limits.time_s)} |",
        f"| memory a call may add | {format_size(limits.memory_bytes)} |",
        f"| result, as JSON | {format_size(limits.output_bytes)} |",
        f"| calls at once, per toolkit | {limits.concurrency} |",
        f"| calls that wait, per toolkit | {limits.queue} |",
    ):
        assert shown in readme


@pytest.mark.parametrize("heading", ["serve", "test"])
def test_readme_has_the_command_that_the_gate_runs(heading: str) -> None:
    marked = rf"<!-- command: {heading} -->\n```sh\n(.*?)\n```"
    found = re.search(marked, text_of("README.md"), re.S)
    assert found is not None
    assert "\n" not in found[1]
    assert f"readme_command {heading}" in text_of(".ci/run")


def test_readme_use_section_runs_as_written(tmp_path: Path) -> None:
    """`inspect` and `call` of the examples, as a newcomer would type them."""
    toolkit = ROOT / "examples" / "quickstart.py"
    for arguments, expected in (
        (["inspect", str(toolkit)], "hello_world(name)"),
        (["call", str(toolkit), "hello_world", "name=Ada"], '{"message": "Hello, Ada!"}'),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "atp_sandbox", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_readme_example_of_the_library_is_valid_python() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", text_of("README.md"), re.S)
    compile(example, "README.md", "exec")
    assert "from atp_sandbox import ToolKitClient" in example


@pytest.mark.parametrize("number", [0, 1])
def test_readme_configuration_is_accepted(number: int, tmp_path: Path) -> None:
    from atp_sandbox.config import load_config

    examples = re.findall(r"```toml\n(.*?)```", text_of("README.md"), re.S)
    assert len(examples) == 2
    path = tmp_path / "atp-sandbox.toml"
    path.write_text(examples[number])
    (tmp_path / "toolkits").mkdir()
    (tmp_path / "toolkits" / "crm.py").write_text("")
    config = load_config(path)
    assert [toolkit.name for toolkit in config.toolkits] == ["crm"]
