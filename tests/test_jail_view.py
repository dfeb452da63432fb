"""What a tool finds when it looks around in its jail: its own, and nothing of the machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from conftest import NodeMaker, ServedNode, toolkit_text

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def node(make_module_node: NodeMaker) -> ServedNode:
    return make_module_node(toolkit_text(), env={"REGION": "eu"})


def test_tool_sees_only_its_own_process(node: ServedNode) -> None:
    def look() -> list[object]:
        import os

        return [[int(n) for n in os.listdir("/proc") if n.isdigit()], os.getpid()]

    others = [node.begin_inside(look) for _ in range(4)]
    node.finish(*others)
    for ticket in others:
        seen, own = ticket.value
        assert set(seen) <= {own}


def test_root_holds_only_what_we_put_there(node: ServedNode) -> None:
    def look() -> dict[str, list[str]]:
        import os

        found = {}
        for path in ("/", "/etc", "/dev", "/tmp", "/etc/ssl"):
            try:
                found[path] = sorted(os.listdir(path))
            except OSError:
                found[path] = []
        return found

    found = node.inside(look)
    allowed = {"bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "scratch"}
    allowed |= {"tmp", "toolkit", "usr", "opt", "root", "home", "run", "nix", "var"}
    assert set(found["/"]) <= allowed
    assert set(found["/dev"]) <= {
        *("fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero")
    }
    ours = {"group", "hostname", "hosts", "nsswitch.conf", "passwd", "resolv.conf"}
    certificates = {"ca-certificates", "pki", "ssl"}
    tables = {"ld.so.cache", "localtime", "mime.types", "protocols", "services"}
    assert set(found["/etc"]) <= ours | certificates | tables
    assert "private" not in found["/etc/ssl"]
    assert found["/tmp"] == []


def test_files_that_every_program_reads_are_our_own(node: ServedNode) -> None:
    def look() -> list[str]:
        import os
        import pwd
        import socket

        with open("/etc/passwd") as file:
            passwd = file.read()
        return [passwd, pwd.getpwuid(os.getuid()).pw_name, socket.gethostname()]

    passwd, user, host = node.inside(look)
    assert passwd.count("\n") == 1
    assert (user, host) == ("sandbox", "jail")


def test_no_file_of_the_machine_or_of_the_supervisor_has_a_name_inside(
    node: ServedNode, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("not for tools")
    paths = [
        str(secret),
        str(tmp_path.parent),
        str(Path(__file__)),
        str(ROOT / "atp_sandbox" / "supervisor.py"),
        str(ROOT / "workers" / "zygote.py"),
        *("/root/.bashrc", "/root/.ssh", "/root/.profile", "/etc/shadow", "/etc/machine-id"),
        *("/var/log", "/sys", "/run", "/boot", "/mnt", "/srv", "/etc/ssh", "/bin/sh"),
        *("/dev/tty", "/dev/mem", "/dev/kmsg", "/dev/fuse", "/dev/pts", "/proc/1", "/proc/2"),
        *("/proc/kallsyms", "/proc/sys", "/proc/mounts", "/proc/net", "/run/atp-sandbox"),
        *(str(path) for path in Path.home().iterdir() if not path.is_dir()),
    ]

    def look(paths: list[str]) -> list[str]:
        import os

        return [path for path in paths if os.path.lexists(path) and not os.path.islink(path)]

    assert [p for p in paths if os.path.lexists(p)], "the machine has some of them"
    assert node.inside(look, paths) == []


def test_home_directories_of_the_machine_are_empty_but_for_the_interpreter(
    node: ServedNode,
) -> None:
    def look() -> list[str]:
        import os
        import sys

        interpreter = (sys.base_prefix, sys.prefix, *sys.path)
        found = []
        for top in ("/root", "/home", "/opt", "/var", "/run"):
            for where, _, files in os.walk(top):
                if not any(where == p or where.startswith(p + "/") for p in interpreter if p):
                    found += [os.path.join(where, name) for name in files]
        return found

    found = node.inside(look)
    assert [path for path in found if "/lib/" not in path and "/ssl/" not in path] == []


def test_tool_cannot_reach_the_scratch_of_the_import_or_of_another_call(node: ServedNode) -> None:
    def keep() -> None:
        import os
        import time

        with open(os.environ["HOME"] + "/mine", "w") as file:
            file.write("of this call only")
        time.sleep(1)

    def look() -> list[str]:
        import os

        numbers = range(64)
        paths = [f"/scratch/{n}" for n in numbers] + [f"/slots/{n}" for n in numbers]
        paths += [f"/slots/{n}/scratch/1" for n in numbers]
        found = []
        for path in paths:
            if path == os.environ["HOME"]:
                continue
            # Landlock covers the first three; the others are for the name alone.
            for action in (os.listdir, os.mkdir, os.rmdir, os.utime, os.statvfs, os.access):
                try:
                    if action in (os.mkdir, os.rmdir):
                        action(path + "/left")
                        found.append(f"{action.__name__} {path}")
                    elif path == "/scratch/0":
                        continue  # the import's, which every call may read
                    elif action is os.access:
                        found += [f"access {path}"] * os.access(path, os.F_OK)
                    else:
                        action(path)
                        found.append(f"{action.__name__} {path}")
                except OSError:
                    continue
        return found

    other = node.begin_inside(keep)
    assert node.inside(look) == []
    node.finish(other)


def test_environment_is_exactly_what_was_built(node: ServedNode) -> None:
    def look() -> dict[str, str]:
        import os

        return dict(os.environ)

    found = node.inside(look)
    scratch = found.pop("HOME")
    assert found.pop("TMPDIR") == scratch
    number, ticket = found.pop("LOCALDOMAIN").removeprefix("worker-").split("-")
    proxy = f"http://worker-{number}:{ticket}@127.128.0.1:3128"
    assert len(ticket) == 32
    one_thread = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM")
    assert found == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "ATP_API_KEY": "sandbox-placeholder",
        "REGION": "eu",
        **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), proxy),
        **dict.fromkeys(("NO_PROXY", "no_proxy"), "localhost,127.0.0.1,::1"),
        **{f"{library}_NUM_THREADS": "1" for library in one_thread},
    }


def test_tool_has_only_its_streams_and_its_channel_open(node: ServedNode) -> None:
    def look() -> list[list[object]]:
        import os
        import stat

        found = []
        for fd in range(1024):
            try:
                mode = os.fstat(fd).st_mode
            except OSError:
                continue
            kinds = {stat.S_IFSOCK: "socket", stat.S_IFIFO: "pipe", stat.S_IFCHR: "device"}
            found.append([fd, kinds.get(stat.S_IFMT(mode), "other")])
        return found

    found = node.inside(look)
    assert found[:3] == [[0, "device"], [1, "pipe"], [2, "pipe"]]
    assert [kind for _, kind in found[3:]] == ["socket"]


def test_resource_limits_hold_and_cannot_be_raised(node: ServedNode) -> None:
    def look() -> dict[str, bool]:
        import resource

        refused = {}
        for name in ("NOFILE", "NPROC", "FSIZE", "CORE", "MEMLOCK"):
            number = getattr(resource, "RLIMIT_" + name)
            soft, hard = resource.getrlimit(number)
            try:
                resource.setrlimit(number, (soft, hard + 1))
                refused[name] = False
            except (ValueError, OSError):
                refused[name] = hard >= 0
        return refused

    assert set(node.inside(look).values()) == {True}
