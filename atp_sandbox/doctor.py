"""What this machine can enforce, found by asking the kernel and by starting a real jail.

Each finding has a stable id, a state and, where something is missing, a remedy. What a real start
proves outweighs what a file of /proc foretells. The ids, which scripts may rely on:

    system.kernel        Linux is new enough
    system.machine       its processor is one that we have system call numbers for
    system.python        which interpreter runs, and its version
    system.user          root or an ordinary user
    system.container     whether we seem to be inside a container, and what it has to allow
    system.apparmor      Ubuntu's limit: kernel.apparmor_restrict_unprivileged_userns
    system.userns        Debian's limit: kernel.unprivileged_userns_clone
    system.max_userns    everybody's limit: user.max_user_namespaces
    limits.cgroup        control groups: version, controllers, or why there are none
    limits.moves         whether moves into groups wait for the kernel
    jail.start           a jail was started and verified, with all of its layers
    jail.worker          only if the worker in it did not answer
    jail.namespaces      the worker has none of ours
    jail.pid             so for the PID namespace
    jail.root            a root directory of its own, in which no other call has a name
    jail.capabilities    no capability, and no way to one
    jail.no_new_privs    no exec can gain anything
    jail.seccomp         its system calls are filtered
    jail.landlock        the version of Landlock, and what stands in for a newer one
    jail.files           a file of this machine cannot be opened
    jail.network         a service of this machine cannot be reached
    jail.processes       it can start no process

A row `skip` is for what is not needed as asked, was waived, or could not be seen; it says which.
After `jail.start` there are no more rows if no jail was started.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from atp_sandbox.confinement.landlock_features import Standing, substitutes
from atp_sandbox.errors import IsolationError, SandboxError
from atp_sandbox.isolation import WITHOUT, Isolation, Waivable
from atp_sandbox.jails.cgroups import CgroupSupport, detect
from atp_sandbox.outcome import Outcome, Success
from atp_sandbox.settings import ToolkitSettings
from atp_sandbox.single import SingleToolkit

MACHINES = ("x86_64", "aarch64")
NAMESPACE_LAYERS = frozenset(
    {
        "user namespaces",
        "mount namespace",
        "network namespace",
        "scratch directories",
        "a root directory for each call",
    }
)
"""Layers by the names of `jails.remedies` that a container, or a limit on namespaces, refuses."""
NEEDED_CALLS = ("unshare", "mount", "umount2", "pivot_root", "mount_setattr", "sethostname")
"""System calls of `strict` that Docker's default filter refuses a container without privileges."""
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_CGROUP_LAYERS = ("control groups", "cgroup")
_FIRST_BLOCKING_KERNEL = (6, 0)
_BUG = "This is a bug or an unsupported kernel; please report it."
_OTHER_LEVEL = "--isolation container"
_WAIVE_CGROUP = "Or do without them, by name: --waive cgroup."

_PROBE = '''
import ctypes
import errno
import os
import socket

from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="none", app_name="doctor")
libc = ctypes.CDLL(None, use_errno=True)


def asked(name, *arguments):
    """What the kernel answers; None if it does not."""
    answer = getattr(libc, name)(*arguments)
    return None if answer < 0 else answer


def capabilities():
    """Any bit of any set: capget(2)."""
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    return None if asked("capget", header, sets) is None else sum(sets)


def connect(port):
    with socket.socket() as client_socket:
        client_socket.settimeout(5)
        client_socket.connect(("127.0.0.1", port))


def fork():
    if os.fork() == 0:
        os._exit(0)


def unshare():
    if libc.unshare(0x10000000):
        raise OSError(ctypes.get_errno(), "unshare")


def refusal(attempt, *arguments):
    """The name of the errno; empty if nothing was refused."""
    try:
        attempt(*arguments)
    except OSError as error:
        return errno.errorcode.get(error.errno, str(error))
    return ""


@client.register_tool("look", ["file", "port", "fork"], [], "Looks at itself.", None, None, None)
def look(**given):
    tried = {"file": refusal(open, given["file"]), "unshare": refusal(unshare)}
    if given["port"]:
        tried["connect"] = refusal(connect, given["port"])
    if given["fork"]:
        tried["fork"] = refusal(fork)
    kinds = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
    links = {kind: "/proc/self/ns/" + kind for kind in kinds}
    return {
        "capabilities": capabilities(),
        "no_new_privs": asked("prctl", 39, 0, 0, 0, 0),
        "seccomp": asked("prctl", 21, 0, 0, 0, 0),
        "namespaces": {k: os.readlink(p) for k, p in links.items() if os.path.islink(p)},
        "root": os.stat("/").st_dev,
        "others": [n for n in range(1, 32) if os.path.lexists("/slots/%d" % n)],
        "tried": tried,
    }


client.start()
'''


class State(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row. `id` is stable; `remedy` says what to do on warn and fail.

    Lines of a remedy that begin with two spaces are to be typed as they are.
    """

    id: str
    group: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All that was found, in the order in which it is shown."""

    isolation: Isolation
    notes: list[str]
    findings: list[Finding]

    @property
    def would_serve(self) -> bool:
        """Whether `serve` would start with this isolation."""
        return not any(finding.state is State.FAIL for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "would_serve": self.would_serve,
            "isolation": {
                "level": self.isolation.level.value,
                "waived": sorted(self.isolation.waived),
                "warnings": self.isolation.warnings(),
            },
            "notes": self.notes,
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """Where to look, and as whom; by default here."""

    root: Path = Path("/")
    """The directory that holds `proc`, `run` and `.dockerenv`."""
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    release: str = field(default_factory=platform.release)
    architecture: str = field(default_factory=platform.machine)
    user_id: int = field(default_factory=os.geteuid)


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of starting a jail and a worker: an `error`, or what the worker saw."""

    error: SandboxError | None = None
    landlock_abi: int = 0
    seen: Mapping[str, Any] = field(default_factory=dict)
    no_answer: str = ""
    """How the worker's call ended, if not with an answer."""

    @property
    def has_started(self) -> bool:
        return self.error is None

    @property
    def lacks_namespaces(self) -> bool:
        return isinstance(self.error, IsolationError) and self.error.layer in NAMESPACE_LAYERS


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the rows are made from."""

    machine: Machine
    isolation: Isolation
    support: CgroupSupport
    trial: Trial
    cgroup_error: SandboxError | None = None
    """Why a start with control groups failed; `trial` is then one without."""
    own_namespaces: Mapping[str, str] = field(default_factory=dict)
    own_root: int = -1


class Row(NamedTuple):
    state: State
    text: str
    remedy: str = ""


def examine(isolation: Isolation | None = None, machine: Machine | None = None) -> Report:
    """Look at everything. No exception for a strange machine: what cannot be seen is a row."""
    evidence = gather(isolation or Isolation(), machine or Machine())
    return Report(evidence.isolation, notes(evidence), findings(evidence))


def gather(isolation: Isolation, machine: Machine) -> Evidence:
    """Detect control groups and start a jail; without groups, if that is all that is missing."""
    try:
        support = detect(proc=machine.root / "proc" / "self", environ=machine.environ)
    except Exception as error:  # of a strange machine
        support = CgroupSupport(0, reason=str(error), remedy="See cgroups(7).")
    cgroup_error = None
    trial = try_jail(isolation)
    if isinstance(trial.error, IsolationError) and trial.error.layer in _CGROUP_LAYERS:
        cgroup_error = trial.error
        trial = try_jail(replace(isolation, waived=isolation.waived | {Waivable.CGROUP}))
    return Evidence(
        machine,
        isolation,
        support,
        trial,
        cgroup_error,
        _own_namespaces(),
        os.stat("/").st_dev,
    )


def _own_namespaces() -> dict[str, str]:
    found = {}
    for kind in _NAMESPACES:
        with contextlib.suppress(OSError):
            found[kind] = os.readlink(f"/proc/self/ns/{kind}")
    return found


def try_jail(isolation: Isolation) -> Trial:
    """Start a jail and a worker, and have the worker look at itself."""
    try:
        with tempfile.TemporaryDirectory(prefix="atp-doctor-") as directory:
            return _look_inside(isolation, Path(directory))
    except SandboxError as error:
        return Trial(error)
    except Exception as error:  # of a strange machine: no temporary directory, no /proc
        name = type(error).__name__
        return Trial(SandboxError("No jail could be started.", cause=f"{name}: {error}", tip=_BUG))


def _look_inside(isolation: Isolation, directory: Path) -> Trial:
    # Closed to the toolkit by its isolation alone.
    directory.chmod(0o755)
    kit, file = directory / "doctor.py", directory / "of-this-machine"
    kit.write_text(_PROBE)
    file.write_text("")
    file.chmod(0o644)
    with contextlib.ExitStack() as stack:
        port = 0
        with contextlib.suppress(OSError):  # a machine without a loopback
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            port = server.getsockname()[1]
        # Without a filter it would fork, and a process that is left behind ends a jail.
        params = {"file": str(file), "port": port, "fork": isolation.has_seccomp}
        settings = ToolkitSettings("doctor", kit, isolation=isolation)
        single = stack.enter_context(SingleToolkit(settings))
        (tool,) = single.discovery.registrations
        outcome, _ = single.call(tool, json.dumps(params).encode(), None)
        return _trial(single.landlock_abi, outcome)


def _trial(landlock_abi: int, outcome: Outcome) -> Trial:
    if not isinstance(outcome, Success):
        return Trial(landlock_abi=landlock_abi, no_answer=f"{outcome.kind}: {outcome.error}")
    return Trial(landlock_abi=landlock_abi, seen=json.loads(outcome.result_json))


# -- from evidence to rows -------------------------------------------------------------------------


def notes(evidence: Evidence) -> list[str]:
    """What is degraded or waived, a sentence each."""
    found = evidence.isolation.warnings()
    if evidence.isolation.may_use_cgroups and _cgroup(evidence).state is State.WARN:
        found.append(f"no control group can be written: {WITHOUT[Waivable.CGROUP]}")
    return found


def findings(evidence: Evidence) -> list[Finding]:
    """The rows of all groups."""
    found = []
    for id_, look in _rows_for(evidence.trial):
        try:
            row = look(evidence)
        except Exception as error:  # of a strange machine
            row = Row(State.SKIP, f"Could not be looked at: {error}")
        group = id_.partition(".")[0].title()
        found.append(Finding(id_, group, row.state, row.text, row.remedy))
    return found


def _rows_for(trial: Trial) -> Iterator[tuple[str, Callable[[Evidence], Row]]]:
    yield from _ALWAYS
    if trial.no_answer:
        yield "jail.worker", _worker
    elif trial.has_started:
        yield from _WITH_A_WORKER


# -- system ----------------------------------------------------------------------------------------


def _kernel(evidence: Evidence) -> Row:
    machine, isolation = evidence.machine, evidence.isolation
    text = f"Linux {machine.release}"
    oldest, why = (5, 3), "pidfd_open"
    if isolation.has_namespaces:
        oldest, why = (5, 12), "mount_setattr"
    if isolation.has_landlock:
        oldest, why = (5, 13), "Landlock"
    version = _version(machine.release)
    if version is None:
        return Row(State.SKIP, f"{text}: no version that we understand")
    if version >= oldest:
        return Row(State.OK, text)
    needed = f"Linux {oldest[0]}.{oldest[1]} or later is needed ({why})."
    if evidence.trial.has_started:
        return Row(State.OK, f"{text}: old, but it has what is needed")
    return Row(State.FAIL, text, needed)


def _version(release: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else None


def _architecture(evidence: Evidence) -> Row:
    name = evidence.machine.architecture
    if name in MACHINES or evidence.trial.has_started:
        return Row(State.OK, name)
    supported = " or ".join(MACHINES)
    return Row(State.FAIL, f"{name}: its system calls are not known here", f"Use {supported}.")


def _python(_: Evidence) -> Row:
    version = ".".join(str(n) for n in sys.version_info[:3])
    return Row(State.OK, f"{platform.python_implementation()} {version}, {sys.executable}")


def _user(evidence: Evidence) -> Row:
    if evidence.machine.user_id != 0:
        return Row(State.OK, "An ordinary user: jails have the same user id outside")
    if not evidence.isolation.is_confined:
        return Row(State.OK, "root, and so is the toolkit's code")
    return Row(State.OK, "root: each jail gets a user id of its own")


def find_container(machine: Machine) -> str:
    """What kind of container we seem to be in; empty if in none that shows."""
    if "KUBERNETES_SERVICE_HOST" in machine.environ:
        return "Kubernetes"
    if _exists(machine.root / "run" / ".containerenv"):
        return "Podman"
    if _exists(machine.root / ".dockerenv"):
        return "Docker"
    name = machine.environ.get("container", "")
    return {"docker": "Docker", "podman": "Podman"}.get(name, name)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _container(evidence: Evidence) -> Row:
    kind = find_container(evidence.machine)
    if not kind:
        return Row(State.OK, "Not inside a container, as far as can be seen")
    if not (evidence.isolation.has_namespaces and evidence.trial.lacks_namespaces):
        return Row(State.OK, f"Inside a container ({kind})")
    text = f"Inside a container ({kind}) that refuses what a jail is made of"
    return Row(State.WARN, text, f"{_container_settings(kind)}\nOr: {_OTHER_LEVEL}")


_CALLS = f"{', '.join(NEEDED_CALLS[:-1])} and {NEEDED_CALLS[-1]}"
_PROFILE = f"with a seccomp profile that allows what the usual one does, and also {_CALLS}"
_DOCKER = f"""Start the container as an ordinary user, {_PROFILE}, and with /proc as it is:
  docker run --user 1000 \\
    --security-opt seccomp=PROFILE.json \\
    --security-opt apparmor=unconfined \\
    --security-opt systempaths=unconfined IMAGE"""
_PODMAN = f"""Start the container as an ordinary user, {_PROFILE}, and with /proc as it is:
  podman run --user 1000 \\
    --security-opt seccomp=PROFILE.json \\
    --security-opt apparmor=unconfined \\
    --security-opt label=disable \\
    --security-opt unmask=ALL IMAGE"""
_KUBERNETES = f"""Kubernetes 1.33 or later: start the container as an ordinary user, {_PROFILE}, \
and with /proc as it is. In the pod's spec:
  hostUsers: false
In the container's:
  securityContext:
    runAsUser: 1000
    procMount: Unmasked
    appArmorProfile: {{type: Unconfined}}
    seccompProfile: {{type: Localhost, localhostProfile: PROFILE.json}}"""


def _container_settings(kind: str) -> str:
    """What it has to be started with.

    The defaults are in moby/profiles and containers/common: filters that ask for CAP_SYS_ADMIN,
    AppArmor's `deny mount`. Where /proc is masked, or /proc/sys read-only, no other can be mounted.
    """
    known = {"Docker": _DOCKER, "Podman": _PODMAN, "Kubernetes": _KUBERNETES}
    return known.get(kind, f"It has to allow {_CALLS}, and to mount /proc anew.")


class _Sysctl(NamedTuple):
    name: str
    limiting: int
    """The value that keeps an unprivileged process from user namespaces."""
    setting: str
    """What to set it to instead."""
    whose: str


_APPARMOR = _Sysctl("kernel.apparmor_restrict_unprivileged_userns", 1, "0", "AppArmor's")
_USERNS = _Sysctl("kernel.unprivileged_userns_clone", 0, "1", "Debian's")
_MAX_USERNS = _Sysctl("user.max_user_namespaces", 0, "15000", "The")


def _user_namespaces(sysctl: _Sysctl) -> Callable[[Evidence], Row]:
    """A row for one of the limits that are easy to miss."""

    def look(evidence: Evidence) -> Row:
        if not evidence.isolation.has_namespaces:
            level = evidence.isolation.level
            return Row(State.SKIP, f"Not needed: isolation {level} uses no namespaces")
        path = evidence.machine.root / "proc" / "sys" / sysctl.name.replace(".", "/")
        try:
            value = int(path.read_text())
        except FileNotFoundError:
            return Row(State.OK, f"{sysctl.name} is absent")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            return Row(State.SKIP, f"{sysctl.name} cannot be read: {reason}")
        shown = f"{sysctl.name} = {value}"
        if value != sysctl.limiting:
            return Row(State.OK, shown)
        if evidence.trial.has_started:
            return Row(State.OK, f"{shown}: a limit, but not on us")
        # For root too: by then a jail's builder has become an unprivileged user.
        text = f"{sysctl.whose} limit on user namespaces, which jails of root need too: {shown}"
        state = State.FAIL if evidence.trial.lacks_namespaces else State.WARN
        return Row(state, text, _sysctl_remedy(sysctl, evidence.machine))

    return look


def _sysctl_remedy(sysctl: _Sysctl, machine: Machine) -> str:
    where = ", on the host of the container" if find_container(machine) else ""
    remedy = (
        f"As root{where}, and in a file in /etc/sysctl.d to keep it:\n"
        f"  sysctl -w {sysctl.name}={sysctl.setting}"
    )
    if sysctl is _APPARMOR and not where:
        remedy += (
            "\nOr for this interpreter alone, with a profile in /etc/apparmor.d/atp-sandbox, "
            "loaded by apparmor_parser -r:\n"
            "  abi <abi/4.0>,\n"
            "  include <tunables/global>\n"
            f"  profile atp-sandbox {os.path.realpath(sys.executable)} flags=(unconfined) {{\n"
            "    userns,\n"
            "  }"
        )
    return remedy


# -- limits ----------------------------------------------------------------------------------------


def _cgroup(evidence: Evidence) -> Row:
    support, isolation = evidence.support, evidence.isolation
    without = WITHOUT[Waivable.CGROUP]
    if not isolation.may_use_cgroups:
        return Row(State.SKIP, f"Control groups were waived: {without}")
    if evidence.cgroup_error is not None and support.is_usable:
        error = evidence.cgroup_error
        text = f"Control groups were refused: {error.message}: {error.cause}"
        return Row(State.FAIL, text, _WAIVE_CGROUP)
    if support.is_usable:
        names = ", ".join(support.controllers)
        return Row(State.OK, f"Control groups, version {support.version}: {names}")
    if isolation.requires_cgroups(is_root=evidence.machine.user_id == 0):
        text = f"No writable control group, which root must have: {support.reason}"
        return Row(State.FAIL, text, f"{support.remedy}\n{_WAIVE_CGROUP}")
    return Row(
        State.WARN, f"No writable control group ({support.reason}): {without}", support.remedy
    )


def _moves(evidence: Evidence) -> Row:
    support, machine = evidence.support, evidence.machine
    if not evidence.isolation.may_use_cgroups or not support.is_usable:
        return Row(State.SKIP, "Not needed: there are no control groups to move into")
    version = _version(machine.release)
    if not support.moves_block or version is None or version < _FIRST_BLOCKING_KERNEL:
        return Row(State.OK, "Moves into a group do not wait for the kernel")
    faster = "100 times faster, while forks and exits get a little slower: "
    if support.version == 2:
        faster += "as root\n  mount -o remount,favordynmods /sys/fs/cgroup"
    else:
        faster += "on the kernel's command line (Linux 6.7 or later)\n  cgroup_favordynmods=true"
    return Row(State.OK, "A move into a group takes 10 ms; made ahead of need", faster)


# -- jail ------------------------------------------------------------------------------------------


def _start(evidence: Evidence) -> Row:
    error = evidence.trial.error
    if error is not None:
        remedy = error.tip or _BUG
        if evidence.trial.lacks_namespaces and _OTHER_LEVEL not in remedy:
            remedy += f"\nOr, inside a container: {_OTHER_LEVEL}"
        return Row(State.FAIL, f"{error.message} {error.cause}".rstrip(), remedy)
    if not evidence.isolation.is_confined:
        return Row(State.OK, "A worker was started, as a plain process")
    return Row(State.OK, "A jail was started and verified")


def _worker(evidence: Evidence) -> Row:
    return Row(State.FAIL, f"A worker did not answer: {evidence.trial.no_answer}", _BUG)


def _holds(holds: bool | None, claim: str) -> Row:
    """What was seen of a worker; None if the kernel did not say."""
    if holds is None:
        return Row(State.SKIP, f"The kernel does not say whether a worker {claim}")
    if holds:
        return Row(State.OK, f"A worker {claim}")
    return Row(State.FAIL, f"It does not hold that a worker {claim}", _BUG)


def _refused(attempt: str, errno_name: str | None) -> Row:
    """What a worker tried. None: it could not be tried; empty: it was done."""
    if errno_name is None:
        return Row(State.SKIP, f"A worker could not try to {attempt}")
    if errno_name:
        return Row(State.OK, f"A worker that tried to {attempt} was refused: {errno_name}")
    return Row(State.FAIL, f"A worker that tried to {attempt} was not refused", _BUG)


def _not_needed(evidence: Evidence, layer: Waivable | None, is_on: bool) -> Row | None:
    """The row for what is not asked for; None if it is."""
    if is_on:
        return None
    if layer in evidence.isolation.waived:
        assert layer is not None
        return Row(State.SKIP, f"Waived: {WITHOUT[layer]}")
    return Row(State.SKIP, f"Not used at isolation {evidence.isolation.level}")


def _namespaces(evidence: Evidence) -> Row:
    theirs, ours = evidence.trial.seen["namespaces"], evidence.own_namespaces
    shared = [kind for kind, link in ours.items() if theirs.get(kind, link) == link]
    if not ours:
        return _holds(None, "has namespaces of its own")
    if shared:
        text = f"A worker shares namespaces with this machine: {', '.join(shared)}"
        return Row(State.FAIL, text, _BUG)
    return Row(State.OK, f"A worker has namespaces of its own: {', '.join(theirs)}")


def _pid(evidence: Evidence) -> Row:
    theirs, ours = evidence.trial.seen["namespaces"].get("pid"), evidence.own_namespaces.get("pid")
    holds = None if theirs is None or ours is None else theirs != ours
    return _holds(holds, "has a PID namespace of its own")


def _root(evidence: Evidence) -> Row:
    seen = evidence.trial.seen
    holds = seen["root"] != evidence.own_root and not seen["others"]
    return _holds(holds, "has a root directory of its own, in which no other call has a name")


def _capabilities(evidence: Evidence) -> Row:
    seen = evidence.trial.seen
    had, refusal = seen["capabilities"], seen["tried"]["unshare"]
    if had is None:
        return _refused("make a user namespace, and with it capabilities,", refusal)
    return _holds(not had and refusal != "", "has no capability, and no user namespace to get any")


def _no_new_privs(evidence: Evidence) -> Row:
    value = evidence.trial.seen["no_new_privs"]
    return _holds(None if value is None else value == 1, "has no_new_privs set")


def _seccomp(evidence: Evidence) -> Row:
    value = evidence.trial.seen["seccomp"]
    return _holds(None if value is None else value == 2, "has its system calls filtered (mode 2)")


def _landlock(evidence: Evidence) -> Row:
    abi = evidence.trial.landlock_abi
    missing = [f for f in substitutes(abi) if f.standing is not Standing.WAIVABLE]
    if not missing:
        return Row(State.OK, f"Landlock, ABI {abi}")
    names = ", ".join(f"{feature.name} (Linux {feature.since_kernel})" for feature in missing)
    return Row(State.OK, f"Landlock, ABI {abi}; other layers stand in for {names}")


def _file(evidence: Evidence) -> Row:
    return _refused("open a file of this machine", evidence.trial.seen["tried"]["file"])


def _network(evidence: Evidence) -> Row:
    refusal = evidence.trial.seen["tried"].get("connect")
    return _refused("connect to a port of this machine", refusal)


def _processes(evidence: Evidence) -> Row:
    return _refused("fork", evidence.trial.seen["tried"].get("fork"))


def _if(
    is_on: Callable[[Isolation], bool],
    look: Callable[[Evidence], Row],
    layer: Waivable | None = None,
) -> Callable[[Evidence], Row]:
    """`look`, where that is asked for; else a row that says why not."""
    return lambda evidence: (
        _not_needed(evidence, layer, is_on(evidence.isolation)) or look(evidence)
    )


_ALWAYS: tuple[tuple[str, Callable[[Evidence], Row]], ...] = (
    ("system.kernel", _kernel),
    ("system.machine", _architecture),
    ("system.python", _python),
    ("system.user", _user),
    ("system.container", _container),
    ("system.apparmor", _user_namespaces(_APPARMOR)),
    ("system.userns", _user_namespaces(_USERNS)),
    ("system.max_userns", _user_namespaces(_MAX_USERNS)),
    ("limits.cgroup", _cgroup),
    ("limits.moves", _moves),
    ("jail.start", _start),
)
_WITH_A_WORKER: tuple[tuple[str, Callable[[Evidence], Row]], ...] = (
    ("jail.namespaces", _if(lambda i: i.has_namespaces, _namespaces)),
    ("jail.pid", _if(lambda i: i.has_namespaces, _pid)),
    ("jail.root", _if(lambda i: i.has_namespaces, _root)),
    ("jail.capabilities", _if(lambda i: i.is_confined, _capabilities)),
    ("jail.no_new_privs", _if(lambda i: i.is_confined, _no_new_privs)),
    ("jail.seccomp", _if(lambda i: i.has_seccomp, _seccomp, Waivable.SECCOMP)),
    ("jail.landlock", _if(lambda i: i.has_landlock, _landlock, Waivable.LANDLOCK)),
    ("jail.files", _if(lambda i: i.is_confined, _file)),
    ("jail.network", _if(lambda i: i.is_confined, _network)),
    ("jail.processes", _if(lambda i: i.has_seccomp, _processes, Waivable.SECCOMP)),
)
