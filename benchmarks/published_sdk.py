"""The published SDK 0.1.0 in its own process, with its logging off."""

from __future__ import annotations

from pathlib import Path

from benchmarks.faults import published_sdk_python

_TOOLKIT = Path(__file__).with_name("published_toolkit.py")


def command(url: str, work: str = "echo") -> list[str]:
    """What to run, with PYTHONPATH empty; exits if the SDK is not installed.

    All tools are there, whatever the work is.
    """
    return [published_sdk_python(), str(_TOOLKIT), url]


def missing() -> str:
    """How to install the SDK; empty if it is there."""
    try:
        published_sdk_python()
    except SystemExit as refusal:
        return str(refusal)
    return ""
