"""The supervisor's end of one jail's way out: its sockets, its tickets, what was refused to it."""

from __future__ import annotations

import secrets
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from atp_sandbox.egress import messages
from atp_sandbox.egress.authority import Authority
from atp_sandbox.outcome import Failure
from atp_sandbox.policy import EgressPolicy
from workers import frames

_KEY_BYTES = 32
_KEPT_DENIALS = 64
"""Of one jail: answers name a few, and a hostile tool makes any number."""
_TOLD_DENIALS = 8
"""In one answer."""


class Exit(Protocol):
    """What all jails share: the egress process, as `service` has it."""

    def open(self, network: JailNetwork) -> None:
        """Hand its sockets over; `network.opened()` follows."""

    def send(self, name: str, *values: frames.Value) -> None:
        """Tell the egress process, if there is one."""

    def authority(self, policy: EgressPolicy) -> Authority | None:
        """Whom jails of this policy trust beside the usual ones."""

    def catch_up(self) -> None:
        """Take in what the egress process has said already."""

    def forget_jail(self, network: JailNetwork) -> None:
        """Its jail has ended."""


@dataclass(frozen=True, slots=True)
class Denial:
    """A connection that was refused, as an answer names it."""

    at: float
    worker: int
    host: str
    port: int | None
    reason: str


def with_denials(failure: Failure, denials: Sequence[Denial]) -> Failure:
    """The failure, saying what was refused to its call; each thing once."""
    rows = [{"host": one.host, "port": one.port, "reason": one.reason} for one in denials]
    distinct = [row for i, row in enumerate(rows) if row not in rows[:i]]
    if not distinct:
        return failure
    return replace(failure, details={**failure.details, "denied": distinct[:_TOLD_DENIALS]})


class JailNetwork:
    """The way out of one jail; made before it, and closed with it."""

    def __init__(self, exit_: Exit, number: int, toolkit: str, policy: EgressPolicy):
        self._exit = exit_
        self.number = number
        self.toolkit = toolkit
        self.policy = policy
        self.key = secrets.token_bytes(_KEY_BYTES)
        self.listeners: list[socket.socket] = []
        self._denials: deque[Denial] = deque(maxlen=_KEPT_DENIALS)
        self._on_open: Callable[[], None] | None = None
        self._placeholders: dict[str, tuple[str, bytes]] = {}

    def ticket(self, worker: int) -> str:
        return messages.ticket(self.key, worker)

    def certificates(self) -> str:
        """What the jail trusts, PEM: ours and the usual ones; empty: what the machine does."""
        authority = self._exit.authority(self.policy)
        if authority is None:
            return ""
        return _usual_authorities() + authority.cert_pem.decode()

    def attach(self, listeners: Sequence[socket.socket], on_open: Callable[[], None]) -> None:
        """Take over a bound socket for each port; `on_open()` once they are accepted on.

        Also called at once if the egress process is being restarted: until it is back, connections
        are refused.
        """
        self.listeners = list(listeners)
        self._on_open = on_open
        self._exit.open(self)

    def opened(self) -> None:
        on_open, self._on_open = self._on_open, None
        if on_open is not None:
            on_open()

    def fill(self, provider: str, placeholder: str, token: bytes) -> None:
        """From now on `placeholder` stands for `token` at the hosts of `provider`."""
        self._placeholders[placeholder] = (provider, token)
        self._exit.send("fill", self.number, provider, placeholder, token)

    def forget(self, placeholder: str) -> None:
        """Its call has ended."""
        if self._placeholders.pop(placeholder, None) is not None:
            self._exit.send("forget", self.number, placeholder)

    @property
    def placeholders(self) -> Mapping[str, tuple[str, bytes]]:
        return self._placeholders

    def note(self, denial: Denial) -> None:
        self._denials.append(denial)

    def denied(self, worker: int, since: float) -> list[Denial]:
        """What was refused to `worker` since then: all that it asked for with its own ticket, and
        what somebody of this jail did with a host of the policy.
        """
        self._exit.catch_up()
        mine = (worker, messages.ANY_WORKER)
        return [one for one in self._denials if one.worker in mine and one.at >= since]

    def close(self) -> None:
        """Give the sockets back; safe to call again."""
        self._on_open = None
        self._placeholders.clear()
        self._exit.catch_up()  # what was refused may be told in an answer yet
        self._exit.forget_jail(self)
        for sock in self.listeners:
            sock.close()
        self.listeners.clear()


def _usual_authorities() -> str:
    """What requests trusts, PEM."""
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    return Path(DEFAULT_CA_BUNDLE_PATH).read_text(encoding="utf-8")
