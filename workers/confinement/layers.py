"""The layers a zygote and a worker put on, in the order that works, and the check that they hold.

The zygote confines itself step by step and prepares what each worker will need, so that a worker
only enters. A step that is refused is named; nothing foreign has run by then.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, NamedTuple

from . import landlock, privileges, scratch, seccomp, seccomp_profiles, syscalls
from .seccomp_rules import Profile

_ABI_WITH_TRUNCATE = 3


class Refused(Exception):
    """A step of the confinement was refused, or does not hold."""

    def __init__(self, step: str, errno: int, message: str) -> None:
        super().__init__(step)
        self.step = step
        self.errno = errno
        self.message = message


class WorkerLayers(NamedTuple):
    """What every worker enters, prepared once."""

    files: landlock.WorkerLayer
    calls: seccomp.Prepared
    calls_alone: seccomp.Prepared
    landlock_abi: int

    def enter(self, slot: int) -> None:
        """Confine this worker, which has one thread, to scratch `slot`. OSError: it must end."""
        self.files.enter(scratch.slot_path(slot))
        # Its own Landlock domain keeps its neighbours from tracing it; it may look at itself.
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 1)
        self.calls.install()

    def enter_alone(self, _slot: int) -> None:
        """Confine a zygote that serves itself: the jail is its call's alone, whoever shares it.

        A filter reaches only the thread that installs it, so one with threads goes without.
        """
        self.files.close()
        if len(os.listdir("/proc/self/task")) == 1:
            self.calls_alone.install()


def confine_zygote(plan: dict[str, Any]) -> WorkerLayers:
    """Confine this process as planned, verify it, and prepare its workers' layers.

    Raises Refused at the first step that cannot be taken or does not hold.
    """
    _step("resource_limits", privileges.set_resource_limits, plan["rlimits"])
    _step("capabilities", privileges.drop_capabilities)
    support = landlock.probe()
    if support.abi < plan["landlock_abi"]:
        needed = plan["landlock_abi"]
        found = f"Landlock ABI {support.abi} {support.reason}".rstrip()
        raise Refused("landlock", 0, f"{found}, {needed} needed")
    tree = landlock.jail_tree()
    _step("landlock", landlock.enter_base, tree, support.abi)
    files = _step("landlock", landlock.WorkerLayer, tree, support.abi)
    own, other = scratch.slot_path(1), scratch.slot_path(2)
    broken = _step("landlock", landlock.verify_layer, files, own, other, "/toolkit", support.abi)
    if broken:
        raise Refused("landlock", 0, "does not hold: " + "; ".join(broken))
    base, worker = seccomp_profiles.ZYGOTE, seccomp_profiles.WORKER
    if support.abi < _ABI_WITH_TRUNCATE:
        worker = seccomp_profiles.without_truncate(worker)
    program = _step("seccomp", seccomp.compile_profile, worker, syscalls.MACHINE)
    calls = _step("seccomp", seccomp.Prepared, program)
    _step("seccomp", _try_in_a_child, calls, worker)
    lone = seccomp_profiles.LONE_WORKER
    alone = seccomp.Prepared(_step("seccomp", seccomp.compile_profile, lone, syscalls.MACHINE))
    _step("seccomp", seccomp.install, seccomp.compile_profile(base, syscalls.MACHINE))
    _step("seccomp", seccomp.verify, base, 1)
    return WorkerLayers(files, calls, alone, support.abi)


def _try_in_a_child(calls: seccomp.Prepared, profile: Profile) -> None:
    """See in a process of its own that the workers' filter holds; else OSError.

    Before the base filter is there, which allows no such process.
    """
    pid = os.fork()
    if pid == 0:
        try:
            calls.install()
            seccomp.verify_answers(profile)
        except BaseException:  # the child's outer door: its exit says that it does not hold
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise OSError(errno.EPROTO, f"seccomp: the {profile.name} filter does not hold")


def _step(name: str, action: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return action(*arguments)
    except OSError as error:
        raise Refused(name, error.errno or 0, f"{name}: {error.strerror or error}") from error
