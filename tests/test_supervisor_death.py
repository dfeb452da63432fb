"""A supervisor that is killed leaves nothing, whatever it was doing, and can be started again."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from backends import FakeBackend, Serving
from conftest import PATIENCE_S, toolkit_text, wait_until, write_tree

from atp_sandbox.jails.cgroups import detect

KEY = "S3CRET-key-of-the-operator"
GONE_S = 1.0
"""The promise for a machine that is not busy, so these tests run alone."""
BODY = """
    import os, time

    @tool
    def {name}_hang(**_):
        with open(os.path.expanduser("~/left"), "w") as file:
            file.write("something")
        while True:
            time.sleep(1)

    @tool
    def {name}_echo(value=None, **_):
        return value
"""
LEVELS = {
    "strict": 'isolation = "strict"',
    "jails": 'isolation = "strict"\nlifetime = "jail"',
    "container": 'isolation = "container"',
    "none": 'isolation = "none"',
}
if os.geteuid() == 0 and any(
    not path.stat().st_mode & 0o001 for path in Path(os.path.realpath(sys.executable)).parents
):
    del LEVELS["container"]  # its toolkits are other users', to whom this interpreter is closed


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that the users whom a root supervisor's toolkits run as can reach."""
    with tempfile.TemporaryDirectory(prefix="atp-death-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def orphans() -> Iterator[None]:
    """What loses its parent becomes a child of this process, so that nothing escapes a look."""
    subreaper = 36  # PR_SET_CHILD_SUBREAPER
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(subreaper, 1, 0, 0, 0) == 0
    yield
    for process in psutil.Process().children(recursive=True):  # of a test that failed
        with contextlib.suppress(psutil.Error):
            process.kill()
    assert libc.prctl(subreaper, 0, 0, 0, 0) == 0


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    with FakeBackend() as backend:
        yield backend


def serving(folder: Path, backend: FakeBackend, body: str = BODY, head: str = "") -> Serving:
    """`serve` with a toolkit for each of `LEVELS`."""
    config = f'[backend]\nurl = "{backend.url}"\n[defaults]\nconcurrency = 2\n{head}'
    for name, settings in LEVELS.items():
        text = toolkit_text(body.replace("{name}", name)).replace("def probe", f"def {name}_probe")
        write_tree(folder, {f"{name}.py": text})
        config += f'[toolkit.{name}]\npath = "{name}.py"\n{settings}\n'
    write_tree(folder, {"atp-sandbox.toml": config})
    return Serving(state_dir=folder / "state", cwd=folder, ATP_API_KEY=KEY)


def scratch_directories(folder: Path) -> set[Path]:
    places = (Path("/run/atp-sandbox"), folder / "state" / "run")
    return {path for place in places for path in place.glob("scratch-*")}


def left_of(serve: Serving, folder: Path) -> list[str]:
    """What there is of a supervisor besides itself: processes, groups, scratch, files, mounts."""
    pid = serve.process.pid
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.pid != pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.status()} {process.cmdline()}")
    found += left_of_groups(pid)
    # Of a number that is used again there may be older ones.
    recent = time.time() - 2 * PATIENCE_S
    for path in scratch_directories(folder):
        with contextlib.suppress(FileNotFoundError):
            if path.name.startswith(f"scratch-{pid}-") and path.lstat().st_mtime > recent:
                found.append(str(path))
    found += [str(p) for p in (folder / "state" / "run").glob("*") if p.name != "root"]
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    return found + [line for line in mounts if str(folder) in line or "/run/atp-sandbox" in line]


def left_of_groups(pid: int) -> list[str]:
    tops = [Path(top, "atp-sandbox") for top in set(detect().directories.values())]
    found: list[str] = []
    for top in tops:
        with contextlib.suppress(FileNotFoundError):  # it goes with the last one in it
            found += [str(top / name) for name in os.listdir(top) if name.startswith(f"{pid}-")]
    return found


def kill(serve: Serving, folder: Path) -> None:
    """SIGKILL the supervisor; the promise of this module."""
    os.kill(serve.process.pid, signal.SIGKILL)
    began = time.monotonic()
    while left := left_of(serve, folder):
        assert time.monotonic() - began < GONE_S, left
        time.sleep(0.01)
    serve.process.wait(PATIENCE_S)
    with contextlib.suppress(ChildProcessError):  # what we have become the parent of
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def wardens(serve: Serving) -> list[psutil.Process]:
    """Those of complete jails: they have a zygote."""
    below = psutil.Process(serve.process.pid).children()
    return [p for p in below if runs(p, "workers/boot.py") and children_of(p)]


def inmates(serve: Serving) -> list[psutil.Process]:
    """Zygotes and workers."""
    return [p for warden in wardens(serve) for p in children_of(warden)]


def servants(serve: Serving) -> list[psutil.Process]:
    """Processes of ours that are of no jail."""
    below = psutil.Process(serve.process.pid).children()
    return [p for p in below if runs(p, "egress/boot.py") or runs(p, "jails/janitor.py")]


def children_of(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:  # the builder of a jail soon ends
        return []


def runs(process: psutil.Process, script: str) -> bool:
    try:
        return any(part.endswith(script) for part in process.cmdline())
    except psutil.Error:
        return False


def put_under_load(serve: Serving, backend: FakeBackend) -> None:
    """As many calls of each toolkit as may run at once, and some that wait."""
    link = backend.accept()
    for name in LEVELS:
        for number in range(4):
            link.request(f"{name}-{number}", f"{name}_hang")
    link.call("last", "nosuch")  # so those before it have arrived
    wait_until(lambda: len(wardens(serve)) >= len(LEVELS), "a jail of each toolkit")


# -- nothing is left -------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.usefixtures("orphans")
@pytest.mark.parametrize("moment_s", [0.0, 0.15])
def test_while_jails_are_built_nothing_is_left(
    folder: Path, backend: FakeBackend, moment_s: float
) -> None:
    with serving(folder, backend, "import time\ntime.sleep(1000)\n") as serve:
        wait_until(psutil.Process(serve.process.pid).children, "the first process")
        time.sleep(moment_s)  # wherever that is: nothing tells how far a jail has come
        kill(serve, folder)


@pytest.mark.alone
@pytest.mark.usefixtures("orphans")
@pytest.mark.parametrize("stopped", ["nobody", "wardens", "everybody"])
def test_under_load_nothing_is_left_whoever_is_stopped(
    folder: Path, backend: FakeBackend, stopped: str
) -> None:
    with serving(folder, backend) as serve:
        put_under_load(serve, backend)
        assert left_of_groups(serve.process.pid) or not detect().is_usable
        chosen = [] if stopped == "nobody" else wardens(serve)
        if stopped == "everybody":
            chosen += [*inmates(serve), *servants(serve)]
        for process in chosen:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        kill(serve, folder)


@pytest.mark.alone
@pytest.mark.usefixtures("orphans")
def test_jails_that_it_was_just_freezing_do_not_stay(folder: Path, backend: FakeBackend) -> None:
    support = detect()
    if not support.is_usable:
        pytest.skip(f"no groups here: {support.reason}")
    with serving(folder, backend) as serve:
        put_under_load(serve, backend)
        top = Path(support.directories.get("freezer", support.directories["memory"]))
        (tree,) = (top / "atp-sandbox").glob(f"{serve.process.pid}-*")
        for group in (path for path in tree.rglob("*") if path.is_dir()):
            if support.version == 1:
                (group / "freezer.state").write_text("FROZEN")
            else:
                (group / "cgroup.freeze").write_text("1")
        kill(serve, folder)


# -- the janitor -----------------------------------------------------------------------------------


def janitors(serve: Serving) -> list[psutil.Process]:
    return [p for p in servants(serve) if runs(p, "jails/janitor.py")]


def test_janitor_that_ends_is_replaced_and_never_holds_up_a_clean_end(
    folder: Path, backend: FakeBackend
) -> None:
    with serving(folder, backend) as serve:
        backend.accept()
        (first,) = janitors(serve)
        first.kill()
        wait_until(lambda: janitors(serve) not in ([], [first]), "another one")
        serve.wait_for("nobody would clear up if this process were killed")
        (second,) = janitors(serve)
        second.suspend()
        began = time.monotonic()
        assert serve.stop(signal.SIGTERM) == 0
        assert time.monotonic() - began < 5.0
        assert not second.is_running()


def test_janitor_holds_no_secret_and_nothing_of_the_supervisor_but_a_pipe(
    folder: Path, backend: FakeBackend
) -> None:
    with serving(folder, backend) as serve:
        backend.accept()
        (janitor,) = janitors(serve)
        assert KEY not in " ".join(janitor.cmdline())
        assert janitor.environ() == {}
        assert os.getsid(janitor.pid) == janitor.pid
        open_files = {os.readlink(p) for p in Path(f"/proc/{janitor.pid}/fd").iterdir()}
        assert {f.partition(":")[0] for f in open_files} <= {"pipe", "/dev/null", "anon_inode"}
        assert serve.stop() == 0


def test_several_supervisors_at_once_do_not_touch_each_other(
    folder: Path, backend: FakeBackend
) -> None:
    with FakeBackend() as other, serving(folder, backend) as first:
        mine = backend.accept()
        (folder / "second").mkdir(mode=0o755)
        with serving(folder / "second", other) as second:
            assert other.accept().call(1, "strict_echo", value=1) == 1
            os.kill(second.process.pid, signal.SIGKILL)
            second.process.wait(PATIENCE_S)
            wait_until(lambda: not left_of_groups(second.process.pid), "the end of its groups")
        for name in LEVELS:
            assert mine.call(name, f"{name}_echo", value=name) == name
        assert first.stop() == 0


# -- the next one ----------------------------------------------------------------------------------


@pytest.mark.alone
def test_after_sigkill_under_load_the_next_supervisor_serves_within_five_seconds(
    folder: Path, backend: FakeBackend
) -> None:
    with serving(folder, backend) as serve:
        put_under_load(serve, backend)
        os.kill(serve.process.pid, signal.SIGKILL)
        began = time.monotonic()
        with serving(folder, backend) as again:
            link = backend.accept()
            for name in LEVELS:
                assert link.call(f"again-{name}", f"{name}_echo", value=1) == 1
            assert time.monotonic() - began < 5.0
            assert again.stop() == 0
