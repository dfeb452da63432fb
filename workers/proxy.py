"""How code in a jail finds the way out: proxy variables, and clients that ignore them.

The variables hold a ticket by which connections of one worker are told from those of another. It
says who asks, not what may be reached: that is decided outside.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

_SEARCH_DOMAIN = b"LOCALDOMAIN"
"""resolv.conf(5): with it, a name that is not found is asked for once more, with our ticket."""


_names: list[bytes] = []
_variables: dict[bytes, bytes] = {}


def prepare(network: dict[str, Any] | None, number: int, ticket: str) -> None:
    """Put the ticket of worker `number` into Python's environment; 0 is the import's."""
    if network is None:
        return
    if not _names:
        _names.extend(map(str.encode, network["proxy_variables"]))
    url = f"http://worker-{number}:{ticket}@{network['proxy']}".encode()
    _variables.update(dict.fromkeys(_names, url))
    _variables[_SEARCH_DOMAIN] = f"worker-{number}-{ticket}".encode()
    environment: Any = os.environ
    environment._data.update(_variables)


def identify() -> None:
    """Have the C library's environment follow, in the process whose ticket it is.

    Not where it changes from worker to worker: setenv(3) never frees a value that it had.
    """
    for name, value in _variables.items():
        os.putenv(name, value)


def teach_clients() -> None:
    """aiohttp's client uses the variables only if told so: `trust_env` becomes its default."""
    sys.meta_path.insert(0, _AfterImport("aiohttp.client", _trust_environment))


def _trust_environment(module: types.ModuleType) -> None:
    defaults = getattr(module.ClientSession.__init__, "__kwdefaults__", None)
    if defaults and "trust_env" in defaults:
        defaults["trust_env"] = True


# Neither derives from the abstract classes of `importlib.abc`, whose module would bring a dozen
# others into every zygote.
class _AfterImport:
    """Runs `then(module)` once, after the module of that name was imported."""

    def __init__(self, name: str, then: Any) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: types.ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self._then)  # type: ignore[assignment]
        return spec


class _Followed:
    def __init__(self, loader: Any, then: Any) -> None:
        self._loader = loader
        self._then = then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # inspect and traceback ask for the source

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        module: types.ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)
