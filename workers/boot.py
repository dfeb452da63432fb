"""Entry of a jail: `python -I -S -B boot.py PLAN_FD`, run by the supervisor with bare descriptors.

Loads this package under a private name, so that a toolkit's own `workers.py` is its own; takes
everything of ours into memory while its files can still be reached; builds the jail; becomes, in a
child that is the supervisor's own, the jail's first process: the warden. Each step that fails is
named on the warden's channel and ends this process.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys

PRIVATE_NAME = "_atp_jail"
_MODULES = (
    "confinement.huge_pages",
    "confinement.landlock",
    "confinement.layers",
    "confinement.listeners",
    "confinement.namespaces",
    "confinement.privileges",
    "confinement.root",
    "confinement.scratch",
    "confinement.seccomp",
    "confinement.syscalls",
    "frames",
    "atp_sdk.clients",
    "discovery",
    "stdio",
    "proxy",
    "call",
    "zygote",
    "warden",
)


def _load_package(msgpack_path: str) -> None:
    """Import all of ours as `_atp_jail.*` and leave no other trace in `sys.modules`."""
    directory = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.util.spec_from_file_location(
        PRIVATE_NAME,
        os.path.join(directory, "__init__.py"),
        submodule_search_locations=[directory],
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PRIVATE_NAME] = package
    spec.loader.exec_module(package)
    # Before anything that takes long: whoever stops us now is to keep nothing here for ever.
    importlib.import_module(f"{PRIVATE_NAME}.confinement.privileges").die_with_parent()
    sys.path.append(msgpack_path)
    for name in _MODULES:
        importlib.import_module(f"{PRIVATE_NAME}.{name}")
    sys.path.remove(msgpack_path)
    # A toolkit may bring a `msgpack` of its own; ours stays where only we refer to it.
    for name in [n for n in sys.modules if n == "msgpack" or n.startswith("msgpack.")]:
        del sys.modules[name]


def main() -> None:
    plan_fd = int(sys.argv[1])
    with open(plan_fd, encoding="utf-8") as file:
        plan = json.load(file)
    # A locale or signal set-up of the supervisor's terminal has no business in here.
    os.umask(0o022)
    _load_package(plan["msgpack_path"])
    sys.modules[PRIVATE_NAME + ".warden"].start(plan)


if __name__ == "__main__":
    main()
