"""The drop-in for the published `atp_sdk`: the same names, without network, key or thread."""

from .clients import ToolKitClient

__all__ = ["ToolKitClient"]
