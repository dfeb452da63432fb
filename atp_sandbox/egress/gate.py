"""What one jail may do with its way out, and what it has in use. Decisions; no input or output."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address

from atp_sandbox import loopback
from atp_sandbox.egress.addresses import refusal
from atp_sandbox.egress.budget import Budget
from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.messages import worker_of
from atp_sandbox.policy import EgressPolicy, canonical_host, parse_port

RESOLVING_AT_ONCE = 4
"""Of one toolkit: names of a pattern may be answered as slowly as their owner likes."""
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[0-9.]+)(?::([0-9]+))?")


@dataclass(frozen=True, slots=True)
class Target:
    """A canonical host that the policy allows, at a port."""

    host: str
    port: int


@dataclass(slots=True, eq=False)
class Gate:
    """One jail's way out, as the egress process sees it; owns its listening sockets."""

    number: int
    toolkit: str
    policy: EgressPolicy
    key: bytes = field(repr=False)
    listeners: list[socket.socket]
    resolving: asyncio.Semaphore
    budget: Budget
    """Of lines that are told; both are shared by all jails of the toolkit."""
    connections: set[asyncio.Task[None]] = field(default_factory=set)
    secrets: dict[bytes, tuple[str, bytes]] = field(default_factory=dict, repr=False)
    """Placeholder → provider and token."""

    def named(self, address: str, port: int) -> Target | None:
        """What a connection to `address` in the jail means; None if nothing. Raises Denied."""
        host = loopback.name_at(address, self.policy.names)
        return None if host is None else self.decide(host, port)

    def requested(self, authority: str, default_port: int | None = None) -> Target:
        """`HOST:PORT` as a proxy's client writes it; raises Denied. Decided before any look-up."""
        host, has_port, port_text = authority.partition(":")
        try:
            port = parse_port(port_text) if has_port or default_port is None else default_port
            return self.decide(canonical_host(host), port)
        except ValueError:
            raise _not_a_host(authority, default_port) from None

    def decide(self, host: str, port: int) -> Target:
        """The canonical `host` at `port`, if the policy allows it; else Denied."""
        if not self.policy.allows(host, port):
            raise NotAllowed(host, port, self.toolkit)
        return Target(host, port)

    def judge(self, target: Target, addresses: list[str]) -> list[str]:
        """Those of the addresses of `target` that may be dialled; Denied if none may."""
        if not addresses:
            raise Failed("has no address")
        private_ok = self.policy.may_be_private(target.host)
        reasons = [refusal(address, private_ok=private_ok) for address in addresses]
        allowed = [a for a, reason in zip(addresses, reasons, strict=True) if reason is None]
        if not allowed:
            raise Denied(f"resolves to {reasons[0]}")
        return allowed

    def worker_of(self, name: str, ticket: str) -> int | None:
        """Which worker shows this ticket; None: none of this jail."""
        return worker_of(self.key, name, ticket)

    def is_injected(self, target: Target) -> bool:
        """Whether tokens are put in on the way to `target`."""
        return target.host in self.policy.injected_hosts

    def secrets_for(self, host: str) -> Mapping[bytes, bytes]:
        """Placeholder → token, of the calls that run now, for those whose provider is at `host`."""
        bound = self.policy.inject
        return {
            placeholder: token
            for placeholder, (provider, token) in self.secrets.items()
            if host in bound.get(provider, ())
        }

    @property
    def is_full(self) -> bool:
        return len(self.connections) >= self.policy.limits.connections


class NotAllowed(Denied):
    """The policy does not name it."""

    def __init__(self, host: str, port: int | None, toolkit: str) -> None:
        super().__init__(f"is not allowed for toolkit {toolkit}")
        self.host = host
        self.port = port


class AddressAsked(NotAllowed):
    """An address was asked for, in its one spelling, so that it can be told."""

    def __init__(self, address: str, port: int | None) -> None:
        super().__init__(address, port, "")
        self.reason = "is an address, and hosts are allowed by their names"


class NotAHost(Denied):
    """What was asked for is no HOST:PORT in its one spelling."""

    def __init__(self) -> None:
        super().__init__("what was asked for is no host name with a port")


def _not_a_host(authority: str, default_port: int | None) -> Denied:
    found = _ADDRESS.fullmatch(authority)
    try:
        if found is None:
            return NotAHost()
        port = parse_port(found[2]) if found[2] else default_port
        return AddressAsked(str(ip_address(found[1].strip("[]"))), port)
    except ValueError:
        return NotAHost()
