"""What of this machine a jail may see: found by looking, once per supervisor."""

from __future__ import annotations

import importlib.util
import os
import ssl
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from atp_sandbox.confinement.plan import HostView

_LIBRARIES = ("/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32")
_PROGRAMS = ("/usr/bin", "/usr/local/bin", "/usr/sbin", "/bin", "/sbin")
_ROOT_LINKS = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin")
_DATA = (
    "/etc/ca-certificates",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/mime.types",
    "/etc/pki/ca-trust/extracted",
    "/etc/pki/tls/certs",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/usr/share/ca-certificates",
    "/usr/share/zoneinfo",
)


@cache
def host_view() -> HostView:
    """The interpreter, its packages, shared libraries, certificates and time zones."""
    site_path = _site_directories()
    links = tuple((path, os.readlink(path)) for path in _ROOT_LINKS if os.path.islink(path))
    wanted = [
        os.path.realpath(sys.executable),
        *_interpreter_directories(),
        *site_path,
        *_LIBRARIES,
        *(path for path in _ROOT_LINKS if path not in _PROGRAMS and not os.path.islink(path)),
        *_DATA,
        *_certificates(),
    ]
    return HostView(
        read_only=tuple(path for path in wanted if os.path.exists(path)),
        symlinks=links,
        site_path=site_path,
        hidden=tuple(_own_code()),
        msgpack_path=_parent_of("msgpack"),
        executable=os.path.realpath(sys.executable),
        programs=tuple(p for p in _PROGRAMS if os.path.isdir(p) and not os.path.islink(p)),
    )


def _interpreter_directories() -> list[str]:
    names = ("stdlib", "platstdlib")
    found = [sysconfig.get_path(name) for name in names]
    # Inside a virtual environment `platstdlib` names a directory that holds no library.
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    found += [sysconfig.get_path(name, vars=base) for name in names]
    return [os.path.realpath(path) for path in found if os.path.isdir(path)]


def _site_directories() -> tuple[str, ...]:
    """Directories of installed packages on our own path, as they are spelled there."""
    return tuple(
        path
        for path in dict.fromkeys(sys.path)
        if os.path.basename(path) in ("site-packages", "dist-packages") and os.path.isdir(path)
    )


def _certificates() -> Iterator[str]:
    paths = ssl.get_default_verify_paths()
    for path in (paths.openssl_cafile, paths.openssl_capath):
        if path and os.path.exists(path):
            yield path


def _own_code() -> Iterator[str]:
    """Where our packages and their metadata are: those that run, and any other installed copy."""
    for package in ("atp_sandbox", "workers"):
        path = os.path.join(_parent_of(package), package)
        yield from {path, os.path.realpath(path)}
    for directory in map(Path, _site_directories()):
        yield from (str(path) for path in directory.glob("atp_sandbox*") if path.is_dir())
        # The other's name is a common one; whose package it is, is seen by its content.
        if (directory / "workers" / "warden.py").exists():
            yield str(directory / "workers")


def _parent_of(package: str) -> str:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is a dependency of ours"
    assert spec.origin is not None, f"{package} is a package with a file"
    return str(Path(spec.origin).absolute().parent.parent)
