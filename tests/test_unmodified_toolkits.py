"""Toolkits written for the published SDK run as they are: layout, imports, start, environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import NodeMaker, ServedNode, toolkit_text, write_tree

from atp_sandbox import routing
from atp_sandbox.jails.host import host_view

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plain(make_module_node: NodeMaker) -> ServedNode:
    """A toolkit of one file that records what its import saw."""
    body = """
        import os, sys, tempfile

        seen = {
            "name": __name__,
            "file": __file__,
            "argv": list(sys.argv),
            "cwd": os.getcwd(),
            "first": sys.path[0],
            "environment": dict(os.environ),
        }
        with tempfile.NamedTemporaryFile(mode="w") as scratch:
            scratch.write("the import may write scratch files")


        @tool
        def at_import(**_):
            return seen
    """
    return make_module_node(toolkit_text(body), env={"REGION": "eu"})


# -- layout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["__main__.py", "toolkit.py", "main.py"])
def test_folder_runs_from_each_entry_name(make_node: NodeMaker, tmp_path: Path, entry: str) -> None:
    folder = write_tree(tmp_path / "kit", {"words.py": "GREETING = 'hello'\n"})
    text = "import words\n" + toolkit_text("@tool\ndef greet(**_):\n    return words.GREETING\n")
    (folder / entry).write_text(text)
    assert make_node(folder).call("greet").value == "hello"


def test_package_runs_with_relative_imports_and_bare_neighbours(
    make_node: NodeMaker, tmp_path: Path
) -> None:
    folder = write_tree(
        tmp_path / "weather",
        {
            "__init__.py": "UNIT = 'celsius'\n",
            "sub/__init__.py": "",
            "sub/deep.py": "from .. import UNIT\n",
            "near.py": "PLACE = 'here'\n",
        },
    )
    imports = "from . import UNIT\nfrom .sub.deep import UNIT as DEEP\nimport near\n"
    body = "@tool\ndef all_of(**_):\n    return [UNIT, DEEP, near.PLACE, __package__, __name__]\n"
    (folder / "toolkit.py").write_text(imports + toolkit_text(body))
    value = make_node(folder).call("all_of").value
    assert value == ["celsius", "celsius", "here", "weather", "__main__"]


def test_toolkit_directory_is_a_read_only_snapshot(make_node: NodeMaker, tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "kit", {"main.py": toolkit_text(), "rate.txt": "1.5"})
    node = make_node(folder)
    (folder / "rate.txt").write_text("99")
    (folder / "late.txt").write_text("too late")

    def look() -> list[object]:
        import os

        refused = []
        for action in (
            lambda: os.open("/toolkit/new.txt", os.O_WRONLY | os.O_CREAT),
            lambda: os.open("/toolkit/rate.txt", os.O_WRONLY),
            lambda: os.unlink("/toolkit/rate.txt"),
            lambda: os.chmod("/toolkit/rate.txt", 0o777),
        ):
            try:
                action()
            except OSError as error:
                refused.append(error.errno)
        return [sorted(os.listdir("/toolkit")), open("/toolkit/rate.txt").read(), refused]

    names, rate, refused = node.inside(look)
    assert (names, rate) == (["main.py", "rate.txt"], "1.5")
    assert len(refused) == 4


def test_data_lies_beside_a_single_file(make_node: NodeMaker, tmp_path: Path) -> None:
    data = write_tree(tmp_path / "data", {"cities.csv": "Berlin\n", "more/a.txt": "a"})
    body = "CITIES = open('cities.csv').read() + open('more/a.txt').read()\n"
    body += "@tool\ndef cities(**_):\n    return CITIES\n"
    node = make_node(toolkit_text(body), data=[data / "cities.csv", data / "more"])
    assert node.call("cities").value == "Berlin\na"


# -- surroundings ----------------------------------------------------------------------------------


def test_script_runs_as_main_in_its_own_directory(plain: ServedNode) -> None:
    seen = plain.call("at_import").value
    assert seen["name"] == "__main__"
    assert seen["file"] == "/toolkit/kit.py"
    assert seen["argv"] == ["/toolkit/kit.py"]
    assert (seen["cwd"], seen["first"]) == ("/toolkit", "/toolkit")


def test_environment_is_what_the_operator_gave_and_a_placeholder_key(plain: ServedNode) -> None:
    environment = plain.call("at_import").value["environment"]
    assert environment["ATP_API_KEY"] == "sandbox-placeholder"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["REGION"] == "eu"


def test_home_and_tmpdir_are_writable_scratch_in_a_call(plain: ServedNode) -> None:
    def write() -> list[str]:
        import os
        import tempfile
        from pathlib import Path

        Path.home().joinpath("in-home").write_text("x")
        with tempfile.NamedTemporaryFile() as file:
            return [os.path.dirname(file.name), os.environ["TMPDIR"], os.environ["HOME"]]

    where, tmpdir, home = plain.inside(write)
    assert where == tmpdir == home
    assert home.startswith("/scratch/")


def test_installed_packages_certificates_and_time_zones_are_there(plain: ServedNode) -> None:
    def use() -> list[object]:
        import datetime
        import os
        import ssl
        import zoneinfo

        import requests

        paths = ssl.get_default_verify_paths()
        wanted = (paths.cafile, paths.capath, requests.certs.where())
        bundles = [path for path in wanted if path and os.path.exists(path)]
        noon = datetime.datetime(2026, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
        return [requests.__name__, len(bundles) > 0, noon.utcoffset().total_seconds()]

    assert plain.inside(use) == ["requests", True, 7200.0]


def test_toolkits_own_modules_win_over_names_of_ours(make_node: NodeMaker, tmp_path: Path) -> None:
    names = ("workers", "frames", "msgpack", "stdio", "warden", "discovery")
    folder = write_tree(tmp_path / "kit", {f"{name}.py": "MINE = True\n" for name in names})
    imports = "".join(f"import {name}\n" for name in names)
    body = f"@tool\ndef mine(**_):\n    return [m.MINE for m in ({', '.join(names)})]\n"
    (folder / "main.py").write_text(imports + toolkit_text(body))
    node = make_node(folder)
    assert node.call("mine").value == [True] * len(names)
    node.assert_healthy()


def test_our_sdk_wins_over_one_in_the_toolkit_folder(make_node: NodeMaker, tmp_path: Path) -> None:
    folder = write_tree(
        tmp_path / "kit",
        {"atp_sdk/__init__.py": "raise SystemExit('the wrong one')\n", "main.py": toolkit_text()},
    )
    make_node(folder).assert_healthy()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a toolkit finds where we are installed in site-packages, beside trouble."""
    place = tmp_path_factory.mktemp("installed")
    site = place / "site-packages"
    for package in ("atp_sandbox", "workers"):
        shutil.copytree(ROOT / package, site / package, ignore=shutil.ignore_patterns("*.pyc"))
    write_tree(
        site,
        {
            "trouble.pth": "import builtins; builtins.pth_was_run = True\n",
            "atp_sdk/__init__.py": "raise RuntimeError('the published one')\n",
            "neighbour.py": "HERE = True\n",
            "atp_sandbox-9.dist-info/METADATA": "Name: atp-sandbox\nVersion: 9\n",
            "atp_sandbox-9.dist-info/RECORD": "atp_sandbox/supervisor.py,,\n",
        },
    )
    body = """
        import builtins, importlib, os, sys
        import atp_sandbox, neighbour

        def unimportable(name):
            try:
                importlib.import_module(name)
            except ImportError:
                return True

        @tool
        def look(**_):
            listed = []
            for top in {*sys.path, "/toolkit", "/work", "/usr", "/opt", "/home", "/root"}:
                for where, _folders, files in os.walk(top):
                    listed += [os.path.join(where, name) for name in files]
            ours = ("supervisor.py", "zygote.py", "warden.py", "link_unit.py", "boot.py")
            return {
                "pth": hasattr(builtins, "pth_was_run"),
                "neighbour": neighbour.HERE,
                "public": sorted(n for n in vars(atp_sandbox) if not n.startswith("__")),
                "same": atp_sandbox.ToolKitClient is type(client),
                "hidden": unimportable("atp_sandbox.supervisor") and unimportable("workers.zygote"),
                "files": [p for p in listed if os.path.basename(p) in ours],
                "metadata": [p for p in listed if "atp_sandbox-" in p],
                "searched": any(p.endswith("/site-packages/neighbour.py") for p in listed),
            }
    """
    kit = place / "kit.py"
    kit.write_text(toolkit_text(body))
    command = [sys.executable, "-m", "atp_sandbox", "call", str(kit), "look"]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, env=environment, cwd=place, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_pth_files_of_installed_packages_are_not_run(installed: dict[str, Any]) -> None:
    assert installed["neighbour"] is True
    assert installed["pth"] is False


def test_toolkit_sees_of_us_only_the_drop_in_client(installed: dict[str, Any]) -> None:
    assert installed["public"] == ["ToolKitClient"]
    assert installed["same"]
    assert installed["hidden"]
    assert installed["searched"]
    assert installed["files"] == []
    assert installed["metadata"] == []


def test_installed_sdk_in_site_packages_is_not_used(installed: dict[str, Any]) -> None:
    assert installed["neighbour"] is True  # from the same directory; the SDK there would raise


def test_host_view_names_no_directory_of_the_checkout() -> None:
    assert not [p for p in host_view().read_only if str(ROOT).startswith(p.rstrip("/") + "/")]


# -- the SDK's surface -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "from atp_sdk.atp_sdk.clients import ToolKitClient",
        "from atp_sdk.clients import ToolKitClient",
        "from atp_sdk import ToolKitClient",
        "from atp_sandbox import ToolKitClient",
    ],
)
def test_each_way_to_import_the_client_works(make_node: NodeMaker, line: str) -> None:
    text = toolkit_text().replace("from atp_sdk.atp_sdk.clients import ToolKitClient", line)
    assert line in text
    make_node(text).assert_healthy()


def test_constructor_and_decorator_take_the_arguments_of_every_sdk_version(
    make_node: NodeMaker,
) -> None:
    node = make_node(
        """\
from atp_sdk.clients import ToolKitClient
a = ToolKitClient("key", "by place", "http://127.0.0.1:1/")
b = ToolKitClient(api_key="key", app_name="later", auto_restart=True, protocol="ws", idle_timeout=9)

@a.register_tool("placed", ["x"], ["x"], "by place", None, None, None)
def placed(x):
    return x

@b.register_tool(function_name="named", params=("x",), required_params=[], description="named",
                 auth_provider="hubspot", auth_type="OAuth2", auth_with="access_token",
                 invented_later=1)
def named(**kwargs):
    return sorted(kwargs)

a.start()
"""
    )
    clients = node.discovery.clients
    assert [(c.app_name, c.base_url) for c in clients] == [
        ("by place", "http://127.0.0.1:1"),
        ("later", "https://chatatp-backend.onrender.com"),
    ]
    placed, named = node.discovery.registrations
    assert (placed.params, placed.required, placed.description) == (("x",), ("x",), "by place")
    assert (named.auth_provider, named.auth_type, named.auth_with) == (
        "hubspot",
        "OAuth2",
        "access_token",
    )
    assert named.source.startswith("@b.register_tool(")
    assert node.call("placed", {"x": [1]}).value == [1]
    assert node.call("named", {"x": 1}, "secret").value == ["auth_token", "x"]


@pytest.mark.parametrize(
    ("signature", "auth_with", "expected"),
    [
        ("**kw", None, {"auth_token"}),
        ("auth_token", None, {"auth_token"}),
        ("*, auth_token=None", None, {"auth_token"}),
        ("access_token", "access_token", {"access_token"}),
        ("auth_token, access_token", "access_token", {"auth_token", "access_token"}),
        ("access_token=None, **kw", "access_token", {"auth_token", "access_token"}),
        ("value=None", "access_token", set()),
    ],
)
def test_token_arrives_under_every_name_the_signature_has_for_it(
    make_node: NodeMaker, signature: str, auth_with: str | None, expected: set[str]
) -> None:
    text = f"""\
from atp_sdk.clients import ToolKitClient
client = ToolKitClient("key", "app")

@client.register_tool("t", ["value"], [], "d", None, None, {auth_with!r})
def t({signature}):
    got = dict(locals())
    got.update(got.pop("kw", {{}}))
    return {{name: value for name, value in got.items() if value is not None}}

client.start()
"""
    value = make_node(text).call("t", {}, "the token").value
    assert value == dict.fromkeys(expected, "the token")


def test_async_tools_are_awaited(make_node: NodeMaker) -> None:
    body = """
        import asyncio, functools

        @tool
        async def slowly(value):
            await asyncio.sleep(0)
            return [value, asyncio.get_running_loop().is_running()]

        @tool
        def hidden(value):
            return slowly(value)
    """
    node = make_node(toolkit_text(body))
    assert node.call("slowly", {"value": 1}).value == [1, True]
    assert node.call("hidden", {"value": 2}).value == [2, True]
    assert node.call("slowly", {"value": 3}).value == [3, True]


def test_last_registration_of_a_name_wins_with_a_warning(make_node: NodeMaker) -> None:
    body = """
        @tool
        def twice(**_):
            return "first"

        @tool
        def twice(**_):
            return "second"
    """
    node = make_node(toolkit_text(body))
    assert node.call("twice").value == "second"
    assert [w.event for w in routing.warnings("kit", node.discovery)] == ["tool_replaced"]
