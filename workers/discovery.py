"""What a toolkit registered: the clients it made, the tools they carry, and how its script ended.

Filled by `atp_sdk` while the toolkit is imported, reported once as JSON, then read by every call.

    report = {"ended": "start" | "end" | "interrupted", "threads": int, "processes": int,
              "clients": [{"api_key", "app_name", "base_url", "started", "stopped"}, …],
              "tools": [{"client", "name", "params", "required", "description", "auth_provider",
                         "auth_type", "auth_with", "source", "needs_token"}, …]}

`client` is an index into `clients`; tools stand in the order of registration, repeated names
included. The supervisor believes none of it: each value is checked again outside.
"""

from __future__ import annotations

import inspect
import os
import threading
import time
from typing import Any, Callable

_SETTLE_S = 0.5


class Registration:
    """One `register_tool`, with the function it decorated."""

    __slots__ = ("auth_with", "description", "function", "passes")

    def __init__(
        self, function: Callable[..., Any], auth_with: str | None, description: dict[str, Any]
    ) -> None:
        self.function = function
        self.auth_with = auth_with
        self.description = description
        self.passes = _accepted_names(function)


class Registry:
    """All registrations of one toolkit, in order."""

    def __init__(self) -> None:
        self.clients: list[dict[str, Any]] = []
        self.registrations: list[Registration] = []
        self.on_registered: Callable[[], None] = lambda: None
        """Called after each registration and each start() outside the main thread."""
        self.on_start: Callable[[int], None] = lambda _client: None
        """Called by start() in the main thread; returns only after that client's stop()."""
        self.on_stop: Callable[[int], None] = lambda _client: None

    def add_client(self, api_key: str, app_name: str, base_url: str) -> int:
        self.clients.append(
            {
                "api_key": api_key,
                "app_name": app_name,
                "base_url": base_url,
                "started": False,
                "stopped": False,
            }
        )
        return len(self.clients) - 1

    def add_tool(
        self, client: int, function: Callable[..., Any], source: str, described: dict[str, Any]
    ) -> None:
        description = {"client": client, "source": source, **described}
        registration = Registration(function, described["auth_with"], description)
        description["needs_token"] = registration.passes.get("auth_token") is True
        self.registrations.append(registration)
        self.on_registered()

    def report(self, ended: str) -> dict[str, Any]:
        return {
            "ended": ended,
            "threads": _settled_threads(),
            "processes": _child_processes(),
            "clients": self.clients,
            "tools": [entry.description for entry in self.registrations],
        }


registry = Registry()


def _accepted_names(function: Callable[..., Any]) -> dict[str, bool]:
    """Which names `function` takes by keyword, and whether each must be given.

    `**` stands for any name. A function whose signature cannot be read takes anything.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {"**": False}
    accepted = {}
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            accepted["**"] = False
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            accepted[parameter.name] = parameter.default is parameter.empty
    return accepted


def _settled_threads() -> int:
    """Threads of this process by the kernel's count, after those that are ending had their time."""
    deadline = time.monotonic() + _SETTLE_S
    while True:
        count = len(os.listdir("/proc/self/task"))
        if count == 1 or time.monotonic() > deadline:
            return count
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(0.01)
                break
        else:
            time.sleep(0.01)


def _child_processes() -> int:
    """Processes that the import started and that still live (proc(5))."""
    count = 0
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children", encoding="ascii") as file:
            count += len(file.read().split())
    return count
