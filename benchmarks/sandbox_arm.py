"""The sandbox as a system under test: `serve` with options, over toolkits written for it."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.peer import Peer

QUEUE = "1024"
"""Calls that may wait: the default of 256 leaves no tool room for 256 at once."""
TOOLKIT = """
import os
import time

from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="x", app_name="benchmark{suffix}")
BALLAST = b"x" * ({megabytes} << 20)


@client.register_tool("echo{suffix}", ["value"], [], "d", None, None, None)
def echo(value=None, **_):
    return value


@client.register_tool("sleep{suffix}", ["seconds"], [], "d", None, None, None)
def sleep(seconds=0, **_):
    time.sleep(seconds)
    return seconds


@client.register_tool("cpu{suffix}", ["seconds"], [], "d", None, None, None)
def cpu(seconds=0, **_):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds


@client.register_tool("crash{suffix}", [], [], "d", None, None, None)
def crash(**_):
    os.abort()


@client.register_tool("memory{suffix}", [], [], "d", None, None, None)
def memory(**_):
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


client.start()
"""


def write_toolkit(folder: Path, suffix: str = "", megabytes: int = 0) -> Path:
    """`suffix` ends the names of its tools; `megabytes` of ballast are in its memory."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kit{suffix}.py"
    path.write_text(TOOLKIT.format(suffix=suffix, megabytes=megabytes))
    return path


def sandbox(
    folder: Path, lifetime: str, *options: str, toolkits: int = 1, megabytes: int = 0
) -> Peer:
    """A `serve` of its own state; with several toolkits, tools are `echo_0`, `echo_1` and so on."""
    suffixes = [f"_{number}" for number in range(toolkits)] if toolkits > 1 else [""]
    kits = [str(write_toolkit(folder, suffix, megabytes)) for suffix in suffixes]

    def command(url: str) -> list[str]:
        return [
            *(sys.executable, "-m", "atp_sandbox", "serve", *kits, "--base-url", url),
            *("--lifetime", lifetime, "--state-dir", str(folder / "state")),
            *("--queue", QUEUE, *options),
        ]

    return Peer(folder, command, ATP_API_KEY="benchmark")
