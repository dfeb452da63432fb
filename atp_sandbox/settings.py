"""What `serve` is asked to do, as values: the command line and the configuration both end here."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from atp_sandbox.isolation import Isolation
from atp_sandbox.limits import MIB, Limits
from atp_sandbox.policy import EgressPolicy, Reroute

RESERVED_ENV = frozenset({"ATP_API_KEY"})
"""What toolkits read the key from: a jail gets a placeholder, and no operator may set it."""


class LifetimeKind(StrEnum):
    CALL = "call"
    CALLS = "calls"
    JAIL = "jail"


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How long the process lives that serves a call; see ARCHITECTURE.md, "Lifetimes"."""

    kind: LifetimeKind = LifetimeKind.CALL
    calls: int = 1
    """Calls one process serves before it is replaced; more than 1 only for `calls`."""

    def __str__(self) -> str:
        return f"calls:{self.calls}" if self.kind is LifetimeKind.CALLS else self.kind.value


def parse_lifetime(text: str) -> Lifetime:
    """`call`, `calls:N` (1 ≤ N ≤ 1,000,000) or `jail`; ValueError says so."""
    kind, _, count = text.partition(":")
    if text in ("call", "jail"):
        return Lifetime(LifetimeKind(text))
    if kind == "calls" and count.isascii() and count.isdigit() and 1 <= int(count) <= 1_000_000:
        return Lifetime(LifetimeKind.CALLS, int(count))
    raise ValueError(
        f"{text!r} is no lifetime; write call, calls:N (for example calls:100) or jail"
    )


@dataclass(frozen=True, slots=True)
class ToolkitSettings:
    """One toolkit, as the operator wants it served."""

    name: str
    """Shown in logs and answers; unique within one `serve`."""
    path: Path
    """The Python file or the folder."""
    data: tuple[Path, ...] = ()
    """Files and folders that a single-file toolkit needs beside itself."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of the jail; not for secrets."""
    limits: Limits = field(default_factory=Limits)
    lifetime: Lifetime = field(default_factory=Lifetime)
    isolation: Isolation = field(default_factory=Isolation)
    may_start_programs: bool = False
    """Needs lifetime `jail`: no other process of another call is then in reach."""

    egress: EgressPolicy = field(default_factory=EgressPolicy)
    """What it may reach; nothing by default."""

    def __post_init__(self) -> None:
        if self.may_start_programs and self.lifetime.kind is not LifetimeKind.JAIL:
            raise ValueError("subprocess needs the lifetime jail: each call then has its own")
        if self.egress.allowed and not self.isolation.has_namespaces:
            raise ValueError(
                f"egress needs isolation strict: at {self.isolation.level} a toolkit has no "
                "network of its own in which hosts could be allowed"
            )


@dataclass(frozen=True, slots=True)
class BackendSettings:
    """Where to connect and as whom; None means: not said by the operator."""

    api_key: str | None = field(default=None, repr=False)
    api_key_file: str | None = None
    """Where the key was read from, if that was a file."""
    base_url: str | None = None
    app_name: str | None = None
    as_written: bool = False
    """Use the keys and addresses that the toolkits name."""
    ws_path: str = "0.2"
    """SDK generation of the websocket path and registration body: `0.1` or `0.2`."""
    send_source: bool = True
    sample_responses: bool = False
    only_client: int | None = None
    """Serve one client of the toolkit, by its place among them: how the library serves each."""


class JournalMode(StrEnum):
    """What becomes of calls whose journal cannot be written."""

    ON = "on"
    """They are served without it, and the log says so."""
    REQUIRED = "required"
    """They are answered `unavailable`; without a journal there is no start."""
    OFF = "off"


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """What is said of one `serve` as a whole: `[serve]` of the configuration."""

    journal: JournalMode = JournalMode.ON
    grace_s: float | None = None
    """From a request to stop to the end; None: as long as the longest call may take."""
    reloads: bool = False
    """Take over changes of toolkits' files while serving."""
    queue: int = 4_096
    """Calls of all toolkits that wait; more are answered `overloaded`."""
    queue_bytes: int = 64 * MIB
    """Their parameters, in bytes of JSON."""


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """All of one `serve`."""

    toolkits: tuple[ToolkitSettings, ...]
    backend: BackendSettings
    state_dir: Path
    log_format: str = "text"
    reroutes: tuple[Reroute, ...] = ()
    options: ServeOptions = field(default_factory=ServeOptions)
    config_path: Path | None = None
    """Where all this was read from, if that was a file."""
    learns_egress: bool = False
    """Say at the end which lines would allow what was refused."""
