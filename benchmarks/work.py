"""What every system under test is given to do: `echo`, `sleep:SECONDS` or `cpu:SECONDS`."""

from __future__ import annotations

import time
from collections.abc import Callable

VALUE = "x" * 300


def echo(value: object) -> object:
    return value


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def cpu(seconds: float) -> float:
    """Burn so many seconds of this process's own time."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass
    return seconds


def parse(work: str) -> tuple[Callable[..., object], object]:
    """The function and its argument, which is also the right answer."""
    name, _, seconds = work.partition(":")
    if name == "echo":
        return echo, VALUE
    if name not in ("sleep", "cpu"):
        raise ValueError(f"no such work: {work!r}; there is echo, sleep:SECONDS, cpu:SECONDS")
    return {"sleep": sleep, "cpu": cpu}[name], float(seconds or 0.01)
