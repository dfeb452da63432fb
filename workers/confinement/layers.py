"""The layers a zygote and a worker put on, in the order that works, and the check that they hold.

The zygote confines itself step by step and prepares what each worker will need, so that a worker
only enters. A step that is refused is named; nothing foreign has run by then.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from functools import partial
from typing import Any

from . import landlock, privileges, scratch, seccomp, seccomp_profiles, syscalls
from .seccomp_rules import Profile

_ABI_WITH_TRUNCATE = 3
_ABI_WITH_SCOPES = 6
_NOTHING = 0
"""Standard input, which is /dev/null."""
_BASES = {
    base.name: base
    for base in (seccomp_profiles.ZYGOTE, seccomp_profiles.LONE, seccomp_profiles.SUBPROCESS)
}


class Refused(Exception):
    """A step of the confinement was refused, or does not hold."""

    def __init__(self, step: str, errno: int, message: str) -> None:
        super().__init__(step)
        self.step = step
        self.errno = errno
        self.message = message


class WorkerLayers:
    """What every worker enters, prepared once. None: a layer that this jail does without."""

    def __init__(
        self,
        plan: dict[str, Any],
        files: landlock.WorkerLayer | None,
        calls: seccomp.Prepared | None,
        landlock_abi: int,
    ) -> None:
        self.places = scratch.Places.of(plan)
        self.has_pid_namespace = plan["root"] is not None
        self.is_confined = plan["is_confined"]
        self.files = files
        self.calls = calls
        self.landlock_abi = landlock_abi
        self.directories: list[int] = []
        """Descriptors that the import left open; they would lead a worker out of its view."""

    def note_directories(self) -> None:
        """To be called once the import is over."""
        ours = self.files.descriptors if self.files is not None else []
        for name in os.listdir("/dev/fd") if self.places.has_views else []:
            fd = int(name)
            if fd not in ours and _is_directory(fd):
                self.directories.append(fd)

    def enter(self, slot: int) -> None:
        """Confine this worker, which has one thread, to scratch `slot`. OSError: it must end."""
        if not self.is_confined:
            return
        if not self.has_pid_namespace:
            privileges.die_with_parent()
        view = self.places.view(slot)
        if view is not None:
            _change_root(view)
            privileges.drop_last_capability()
            for fd in self.directories:
                os.dup2(_NOTHING, fd, inheritable=False)
        if self.files is not None:
            self.files.enter(self.places.inside(slot))
            # Its own Landlock domain keeps its neighbours from tracing it; it may look at itself.
            privileges.show_to_tracers()
        if self.calls is not None:
            self.calls.install()

    def enter_alone(self, _slot: int) -> None:
        """A zygote that serves itself is confined already: the jail is its call's alone."""
        if self.files is not None:
            self.files.close()


def confine_zygote(plan: dict[str, Any]) -> WorkerLayers:
    """Confine this process as planned, verify it, and prepare its workers' layers.

    Raises Refused at the first step that cannot be taken or does not hold.
    """
    places = scratch.Places.of(plan)
    if not plan["is_confined"]:
        return WorkerLayers(plan, None, None, 0)
    _step("resource_limits", privileges.set_resource_limits, plan["rlimits"])
    _step("capabilities", privileges.drop_capabilities, may_change_root=places.has_views)
    if plan["root"] is None:
        _step("capabilities", privileges.die_with_parent)
    if places.has_views:
        _step("own_root", _try_view, places)
    abi, files = 0, None
    if plan["landlock"] is not None:
        abi, files = _restrict_files(plan, places)
    calls = _filter_calls(plan["seccomp"], abi) if plan["seccomp"] is not None else None
    return WorkerLayers(plan, files, calls, abi)


def _restrict_files(
    plan: dict[str, Any], places: scratch.Places
) -> tuple[int, landlock.WorkerLayer]:
    """The base layer is entered, the workers' prepared and seen to hold."""
    support = landlock.probe()
    wanted = plan["landlock"]
    if support.abi < wanted["abi"]:
        found = f"Landlock ABI {support.abi} {support.reason}".rstrip()
        raise Refused("landlock", 0, f"{found}, {wanted['abi']} needed")
    if wanted["code"] is None:
        tree = landlock.jail_tree()
    else:
        tree = landlock.tree_of(wanted["code"], wanted["scratch"])
    _step("landlock", landlock.enter_base, tree, support.abi)
    broken = landlock.verify_base(support.abi)
    if broken:
        raise Refused("landlock", 0, "does not hold: " + "; ".join(broken))
    files = _step("landlock", landlock.WorkerLayer, tree, support.abi)
    own, other = places.outside(1), places.outside(2)
    here = plan["toolkit_directory"]
    broken = _step("landlock", landlock.verify_layer, files, own, other, here, support.abi)
    if broken:
        raise Refused("landlock", 0, "does not hold: " + "; ".join(broken))
    return support.abi, files


def _filter_calls(wanted: dict[str, Any], abi: int) -> seccomp.Prepared | None:
    """The base filter is installed and seen to hold; what a worker adds, if one is to be forked."""
    base, worker = _BASES[wanted["base"]], None
    if not wanted["sockets"]:
        base = seccomp_profiles.without_namespaces(base, has_signal_scope=abi >= _ABI_WITH_SCOPES)
        if abi < _ABI_WITH_TRUNCATE:
            base = seccomp_profiles.without_truncate(base)
    if wanted["base"] == seccomp_profiles.ZYGOTE.name:
        profile = seccomp_profiles.WORKER
        if abi < _ABI_WITH_TRUNCATE:
            profile = seccomp_profiles.without_truncate(profile)
        program = _step("seccomp", seccomp.compile_profile, profile, syscalls.MACHINE)
        worker = _step("seccomp", seccomp.Prepared, program)
        _step("seccomp", _try_filter, worker, profile)
    _step("seccomp", seccomp.install, seccomp.compile_profile(base, syscalls.MACHINE))
    _step("seccomp", seccomp.verify, base, 1)
    return worker


def _is_directory(fd: int) -> bool:
    try:
        return stat.S_ISDIR(os.fstat(fd).st_mode)
    except OSError:  # the one that listed them, which is closed by now
        return False


def _change_root(view: str) -> None:
    """The same place in another copy of the jail's mounts."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # the import went to a directory and removed it
        here = "/"
    os.chroot(view)
    os.chdir(here)


def _try_view(places: scratch.Places) -> None:
    """See in a process of its own that a worker leaves the other slots behind; else OSError."""

    def attempt(own: int, other: int) -> None:
        view, others = places.view(own), places.outside(other)
        if view is None or not os.path.isdir(others):
            raise OSError(errno.ENOENT, others)
        _change_root(view)
        privileges.drop_last_capability()
        if os.path.exists(others) or not os.path.isdir(places.inside(own)):
            raise OSError(errno.EPROTO, "another slot can be reached")
        try:
            os.chroot("/")
        except PermissionError:
            return
        raise OSError(errno.EPROTO, "the capability is still there")

    for own, other in ((1, 2), (2, 1)):
        _in_a_child(partial(attempt, own, other), "a worker's own root does not hold")


def _try_filter(calls: seccomp.Prepared, profile: Profile) -> None:
    """See in a process of its own that the workers' filter holds; else OSError.

    Before the base filter is there, which allows no such process.
    """

    def attempt() -> None:
        calls.install()
        seccomp.verify_answers(profile)

    _in_a_child(attempt, f"seccomp: the {profile.name} filter does not hold")


def _in_a_child(attempt: Callable[[], None], otherwise: str) -> None:
    """Do what cannot be undone where it harms nobody; OSError says `otherwise`, and why."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
        except BaseException as error:  # the child's outer door
            os.write(writer, str(error or type(error)).encode("utf-8", "replace")[:400])
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        reason = file.read()
    if os.waitpid(pid, 0)[1]:
        raise OSError(errno.EPROTO, f"{otherwise}: {reason}")


def _step(name: str, action: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return action(*arguments, **named)
    except OSError as error:
        raise Refused(name, error.errno or 0, f"{name}: {error.strerror or error}") from error
