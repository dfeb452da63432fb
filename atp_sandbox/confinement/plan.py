"""What one jail consists of, as data: the plan that `workers` carries out step by step.

PURE: from what the machine has (`HostView`) and what the toolkit may do (`JailSpec`) to a JSON
object. The isolation level is decided on here; what reads the plan knows only steps to take.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from atp_sandbox.isolation import Isolation
from atp_sandbox.limits import Limits
from atp_sandbox.loopback import (
    DNS_ADDRESS,
    PROXY_ADDRESS,
    PROXY_PORT,
    address_of,
    names_past_proxy,
    ports_to_bind,
)
from atp_sandbox.policy import EgressPolicy

INSIDE_ID = 1000
JAIL_NAME = "jail"
MIN_LANDLOCK_ABI = 1
"""Linux 5.13. What a later one brings is substituted: see `landlock_features`."""
FIRST_SLOTS = 3
"""Mounted by the warden unasked: the import's, and two with which the layers are verified."""
RESTING_PROCESSES = 8
"""Warden, zygote, and those that build and verify the jail."""
SPARE_SLOTS = 4
"""Scratch slots beyond one a call and one forked ahead: those that are just being freed."""
_PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
_CERTIFICATES = "/etc/atp-sandbox/certificates.pem"
_CERTIFICATE_VARIABLES = (
    "SSL_CERT_FILE",  # OpenSSL, hence urllib, aiohttp, httpx
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
    "GIT_SSL_CAINFO",
    "NODE_EXTRA_CA_CERTS",
)


@dataclass(frozen=True, slots=True)
class HostView:
    """What of this machine a jail may see; found once by `jails.host`."""

    read_only: tuple[str, ...]
    """Existing absolute paths of files and directories, bound at their own place."""
    symlinks: tuple[tuple[str, str], ...]
    """(path, target) for directories that are links on this machine, such as /lib."""
    site_path: tuple[str, ...]
    """Directories of installed packages, appended to `sys.path`."""
    hidden: tuple[str, ...]
    """Paths inside `read_only` that a toolkit must not see: this project's own code."""
    msgpack_path: str
    """The directory from which `workers` imports msgpack."""
    executable: str
    """The interpreter, which is in `read_only` and becomes `sys.executable` inside."""
    programs: tuple[str, ...] = ()
    """Directories of programs, for toolkits that may start some."""


@dataclass(frozen=True, slots=True)
class ToolkitView:
    """The toolkit's side of a jail."""

    directory: str
    """Its snapshot."""
    entry: str
    """The file to run, relative to the snapshot."""
    package: str
    """The package it runs in; empty for a plain script."""
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class NetworkView:
    """A jail's way out, as it is seen from inside."""

    policy: EgressPolicy
    ticket: str
    """By which the import says who it is."""
    certificates: str
    """What it trusts, PEM; empty: what the machine trusts."""


@dataclass(frozen=True, slots=True)
class JailSpec:
    """One jail, as its toolkit's operator wants it."""

    toolkit: ToolkitView
    limits: Limits
    isolation: Isolation
    forks_workers: bool
    """Whether its zygote forks a worker for each call; else it serves one call itself."""
    may_start_programs: bool
    calls_per_worker: int
    directory: str
    """`strict`: an empty directory of the supervisor, on which every jail mounts its root in a
    namespace of its own. Else one that this jail makes, for scratch."""
    network: NetworkView | None = None
    """None: no way out, not even one that says no."""


def slot_count(limits: Limits, *, forks_workers: bool = True) -> int:
    """How many scratch slots a jail has: the import's, one for every worker, some to spare."""
    return 1 + 2 * limits.concurrency + SPARE_SLOTS if forks_workers else FIRST_SLOTS


def jail_processes(limits: Limits) -> int:
    """Processes and threads that a whole jail may have: its own few, and those of all its calls."""
    return RESTING_PROCESSES + 2 * limits.concurrency * limits.processes


def jail_plan(host: HostView, spec: JailSpec, *, outside_id: int | None) -> dict[str, object]:
    """The plan of one jail. `outside_id` is the unprivileged id a root supervisor gives it."""
    isolation, limits, toolkit = spec.isolation, spec.limits, spec.toolkit
    if isolation.has_namespaces:
        here, scratch = "/toolkit", "/scratch"
    else:
        here, scratch = toolkit.directory, spec.directory
    return {
        "outside_id": outside_id,
        "root": _root(host, spec) if isolation.has_namespaces else None,
        "directory": spec.directory,
        "scratch": {
            "directory": scratch,
            # A forked worker's root is a view of the jail's, in which no other slot has a name.
            "has_views": isolation.has_namespaces and spec.forks_workers,
            "bytes": limits.scratch_bytes,
            "files": limits.scratch_files,
            "first_slots": FIRST_SLOTS,
        },
        "is_confined": isolation.is_confined,
        "landlock": _landlock(host, spec, here, scratch) if isolation.has_landlock else None,
        "seccomp": _seccomp(spec) if isolation.has_seccomp else None,
        "rlimits": _resource_limits(spec, outside_id) if isolation.is_confined else {},
        "env": jail_environment(toolkit.env, f"{scratch}/0") | _network_variables(spec),
        "network": _network(spec),
        "ticket": "" if spec.network is None else spec.network.ticket,
        "toolkit_directory": here,
        "toolkit_path": [here, f"{here}/{toolkit.package}"] if toolkit.package else [here],
        "site_path": list(host.site_path),
        "entry": toolkit.entry,
        "package": toolkit.package,
        "msgpack_path": host.msgpack_path,
        "executable": host.executable,
        "calls_per_worker": spec.calls_per_worker,
        "reports_all_exits": not spec.may_start_programs,
        "output_bytes": limits.output_bytes,
    }


def _root(host: HostView, spec: JailSpec) -> dict[str, object]:
    """What the jail's root directory is put together from."""
    symlinks = [
        *host.symlinks,
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ]
    read_only = host.read_only
    if spec.may_start_programs:
        read_only += host.programs
        # Semaphores of multiprocessing are files there (sem_overview(7)).
        symlinks.append(("/dev/shm", "/scratch/0"))
    return {
        "directories": [
            "/dev",
            "/proc",
            "/tmp",
            "/toolkit",
            "/slots",
            # In a view there is only the import's scratch, and the worker's own.
            *(f"/scratch/{slot}" for slot in range(2 if spec.forks_workers else FIRST_SLOTS)),
        ],
        "symlinks": [{"path": path, "target": target} for path, target in symlinks],
        "binds": [
            *({"source": path, "target": path} for path in outermost(read_only)),
            {"source": spec.toolkit.directory, "target": "/toolkit"},
        ],
        "files": [{"path": path, "text": text} for path, text in _etc(spec.network).items()],
        "masks": [path for path in host.hidden if _is_under(path, read_only)],
    }


def _landlock(host: HostView, spec: JailSpec, here: str, scratch: str) -> dict[str, object]:
    """The oldest ABI that will do, and what may be read; None: the jail's whole root."""
    if spec.isolation.has_namespaces:
        return {"abi": MIN_LANDLOCK_ABI, "code": None, "scratch": scratch}
    read_only = host.read_only + (host.programs if spec.may_start_programs else ())
    return {"abi": MIN_LANDLOCK_ABI, "code": outermost((*read_only, here)), "scratch": scratch}


def _seccomp(spec: JailSpec) -> dict[str, object]:
    """The name of the zygote's profile, and whether there is a network namespace for sockets."""
    base = "lone"
    if spec.may_start_programs:
        base = "subprocess"
    elif spec.forks_workers:
        base = "zygote"
    return {"base": base, "sockets": spec.isolation.has_namespaces}


def _resource_limits(spec: JailSpec, outside_id: int | None) -> dict[str, int]:
    limits = spec.limits
    rlimits = {
        # Not 0, which a core dump that is piped to a program ignores; 1 forbids both: core(5).
        "core": 1,
        "nofile": limits.open_files,
        # The tmpfs bounds what is stored; this bounds what a sparse file may claim.
        "fsize": 4 * limits.scratch_bytes
        if spec.isolation.has_namespaces
        else limits.scratch_bytes,
        "memlock": 64 * 1024,
        "msgqueue": 0,
        "nice": 0,
        "rtprio": 0,
        "sigpending": 256,
    }
    if spec.isolation.has_namespaces or outside_id is not None:
        # Counts for the whole jail; what one call may have is its control group's matter. Without a
        # user of the jail's own, it would count what else this user runs.
        rlimits["nproc"] = jail_processes(limits)
    return rlimits


def jail_environment(extra: Mapping[str, str], scratch: str) -> dict[str, str]:
    """The whole environment of a toolkit; nothing of the supervisor's own is in it."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "USER": "sandbox",
        "LOGNAME": "sandbox",
        "ATP_API_KEY": "sandbox-placeholder",
    }
    # One thread each: a zygote with threads cannot be forked safely.
    for library in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "VECLIB_MAXIMUM"):
        environment[f"{library}_NUM_THREADS"] = "1"
    environment.update(extra)
    return environment


def outermost(paths: Iterable[str]) -> list[str]:
    """`paths` without those that another one contains, sorted."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not _is_under(path, kept):
            kept.append(path)
    return kept


def _is_under(path: str, directories: Sequence[str]) -> bool:
    return any(path == d or path.startswith(d.rstrip(os.sep) + os.sep) for d in directories)


def _network(spec: JailSpec) -> dict[str, object] | None:
    """What the warden binds, and which variables tell clients of the proxy."""
    if spec.network is None:
        return None
    return {
        "ports": ports_to_bind(spec.network.policy.ports),
        "proxy": f"{PROXY_ADDRESS}:{PROXY_PORT}",
        "proxy_variables": [name for name in _PROXY_VARIABLES if name not in spec.toolkit.env],
    }


def _network_variables(spec: JailSpec) -> dict[str, str]:
    """What does not differ from one worker to the next, and the operator did not set."""
    if spec.network is None:
        return {}
    policy = spec.network.policy
    patterns = [endpoint.host for endpoint in policy.allowed if endpoint.is_pattern]
    past = ",".join(names_past_proxy(policy.names, patterns))
    found = {"NO_PROXY": past, "no_proxy": past}
    if spec.network.certificates:
        found |= dict.fromkeys(_CERTIFICATE_VARIABLES, _CERTIFICATES)
    return {name: value for name, value in found.items() if name not in spec.toolkit.env}


def _etc(network: NetworkView | None) -> dict[str, str]:
    hosts = f"127.0.0.1 localhost {JAIL_NAME}\n::1 localhost\n"
    files = {
        "/etc/passwd": f"sandbox:x:{INSIDE_ID}:{INSIDE_ID}:sandbox:/scratch:/bin/false\n",
        "/etc/group": f"sandbox:x:{INSIDE_ID}:\n",
        "/etc/hostname": f"{JAIL_NAME}\n",
        "/etc/hosts": hosts,
        "/etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        "/etc/resolv.conf": "",
    }
    if network is not None:
        # With a final dot too: a C library looks for the very spelling that it was given.
        names = enumerate(network.policy.names)
        rows = [f"{address_of(i)} {name} {name}.\n" for i, name in names]
        files["/etc/hosts"] = hosts + "".join(rows)
        files["/etc/nsswitch.conf"] = files["/etc/nsswitch.conf"].replace(
            "hosts: files", "hosts: files dns"
        )
        # Asked for what is in no file; it answers that there is no such name. Over TCP, since
        # workers have no datagrams: resolv.conf(5).
        files["/etc/resolv.conf"] = (
            f"nameserver {DNS_ADDRESS}\noptions use-vc attempts:1 timeout:2\n"
        )
        if network.certificates:
            files[_CERTIFICATES] = network.certificates
    return files
