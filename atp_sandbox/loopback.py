"""Which loopback address of a jail stands for what. PURE.

A jail has no route out; each name that it may reach is an address of its own loopback, where the
egress process accepts. The address that a connection was made to says which name was meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

PROXY_ADDRESS = "127.128.0.1"
PROXY_PORT = 3128
DNS_ADDRESS = "127.128.0.2"
DNS_PORT = 53
_FIRST_NAME = int(IPv4Address("127.128.1.1"))


def address_of(index: int) -> str:
    """The address of the policy's name number `index`."""
    return str(IPv4Address(_FIRST_NAME + index))


def name_at(address: str, names: Sequence[str]) -> str | None:
    """The name whose address this is; None if it is nobody's."""
    index = int(IPv4Address(address)) - _FIRST_NAME
    return names[index] if 0 <= index < len(names) else None


def ports_to_bind(ports: Sequence[int]) -> list[int]:
    """The ports of a jail's listening sockets, in order; each takes all addresses."""
    return sorted({PROXY_PORT, DNS_PORT, *ports})


def names_past_proxy(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """What clients are to reach without the proxy (`NO_PROXY`).

    Clients take an entry for everything that ends with it. So a name is left out if hosts below it
    may be reached, for they are reached through the proxy alone.
    """
    below = [pattern.removeprefix("*") for pattern in patterns]
    kept = [
        name
        for name in names
        if not any(f".{name}".endswith(end) or end.endswith(name) for end in below)
    ]
    return ["localhost", "127.0.0.1", "::1", *kept]
