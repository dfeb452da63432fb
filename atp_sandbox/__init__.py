"""Run other people's ATP toolkits safely: every call in an isolated process of its own.

The public names load on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atp_sandbox.client import ToolKitClient as ToolKitClient
    from atp_sandbox.errors import SandboxError as SandboxError
    from atp_sandbox.limits import Limits as Limits

__version__ = "0.1.0"

_PUBLIC = {
    "Limits": "atp_sandbox.limits",
    "SandboxError": "atp_sandbox.errors",
    "ToolKitClient": "atp_sandbox.client",
}

__all__ = ["Limits", "SandboxError", "ToolKitClient", "__version__"]


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
