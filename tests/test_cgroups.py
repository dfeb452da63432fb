"""The kernel keeps the limits of a jail and of each call, and its counters tell which was hit.

With real processes in real groups, version 1 or 2, whichever this machine offers; skipped with the
reason where it offers none. `cgroup_v2_vm.sh` runs this file in a virtual machine with version 2.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import resource
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from atp_sandbox.errors import IsolationError
from atp_sandbox.jails import cgroup_support
from atp_sandbox.jails.cgroup_group import Group
from atp_sandbox.jails.cgroups import (
    CallEvidence,
    CallGroup,
    CgroupError,
    CgroupSupport,
    CgroupTree,
    JailGroup,
    Mover,
    detect,
    remove_stale,
)
from atp_sandbox.jails.cgroups_v1 import GroupV1
from atp_sandbox.jails.cgroups_v2 import GroupV2

MIB = 1024 * 1024
PATIENCE_S = 20.0
NOBODY = 65534
UNTOUCHED = CallEvidence(0, 0, 0, 0.0)

Starter = Callable[..., "Child"]


class Child:
    """A process that waits for `release()` before it runs its program."""

    def __init__(self, program: str) -> None:
        code = "import os, sys\nsys.stdin.readline()\n" + textwrap.dedent(program)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid

    def release(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def read_line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def wait(self) -> int:
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


def hog(size_bytes: int, then: str = "print('still here', flush=True)") -> str:
    """A program that touches so much memory."""
    return f"""
        import mmap
        block = mmap.mmap(-1, {size_bytes}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for offset in range(0, {size_bytes}, {mmap.PAGESIZE}):
            block[offset] = 1
        {then}
    """


IDLE = "print('ready', flush=True)\nsys.stdin.readline()"


@pytest.fixture(scope="module")
def support() -> CgroupSupport:
    found = detect()
    if not found.is_usable:
        pytest.skip(f"no groups here: {found.reason}")
    return found


@pytest.fixture
def tree(support: CgroupSupport) -> Iterator[CgroupTree]:
    """A tree of which nothing may be left when the test is over."""
    tree = CgroupTree(support)
    try:
        yield tree
    finally:
        is_clean = tree.close()
    assert is_clean
    assert own_groups(support) == []


@pytest.fixture
def start(tree: CgroupTree) -> Iterator[Starter]:
    """`start(program, group)`: a process in `group`, waiting for its release."""
    children: list[Child] = []

    def start(program: str, group: CallGroup | JailGroup | None = None) -> Child:
        child = Child(program)
        children.append(child)
        if group is not None:
            group.add(child.pid)
        return child

    yield start
    for child in children:
        child.close()


@pytest.fixture
def jail(tree: CgroupTree) -> JailGroup:
    return tree.jail("kit", memory_bytes=512 * MIB, pids_max=200)


@pytest.fixture
def call(jail: JailGroup) -> CallGroup:
    return jail.take_call(memory_bytes=64 * MIB, pids_max=50)


def own_groups(support: CgroupSupport) -> list[str]:
    """The directories of trees of this process, in all hierarchies."""
    return [
        str(path)
        for top in set(support.directories.values())
        for path in Path(top, "atp-sandbox").glob(f"{os.getpid()}-*")
    ]


def group_files(support: CgroupSupport, controller: str, group: str) -> Path:
    """The directory of a group of the only tree of this process."""
    (found,) = Path(support.directories[controller]).glob(f"atp-sandbox/{os.getpid()}-*/{group}")
    return found


# -- memory ----------------------------------------------------------------------------------------


def test_memory_limit_kills_the_hog_and_nobody_else(
    jail: JailGroup, call: CallGroup, start: Starter
) -> None:
    other = jail.take_call(memory_bytes=64 * MIB, pids_max=50)
    zygote, bystander, greedy = (
        start(IDLE, jail),
        start(IDLE, other),
        start(hog(200 * MIB), call),
    )
    for child in (zygote, bystander, greedy):
        child.release()
    assert greedy.wait() == -signal.SIGKILL
    evidence = call.evidence()
    assert evidence.oom_kills > 0
    assert evidence.memory_refusals > 0
    assert evidence.pids_refused == 0
    for child in (zygote, bystander):
        assert child.read_line() == "ready"
        assert child.process.poll() is None
    assert other.evidence().oom_kills == 0
    assert jail.base_evidence().oom_kills == 0


def test_memory_below_the_limit_is_no_evidence(call: CallGroup, start: Starter) -> None:
    modest = start(hog(30 * MIB), call)
    modest.release()
    assert modest.wait() == 0
    evidence = call.evidence()
    assert (evidence.oom_kills, evidence.memory_refusals, evidence.pids_refused) == (0, 0, 0)


def test_memory_touched_before_the_move_is_not_the_calls(jail: JailGroup, start: Starter) -> None:
    call = jail.take_call(memory_bytes=32 * MIB, pids_max=50)
    program = hog(100 * MIB, then="print('touched', flush=True); sys.stdin.readline()")
    grown = start(program, jail)
    grown.release()
    assert grown.read_line() == "touched"
    call.add(grown.pid)
    grown.release()
    assert grown.wait() == 0
    assert call.evidence().oom_kills == 0


def test_jail_limit_holds_where_the_limits_of_its_calls_add_up_to_more(
    tree: CgroupTree, start: Starter
) -> None:
    jail = tree.jail("small", memory_bytes=96 * MIB, pids_max=100)
    calls = [jail.take_call(memory_bytes=80 * MIB, pids_max=50) for _ in range(2)]
    program = hog(60 * MIB, then="print('there', flush=True); sys.stdin.readline()")
    hogs = [start(program, call) for call in calls]
    hogs[0].release()
    assert hogs[0].read_line() == "there"
    hogs[1].release()
    hogs[1].read_line()  # ends either way: it is there, or it or the other one was killed
    kills = [call.evidence() for call in calls]
    assert sum(evidence.oom_kills for evidence in kills) > 0
    assert all(evidence.memory_refusals == 0 for evidence in kills), "their own limit was not hit"
    killed = [child for child, evidence in zip(hogs, kills, strict=True) if evidence.oom_kills]
    assert killed[0].wait() == -signal.SIGKILL


def test_out_of_memory_ends_every_process_of_the_call_on_version_2(
    support: CgroupSupport, call: CallGroup, start: Starter
) -> None:
    if support.version != 2:
        pytest.skip("version 1 ends one process; the supervisor ends the rest by kill()")
    innocent, greedy = start(IDLE, call), start(hog(200 * MIB), call)
    greedy.release()
    assert greedy.wait() == -signal.SIGKILL
    assert innocent.wait() == -signal.SIGKILL
    assert call.evidence().oom_kills >= 2


def test_limits_forbid_swap(support: CgroupSupport, call: CallGroup) -> None:
    files = group_files(support, "memory", "kit/call-1")
    if support.version == 2:
        swap = files / "memory.swap.max"
        assert not swap.exists() or swap.read_text() == "0\n"
    else:
        swap = files / "memory.memsw.limit_in_bytes"
        assert not swap.exists() or int(swap.read_text()) == 64 * MIB + mmap.PAGESIZE
        assert (files / "memory.swappiness").read_text() == "0\n"


def test_no_swap_is_used(support: CgroupSupport, call: CallGroup, start: Starter) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) < 2:
        pytest.skip("no swap on this machine")
    greedy = start(hog(200 * MIB), call)
    greedy.release()
    assert greedy.wait() == -signal.SIGKILL
    files = group_files(support, "memory", "kit/call-1")
    if support.version == 2:
        assert (files / "memory.swap.current").read_text() == "0\n"
    else:
        assert int((files / "memory.memsw.max_usage_in_bytes").read_text()) <= 65 * MIB
        rows = (files / "memory.stat").read_text().split()
        assert rows[rows.index("swap") + 1] == "0"


# -- processes -------------------------------------------------------------------------------------

FORK_BOMB = """
    import time
    made = 0
    try:
        while made < 500:
            if os.fork() == 0:
                time.sleep(600)
            made += 1
    except BlockingIOError:
        print(made, flush=True)
    time.sleep(600)
"""


def test_fork_bomb_is_stopped_and_counted(jail: JailGroup, call: CallGroup, start: Starter) -> None:
    other = jail.take_call(memory_bytes=64 * MIB, pids_max=50)
    bomb, bystander = start(FORK_BOMB, call), start("print(os.fork() >= 0, flush=True)", other)
    bomb.release()
    assert int(bomb.read_line()) == 49
    bystander.release()
    assert bystander.read_line() == "True"
    assert call.evidence().pids_refused > 0
    assert call.evidence().oom_kills == 0
    assert other.evidence().pids_refused == 0
    call.kill()
    assert call.wait_empty(PATIENCE_S)


def test_jail_limits_processes_whatever_its_calls_may(tree: CgroupTree, start: Starter) -> None:
    jail = tree.jail("small", memory_bytes=512 * MIB, pids_max=20)
    bomb = start(FORK_BOMB, jail.take_call(memory_bytes=256 * MIB, pids_max=50))
    bomb.release()
    assert int(bomb.read_line()) == 19


def test_kill_ends_setsid_double_forked_stopped_and_deaf_processes(
    call: CallGroup, start: Starter
) -> None:
    tree = start(
        """
        import signal, time
        for number in range(1, signal.NSIG):
            try:
                signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError):
                pass
        for how in ("setsid", "double", "stop"):
            if os.fork() == 0:
                os.setsid()
                if how == "double" and os.fork():
                    os._exit(0)
                if how == "stop":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(600)
        print("grown", flush=True)
        time.sleep(600)
        """,
        call,
    )
    tree.release()
    assert tree.read_line() == "grown"
    call.kill()
    assert call.wait_empty(PATIENCE_S)
    assert call.is_empty()
    assert tree.wait() == -signal.SIGKILL


def test_kill_ends_processes_that_keep_forking(call: CallGroup, start: Starter) -> None:
    # Each forks a successor and ends, so that a list of numbers is out of date when it is read.
    runners = start(
        """
        def fork():
            try:
                return os.fork()
            except BlockingIOError:  # so many are not reaped yet
                return None

        for _ in range(8):
            if fork() == 0:
                while True:
                    if fork():
                        os._exit(0)
        print("running", flush=True)
        sys.stdin.readline()
        """,
        call,
    )
    runners.release()
    assert runners.read_line() == "running"
    call.kill()
    assert call.wait_empty(PATIENCE_S)


def test_process_that_is_gone_is_said_to_be_gone(call: CallGroup, start: Starter) -> None:
    gone = start("")
    gone.release()
    gone.wait()
    with pytest.raises(ProcessLookupError):
        call.add(gone.pid)


def test_processes_of_a_jail_are_all_listed(
    jail: JailGroup, call: CallGroup, start: Starter
) -> None:
    assert jail.processes() == set()
    zygote, worker = start(IDLE, jail), start(IDLE, call)
    assert jail.processes() == {zygote.pid, worker.pid}


# -- cpu -------------------------------------------------------------------------------------------


def test_cpu_time_of_dead_and_living_processes_is_counted(
    support: CgroupSupport, call: CallGroup, start: Starter
) -> None:
    if support.version == 1 and "cpuacct" not in support.controllers:
        pytest.skip("no cpuacct controller")
    busy = start(
        """
        import time
        if os.fork() == 0:
            while time.process_time() < 0.2:
                pass
            os._exit(0)
        os.wait()
        print("done", flush=True)
        sys.stdin.readline()
        """,
        call,
    )
    busy.release()
    assert busy.read_line() == "done"
    assert 0.2 <= call.evidence().cpu_s < 2.0


def test_cpu_quota_slows_a_jail_down(
    support: CgroupSupport, tree: CgroupTree, start: Starter
) -> None:
    if "cpu" not in support.controllers:
        pytest.skip("no cpu controller")
    jail = tree.jail("slow", memory_bytes=256 * MIB, pids_max=50, cpu_weight=50, cpu_quota=0.2)
    call = jail.take_call(memory_bytes=128 * MIB, pids_max=10)
    program = """
        import time
        until = time.process_time() + 0.3  # without what it took to start, perhaps before the move
        while time.process_time() < until:
            pass
        print("done", flush=True)
    """
    busy = start(program, call)
    began = time.monotonic()
    busy.release()
    assert busy.read_line() == "done"
    assert time.monotonic() - began > 1.0


def test_cpu_quota_without_a_controller_is_refused(support: CgroupSupport) -> None:
    directories = {name: path for name, path in support.directories.items() if name != "cpu"}
    with CgroupTree(CgroupSupport(support.version, directories)) as tree:
        tree.jail("free", memory_bytes=64 * MIB, pids_max=10)
        with pytest.raises(CgroupError, match="CPU"):
            tree.jail("slow", memory_bytes=64 * MIB, pids_max=10, cpu_quota=0.5)
    assert own_groups(support) == []


# -- use again -------------------------------------------------------------------------------------


def test_group_is_used_again_and_counts_from_nothing(
    jail: JailGroup, call: CallGroup, start: Starter
) -> None:
    greedy, bomb = start(hog(200 * MIB), call), start(FORK_BOMB, call)
    bomb.release()
    bomb.read_line()
    greedy.release()
    greedy.wait()
    call.kill()
    assert call.wait_empty(PATIENCE_S)
    first = call.evidence()
    assert first.oom_kills
    assert first.pids_refused
    assert call.give_back()

    again = jail.take_call(memory_bytes=64 * MIB, pids_max=50)
    second = again.evidence()
    assert (second.oom_kills, second.memory_refusals, second.pids_refused) == (0, 0, 0)
    assert second.cpu_s == 0
    modest = start(hog(10 * MIB), again)
    modest.release()
    assert modest.wait() == 0
    evidence = again.evidence()
    assert (evidence.oom_kills, evidence.pids_refused) == (0, 0)
    third = jail.take_call(memory_bytes=64 * MIB, pids_max=50)
    assert third.give_back()
    assert again.give_back()


def test_groups_taken_one_after_the_other_are_one(support: CgroupSupport, jail: JailGroup) -> None:
    for _ in range(5):
        assert jail.take_call(memory_bytes=64 * MIB, pids_max=50).give_back()
    names = sorted(path.name for path in group_files(support, "pids", "kit").glob("call-*"))
    assert names == ["call-1"]


@pytest.mark.parametrize("sizes", [(32, 128), (128, 32)])
def test_group_used_again_has_the_limits_of_the_new_call(
    jail: JailGroup, start: Starter, sizes: tuple[int, int]
) -> None:
    for size in sizes:
        call = jail.take_call(memory_bytes=size * MIB, pids_max=50)
        greedy = start(hog(64 * MIB), call)
        greedy.release()
        assert greedy.wait() == (0 if size > 64 else -signal.SIGKILL)
        assert bool(call.evidence().oom_kills) == (size < 64)
        assert call.give_back()


def test_group_with_a_living_process_is_not_used_again(
    support: CgroupSupport, jail: JailGroup, call: CallGroup, start: Starter
) -> None:
    left_over = start(IDLE, call)
    assert not call.give_back()
    assert left_over.wait() == -signal.SIGKILL
    jail.take_call(memory_bytes=64 * MIB, pids_max=50)
    assert len(list(group_files(support, "pids", "kit").glob("call-*"))) == 2


def test_counting_restarts_for_the_next_call_of_one_worker(call: CallGroup, start: Starter) -> None:
    bomb = start(FORK_BOMB, call)
    bomb.release()
    bomb.read_line()
    assert call.evidence().pids_refused
    call.restart(counts_cpu=True)
    assert call.evidence().pids_refused == 0


def test_group_given_back_cannot_be_used(call: CallGroup) -> None:
    assert call.give_back()
    assert call.give_back(), "safe to call again"
    with pytest.raises(ValueError, match="given back"):
        call.add(os.getpid())


# -- moves in a thread -----------------------------------------------------------------------------


@pytest.fixture
def moves() -> Iterator[tuple[Mover, queue.SimpleQueue[Callable[[], None]]]]:
    """A mover, and what it wants to be called in the thread of the loop."""
    calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
    mover = Mover(calls.put)
    yield mover, calls
    mover.close()
    mover.close()


def test_moves_are_made_in_a_thread_in_the_order_asked_for(
    jail: JailGroup,
    call: CallGroup,
    start: Starter,
    moves: tuple[Mover, queue.SimpleQueue[Callable[[], None]]],
) -> None:
    mover, calls = moves
    zygote, worker, gone = start(IDLE), start(IDLE), start("")
    gone.release()
    gone.wait()
    done: list[tuple[str, Exception | None]] = []
    mover.move(zygote.pid, jail.adder(), lambda error: done.append(("zygote", error)))
    mover.move(worker.pid, call.adder(), lambda error: done.append(("worker", error)))
    mover.move(gone.pid, call.adder(), lambda error: done.append(("gone", error)))
    while len(done) < 3:
        calls.get(timeout=PATIENCE_S)()
    assert done[:2] == [("zygote", None), ("worker", None)]
    assert isinstance(done[2][1], ProcessLookupError)
    assert jail.processes() == {zygote.pid, worker.pid}
    assert not call.is_empty()


def test_move_to_a_group_that_is_gone_is_an_error_and_no_more(
    jail: JailGroup,
    call: CallGroup,
    start: Starter,
    moves: tuple[Mover, queue.SimpleQueue[Callable[[], None]]],
) -> None:
    mover, calls = moves
    worker, add = start(IDLE), call.adder()
    assert jail.close()
    done: list[Exception | None] = []
    mover.move(worker.pid, add, done.append)
    calls.get(timeout=PATIENCE_S)()
    assert isinstance(done[0], CgroupError)


# -- ends ------------------------------------------------------------------------------------------


def test_closing_a_jail_ends_what_is_in_it(
    support: CgroupSupport, jail: JailGroup, call: CallGroup, start: Starter
) -> None:
    zygote, worker = start(IDLE, jail), start(IDLE, call)
    assert jail.close()
    assert jail.close(), "safe to call again"
    assert zygote.wait() == worker.wait() == -signal.SIGKILL
    top = support.directories["pids"]
    assert not list(Path(top).glob(f"atp-sandbox/{os.getpid()}-*/kit"))
    assert call.give_back(), "a call may end after its jail"


def test_without_descriptors_a_jail_is_not_taken_for_gone_and_goes_later(
    tree: CgroupTree, support: CgroupSupport, start: Starter
) -> None:
    jail = tree.jail("short", memory_bytes=64 * MIB, pids_max=20)
    child = start(IDLE)
    jail.add(child.pid)
    _, most = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, most))
    try:
        assert not jail.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    top = f"{support.directories['memory']}/atp-sandbox/{tree.place.name}"
    assert os.path.isdir(f"{top}/short")
    assert child.process.poll() is None
    tree.jail("next", memory_bytes=64 * MIB, pids_max=20)
    assert child.wait() == -signal.SIGKILL
    tree.jail("last", memory_bytes=64 * MIB, pids_max=20)
    assert sorted(name for name in os.listdir(top) if os.path.isdir(f"{top}/{name}")) == [
        *("last", "next")
    ]


def test_no_descriptor_of_ours_reaches_a_program_that_is_started(
    support: CgroupSupport, tree: CgroupTree, call: CallGroup
) -> None:
    ours = [fd for fd in os.listdir("/proc/self/fd") if _target(fd).find("/atp-sandbox/") >= 0]
    assert ours
    assert not any(os.get_inheritable(int(fd)) for fd in ours)


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


@pytest.fixture
def apart(support: CgroupSupport, tree: CgroupTree) -> Iterator[CgroupSupport]:
    """Groups in which no other supervisor of this machine looks for stale ones as it starts."""
    name = f"atp-test-{os.getpid()}"
    directories = {key: f"{path}/{name}" for key, path in support.directories.items()}
    kinds: dict[int, type[Group]] = {1: GroupV1, 2: GroupV2}
    group = kinds[support.version](directories).make()
    group.delegate()
    yield CgroupSupport(support.version, directories)
    assert group.end_and_remove(PATIENCE_S)


SUPERVISOR = """
    import json, subprocess, sys
    from atp_sandbox.jails.cgroups import CgroupSupport, CgroupTree
    tree = CgroupTree(CgroupSupport(*json.loads(sys.argv[1])))
    jail = tree.jail("kit", memory_bytes=2**28, pids_max=50)
    sleepers = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    jail.add(sleepers[0].pid)
    jail.take_call(memory_bytes=2**26, pids_max=10).add(sleepers[1].pid)
    print(json.dumps([one.pid for one in sleepers]), flush=True)
    sys.stdin.read()
"""


def test_groups_of_a_dead_supervisor_are_removed_and_those_of_a_living_one_are_not(
    apart: CgroupSupport,
) -> None:
    place = json.dumps([apart.version, dict(apart.directories)])
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SUPERVISOR), place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert other.stdin is not None
    assert other.stdout is not None
    with CgroupTree(apart) as tree:
        jail = tree.jail("kit", memory_bytes=512 * MIB, pids_max=200)
        jail.take_call(memory_bytes=64 * MIB, pids_max=50)
        try:
            sleepers = json.loads(other.stdout.readline())
            handles = [os.pidfd_open(pid) for pid in sleepers]
            mine = own_groups(apart)
            assert mine
            assert remove_stale(apart) == []
        finally:
            other.kill()
            other.wait()
            other.stdin.close()
            other.stdout.close()
        (removed,) = remove_stale(apart)
        assert removed.startswith(f"{other.pid}-")
        for handle in handles:
            # A process leaves its group a moment before it has ended.
            assert select.select([handle], [], [], PATIENCE_S)[0], "it has ended"
            os.close(handle)
        tops = {f"{path}/atp-sandbox" for path in apart.directories.values()}
        assert not any(Path(top, removed).exists() for top in tops)
        assert own_groups(apart) == mine
        assert jail.take_call(memory_bytes=64 * MIB, pids_max=50).is_empty()


def test_nothing_is_left_of_a_tree(support: CgroupSupport) -> None:
    with CgroupTree(support) as tree:
        tree.jail("kit", memory_bytes=64 * MIB, pids_max=10).prepare_calls(2)
        assert own_groups(support)
    assert own_groups(support) == []
    assert tree.close(), "safe to call again"
    with pytest.raises(ValueError, match="closed"):
        tree.jail("kit", memory_bytes=64 * MIB, pids_max=10)


# -- refusals --------------------------------------------------------------------------------------


def test_write_that_the_kernel_refuses_names_file_value_and_errno(
    support: CgroupSupport, tree: CgroupTree
) -> None:
    with pytest.raises(CgroupError) as caught:
        tree.jail("kit", memory_bytes=64 * MIB, pids_max=-5)
    error = caught.value
    assert error.path.endswith("/kit/pids.max")
    assert error.value == "-5"
    assert error.errno in (22, 34)
    assert "-5" in error.message
    assert error.path in error.message
    assert error.cause.startswith(("EINVAL", "ERANGE"))
    assert isinstance(error, IsolationError)
    assert not list(Path(support.directories["pids"]).glob(f"atp-sandbox/{os.getpid()}-*/kit"))


def test_jail_of_a_name_that_is_there_leaves_the_first_alone(
    tree: CgroupTree, jail: JailGroup
) -> None:
    with pytest.raises(CgroupError, match="kit"):
        tree.jail("kit", memory_bytes=64 * MIB, pids_max=10)
    assert jail.take_call(memory_bytes=64 * MIB, pids_max=10).is_empty()


def test_unusable_machine_is_refused_with_reason_and_remedy() -> None:
    support = CgroupSupport(2, reason="the group /x is not ours", remedy="Start it elsewhere.")
    with pytest.raises(IsolationError) as caught:
        CgroupTree(support)
    assert caught.value.layer == "cgroup"
    assert caught.value.cause == support.reason
    assert caught.value.tip == support.remedy
    assert remove_stale(support) == []


def test_ordinary_user_without_groups_of_his_own_is_told_what_to_do() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become nobody")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            found = detect(environ={})
            answer = json.dumps([found.version, found.is_usable, found.reason, found.remedy])
            os.write(writer, answer.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        version, is_usable, reason, remedy = json.load(file)
    os.waitpid(pid, 0)
    assert version in (1, 2)
    assert not is_usable
    assert f"cannot be written by user {NOBODY}" in reason or "not been given" in reason
    assert len(remedy) > 40


# -- detection, on trees that look like other machines' --------------------------------------------


class Machine:
    """A directory that looks like a cgroup file system, and the `/proc` files that point to it."""

    def __init__(self, root: Path) -> None:
        self.proc = root / "proc"
        self.proc.mkdir()
        self.top = root / "with space" / "cgroup"
        self.top.mkdir(parents=True)
        self.mounts: list[str] = []

    def mount(self, kind: str, options: str, *, root: str = "/", point: Path | None = None) -> None:
        shown = str(point or self.top).replace(" ", "\\040")
        self.mounts.append(f"40 20 0:30 {root} {shown} rw,nosuid shared:9 - {kind} none {options}")

    def group(self, path: str, **files: str) -> Path:
        directory = self.top / path.lstrip("/")
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "cgroup.procs").touch()
        for name, text in files.items():
            (directory / name.replace("_", ".", 1)).write_text(text)
        return directory

    def group_v2(
        self,
        path: str,
        *,
        controllers: str = "cpu memory pids",
        procs: str = "",
        kind: str = "domain",
    ) -> Path:
        return self.group(
            path,
            cgroup_controllers=controllers,
            cgroup_subtree_control="",
            cgroup_type=kind,
            cgroup_procs=procs or f"{os.getpid()}\n",
        )

    def detect(self, own: str, **environ: str) -> CgroupSupport:
        (self.proc / "mountinfo").write_text(
            "\n".join(["1 0 8:1 / / rw - ext4 x rw", *self.mounts])
        )
        (self.proc / "cgroup").write_text(own)
        return detect(proc=self.proc, environ=environ)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_delegated_group_is_found_on_version_2(machine: Machine) -> None:
    machine.mount("cgroup2", "rw,nsdelegate")
    scope = machine.group_v2("/user.slice/run.scope")
    found = machine.detect("0::/user.slice/run.scope\n")
    assert found.is_usable
    assert found.version == 2
    assert found.directories == dict.fromkeys(("memory", "pids", "cpu"), str(scope))


@pytest.mark.parametrize(("options", "blocks"), [("rw", True), ("rw,favordynmods", False)])
def test_mount_that_favours_moves_is_noticed(machine: Machine, options: str, blocks: bool) -> None:
    machine.mount("cgroup2", options)
    machine.group_v2("/x")
    assert machine.detect("0::/x\n").moves_block == blocks


def test_our_own_leaf_of_before_leads_to_the_group_above(machine: Machine) -> None:
    machine.mount("cgroup2", "rw")
    scope = machine.group_v2("/run.scope", procs="\n")
    machine.group_v2("/run.scope/supervisor", controllers="")
    assert machine.detect("0::/run.scope/supervisor\n").directories["memory"] == str(scope)


def test_group_of_a_container_is_found_below_its_mount(machine: Machine) -> None:
    machine.mount("cgroup2", "rw", root="/docker/abc")
    machine.group_v2("/")
    assert machine.detect("0::/docker/abc\n").directories["pids"] == str(machine.top)


@pytest.mark.parametrize("path", ["/../other", "/docker/abcdef", "/gone (deleted)"])
def test_group_outside_of_the_mount_is_not_mistaken(machine: Machine, path: str) -> None:
    machine.mount("cgroup2", "rw", root="/docker/abc")
    machine.group_v2("/")
    assert machine.detect(f"0::{path}\n").version == 0


def test_missing_controller_is_named(machine: Machine) -> None:
    machine.mount("cgroup2", "rw")
    machine.group_v2("/x", controllers="cpu pids")
    found = machine.detect("0::/x\n")
    assert not found.is_usable
    assert found.version == 2
    assert "memory" in found.reason
    assert "pids" not in found.reason


def test_cpu_controller_is_not_required(machine: Machine) -> None:
    machine.mount("cgroup2", "rw")
    machine.group_v2("/x", controllers="memory pids")
    assert machine.detect("0::/x\n").controllers == ("memory", "pids")


def test_other_processes_in_our_group_are_a_reason_against_it(machine: Machine) -> None:
    machine.mount("cgroup2", "rw")
    machine.group_v2("/x", procs=f"1\n{os.getpid()}\n77\n")
    assert "2 processes beside this one" in machine.detect("0::/x\n").reason


def test_threaded_group_is_a_reason_against_it(machine: Machine) -> None:
    machine.mount("cgroup2", "rw")
    machine.group_v2("/x", kind="threaded")
    assert "threaded" in machine.detect("0::/x\n").reason


def test_version_1_is_taken_where_version_2_has_no_controllers(machine: Machine) -> None:
    machine.mount("cgroup2", "rw", point=machine.top / "unified")
    machine.group_v2("/unified", controllers="hugetlb")
    expected: dict[str, str] = {}
    for hierarchy, names in (
        ("memory", ["memory"]),
        ("pids", ["pids"]),
        ("freezer", ["freezer"]),
        ("cpu,cpuacct", ["cpu", "cpuacct"]),
    ):
        machine.mount("cgroup", f"rw,{hierarchy}", point=machine.top / hierarchy)
        place = machine.group(f"{hierarchy}/job")
        expected |= dict.fromkeys(names, str(place))
    own = "5:cpu,cpuacct:/job\n4:memory:/job\n3:pids:/job\n2:freezer:/job\n1:name=systemd:/\n0::/\n"
    found = machine.detect(own)
    assert found.is_usable
    assert found.version == 1
    assert found.directories == expected


def test_version_1_without_a_freezer_is_not_enough(machine: Machine) -> None:
    for name in ("memory", "pids"):
        machine.mount("cgroup", f"rw,{name}", point=machine.top / name)
        machine.group(name)
    found = machine.detect("4:memory:/\n3:pids:/\n")
    assert found.version == 1
    assert "freezer" in found.reason


def test_machine_without_groups_says_so(tmp_path: Path) -> None:
    found = detect(proc=tmp_path, environ={})
    assert not found.is_usable
    assert found.version == 0
    assert found.remedy


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "cgroup_writable"),
        ({"container": "podman"}, "unmask=/sys/fs/cgroup"),
        ({"container": "docker"}, "writable-cgroups=true"),
    ],
)
def test_remedy_fits_what_is_around_us(
    machine: Machine, environ: dict[str, str], expected: str
) -> None:
    machine.mount("cgroup2", "rw")
    machine.group_v2("/", controllers="")
    assert expected in machine.detect("0::/\n", **environ).remedy


@pytest.mark.parametrize(("euid", "expected"), [(0, "--scope"), (1000, "--user --scope")])
def test_remedy_under_systemd_is_a_scope(
    monkeypatch: pytest.MonkeyPatch, euid: int, expected: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: euid)
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/run/systemd/system")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    remedy = cgroup_support._remedy(2, {})
    assert f"systemd-run {expected} -p Delegate=yes" in remedy
