"""Which hosts a toolkit may reach, as its operator wrote it down. PURE values.

A host has one spelling here, `canonical_host`'s: what the policy names, what a jail asks for and
what is dialled are compared and used in that spelling alone, so that no two parsers can differ.
An empty policy allows nothing.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from atp_sandbox.limits import MIB, format_duration, format_size

DEFAULT_PORT = 443
MAX_NAMES = 250
"""Named hosts of one toolkit: each is one address of a block of 254 inside its jail."""
MAX_PATTERNS = 250
MAX_PORTS = 32
"""Different ports of one toolkit: each is a listening socket of every jail."""
MAX_HOST_CHARS = 253
"""RFC 1035, section 2.3.4, without the final dot."""

_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label that C libraries read as a part of an IPv4 address: inet_aton(3)."""
_PLACE = re.compile(r"((?:\[[^]]*\]|[^]:])+)(?::([0-9]+))?")
_PROVIDER = re.compile(r"[A-Za-z0-9._-]{1,64}")


def canonical_host(text: str) -> str:
    """The one spelling of a host name: lower case, ASCII, no final dot.

    ValueError for whatever is no such name: addresses in any spelling, other alphabets (their
    `xn--` form is one), empty or long labels, everything invisible.
    """
    host = text[:-1] if text.endswith(".") else text
    if not host or len(host) > MAX_HOST_CHARS or not host.isascii():
        raise ValueError("not a host name")
    host = host.lower()
    labels = host.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("not a host name")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("an address, not a host name")
    return host


def parse_port(text: str) -> int:
    """1 to 65535 in its one spelling; ValueError for anything else."""
    if not re.fullmatch(r"[1-9][0-9]{0,4}", text) or int(text) > 65_535:
        raise ValueError("not a port, which is a number from 1 to 65535")
    return int(text)


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """A host, or all hosts below a domain (`*.example.com`), at one port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def is_pattern(self) -> bool:
        return self.host.startswith("*.")

    def covers(self, host: str, port: int) -> bool:
        """Whether the canonical `host` at `port` is meant."""
        return port == self.port and _covers(self.host, host)


def parse_endpoint(text: str) -> Endpoint:
    """`HOST[:PORT]` or `*.DOMAIN[:PORT]`, port 443 if none is said; ValueError says why not."""
    if "://" in text or "/" in text:
        raise ValueError(f"{text!r}: write HOST[:PORT] alone, without a scheme or a path")
    host, has_port, port_text = text.partition(":")
    if text.startswith("[") or _is_address(text) or _is_address(host):
        raise ValueError(f"{text!r} is an address; write the name of its host")
    try:
        port = parse_port(port_text) if has_port else DEFAULT_PORT
        return Endpoint(_parse_host(host), port)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _parse_host(text: str) -> str:
    """A name or a pattern, in its one spelling."""
    is_pattern = text.startswith("*.")
    if "*" in text and (not is_pattern or "*" in text[2:]):
        raise ValueError("a pattern is *. and a domain, such as *.example.com")
    try:
        host = canonical_host(text[2:] if is_pattern else text)
    except ValueError as error:
        raise ValueError(f"{error}{_ascii_form(text)}") from None
    if host == "localhost" or host.endswith(".localhost"):
        raise ValueError("localhost is the jail itself; give the machine another name")
    if is_pattern and "." not in host:
        raise ValueError("a pattern needs a domain with a dot, such as *.example.com")
    return f"*.{host}" if is_pattern else host


def _ascii_form(text: str) -> str:
    """A hint for names of other alphabets."""
    try:
        return "" if text.isascii() else f"; write {text.encode('idna').decode('ascii')}"
    except UnicodeError:
        return ""


def parse_private(text: str) -> str:
    """A name or pattern as `private-ok` lists it, without a port; ValueError."""
    try:
        return _parse_host(text)
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def parse_binding(provider: str, hosts: Iterable[str]) -> tuple[str, ...]:
    """The hosts for which a provider's token is filled in; ValueError."""
    if not _PROVIDER.fullmatch(provider):
        raise ValueError(f"{provider!r} is no provider: 1 to 64 letters, digits and . _ -")
    found = []
    for text in hosts:
        host = parse_private(text)
        if host.startswith("*."):
            raise ValueError(f"{text!r}: a token goes to named hosts only")
        found.append(host)
    return tuple(sorted(set(found)))


def _covers(allowed: str, host: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:]) and len(host) > len(allowed) - 1
    return host == allowed


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """What a toolkit's connections may use."""

    connections: int = 64
    """At once, in one jail."""
    bytes: int = 128 * MIB
    """Both ways, on one connection."""
    idle_s: float = 60.0
    """Without a byte either way."""

    def __str__(self) -> str:
        return (
            f"at most {self.connections} connections at once, "
            f"{format_size(self.bytes)} on each, idle for {format_duration(self.idle_s)}"
        )


@dataclass(frozen=True, slots=True)
class EgressPolicy:
    """What one toolkit may reach; ValueError if its parts contradict each other."""

    allowed: tuple[Endpoint, ...] = ()
    """Sorted, without repetitions."""
    private_ok: tuple[str, ...] = ()
    """Hosts and patterns of `allowed` whose addresses may be private or this machine's own."""
    inject: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Provider → hosts of `allowed` for which its token is filled in outside the jail."""
    limits: EgressLimits = EgressLimits()

    def __post_init__(self) -> None:
        named, patterns = self.names, [e for e in self.allowed if e.is_pattern]
        if len(named) > MAX_NAMES or len(patterns) > MAX_PATTERNS:
            raise ValueError(f"more than {MAX_NAMES} hosts or {MAX_PATTERNS} patterns")
        if len(self.ports) > MAX_PORTS:
            raise ValueError(f"more than {MAX_PORTS} different ports")
        hosts = {endpoint.host for endpoint in self.allowed}
        for host in self.private_ok:
            if host not in hosts:
                raise ValueError(f"{host} may be private, but is not among the allowed hosts")
        for provider, bound in self.inject.items():
            for host in bound:
                if host not in hosts:
                    raise ValueError(
                        f"the token of {provider} is for {host}, which is not an allowed host"
                    )

    @property
    def names(self) -> tuple[str, ...]:
        """Named hosts, sorted: each has an address inside the jail."""
        return tuple(sorted({e.host for e in self.allowed if not e.is_pattern}))

    @property
    def ports(self) -> tuple[int, ...]:
        return tuple(sorted({endpoint.port for endpoint in self.allowed}))

    @property
    def injected_hosts(self) -> tuple[str, ...]:
        """Hosts at which the egress process ends TLS, to put tokens in."""
        return tuple(sorted({host for bound in self.inject.values() for host in bound}))

    def allows(self, host: str, port: int) -> bool:
        """Whether the canonical `host` may be reached at `port`."""
        return any(endpoint.covers(host, port) for endpoint in self.allowed)

    def may_be_private(self, host: str) -> bool:
        return any(_covers(allowed, host) for allowed in self.private_ok)

    def lines(self) -> list[str]:
        """For people, one thing a line; empty if nothing may be reached."""
        if not self.allowed:
            return []
        found = [
            f"{e}, may be private" if e.host in self.private_ok else str(e) for e in self.allowed
        ]
        for provider, hosts in sorted(self.inject.items()):
            found.append(f"the token of {provider} is filled in for {', '.join(hosts)} alone")
        return [*found, str(self.limits)]

    def to_json(self) -> bytes:
        """For the egress process; `from_json` reads it."""
        limits = self.limits
        return json.dumps(
            {
                "allowed": [[endpoint.host, endpoint.port] for endpoint in self.allowed],
                "private_ok": list(self.private_ok),
                "inject": {name: list(hosts) for name, hosts in self.inject.items()},
                "limits": [limits.connections, limits.bytes, limits.idle_s],
            }
        ).encode()

    @classmethod
    def from_json(cls, text: bytes) -> EgressPolicy:
        values = json.loads(text)
        return cls(
            tuple(Endpoint(host, port) for host, port in values["allowed"]),
            tuple(values["private_ok"]),
            {name: tuple(hosts) for name, hosts in values["inject"].items()},
            EgressLimits(*values["limits"]),
        )


@dataclass(frozen=True, slots=True)
class Reroute:
    """One host's port is somewhere else: for tests, and to try a toolkit out against a stand-in.

    What may be dialled is judged all the same: an address of this machine needs `private_ok`.
    """

    endpoint: Endpoint
    addresses: tuple[str, ...]
    """What the name resolves to; connections go through them in turn."""
    port: int


def parse_reroute(wanted: str, found: str) -> Reroute:
    """`HOST[:PORT]` and the `ADDRESS[,ADDRESS…][:PORT]` where it is; ValueError.

    An IPv6 address is written in brackets, as in an URI.
    """
    endpoint = parse_endpoint(wanted)
    if endpoint.is_pattern:
        raise ValueError(f"{wanted!r}: a pattern is at no one place")
    match = _PLACE.fullmatch(found)
    try:
        texts = match[1].split(",") if match else []
        addresses = [ipaddress.ip_address(text.strip("[]")) for text in texts]
        port = parse_port(match[2]) if match and match[2] else endpoint.port
    except ValueError:
        addresses = []
    if not addresses:
        raise ValueError(f"{found!r}: write ADDRESS[:PORT], an IPv6 address in brackets")
    return Reroute(endpoint, tuple(map(str, addresses)), port)


def policy_of(
    allowed: Iterable[str],
    private_ok: Iterable[str] = (),
    inject: Mapping[str, Iterable[str]] | None = None,
    limits: EgressLimits = EgressLimits(),
) -> EgressPolicy:
    """The policy that an operator's texts amount to; ValueError says which one is wrong."""
    bound = {name: parse_binding(name, hosts) for name, hosts in (inject or {}).items()}
    return EgressPolicy(
        tuple(sorted({parse_endpoint(text) for text in allowed})),
        tuple(sorted({parse_private(text) for text in private_ok})),
        bound,
        limits,
    )
