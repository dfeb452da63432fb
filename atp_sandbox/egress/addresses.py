"""Which addresses may be dialled: public ones, and private ones where the operator said so.

PURE: no look-up is made here. Source: the IANA special-purpose address registries for IPv4 and IPv6
(RFC 6890), and what the clouds say of their metadata services. `ipaddress.is_global` is no help: it
is True for multicast, for NAT64 and 6to4 forms of 127.0.0.1, and for two metadata services.

What no row names is refused, but for IPv4 and for the global unicast block of IPv6. A network's own
NAT64 prefix (RFC 6052, section 2.2) looks like any other address, so it cannot be told here.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

_METADATA = "a cloud metadata address"
_LOOPBACK = "a loopback address"
_PRIVATE = "a private address"
_LINK_LOCAL = "a link-local address"
_MULTICAST = "a multicast address"
_RESERVED = "a reserved address"
_UNSPECIFIED = "an unspecified address"
_EMBEDDED = "an IPv4 address in an IPv6 one"

_ALLOWED_IF_PRIVATE = frozenset({_LOOPBACK, _PRIVATE})

# The first row that holds the address decides, so metadata services stand before their blocks.
_ROWS = (
    ("169.254.169.254/32", _METADATA),  # AWS, Azure, Google, Oracle, DigitalOcean and others
    ("169.254.169.123/32", _METADATA),  # AWS: time
    ("169.254.170.2/32", _METADATA),  # AWS: credentials of a container
    ("169.254.170.23/32", _METADATA),  # AWS: credentials of a pod
    ("100.100.100.200/32", _METADATA),  # Alibaba
    ("192.0.0.192/32", _METADATA),  # Oracle, classic
    ("168.63.129.16/32", _METADATA),  # Azure: its host agent, at a public address
    ("127.0.0.0/8", _LOOPBACK),
    ("10.0.0.0/8", _PRIVATE),  # RFC 1918, as the next two
    ("172.16.0.0/12", _PRIVATE),
    ("192.168.0.0/16", _PRIVATE),
    ("100.64.0.0/10", _PRIVATE),  # RFC 6598: behind a carrier's NAT
    ("0.0.0.0/8", _UNSPECIFIED),  # Linux dials 127.0.0.1 for 0.0.0.0
    ("169.254.0.0/16", _LINK_LOCAL),
    ("192.0.0.0/24", _RESERVED),  # RFC 6890: protocol assignments
    ("192.0.2.0/24", _RESERVED),  # RFC 5737: documentation
    ("192.31.196.0/24", _RESERVED),  # RFC 7535: AS112
    ("192.52.193.0/24", _RESERVED),  # RFC 7450: AMT
    ("192.88.99.0/24", _RESERVED),  # RFC 7526: relays of 6to4, deprecated
    ("192.175.48.0/24", _RESERVED),  # RFC 7534: AS112
    ("198.18.0.0/15", _RESERVED),  # RFC 2544: benchmarks
    ("198.51.100.0/24", _RESERVED),  # RFC 5737: documentation
    ("203.0.113.0/24", _RESERVED),  # RFC 5737: documentation
    ("224.0.0.0/4", _MULTICAST),
    ("255.255.255.255/32", "the broadcast address"),
    ("240.0.0.0/4", _RESERVED),
    ("fd00:ec2::/32", _METADATA),  # AWS
    ("fd20:ce::254/128", _METADATA),  # Google
    ("fd00:c1::a9fe:a9fe/128", _METADATA),  # Oracle
    ("fd00:42::42/128", _METADATA),  # Scaleway
    ("::/128", _UNSPECIFIED),  # dialled as ::1
    ("::1/128", _LOOPBACK),
    ("::/96", _EMBEDDED),  # RFC 4291: IPv4-compatible, deprecated
    ("::ffff:0:0/96", _EMBEDDED),  # RFC 4291: IPv4-mapped, which the kernel dials as IPv4
    ("::ffff:0:0:0/96", _EMBEDDED),  # RFC 2765: IPv4-translated
    ("64:ff9b:1::/48", _EMBEDDED),  # RFC 8215: NAT64 of one network, with private addresses
    ("2001::/32", _EMBEDDED),  # RFC 4380: Teredo
    ("2002::/16", _EMBEDDED),  # RFC 3056: 6to4
    ("fc00::/7", _PRIVATE),  # RFC 4193
    ("fe80::/10", _LINK_LOCAL),
    ("ff00::/8", _MULTICAST),
    ("2001::/23", _RESERVED),  # RFC 2928: benchmarks, ORCHID, AMT, AS112, drone identifiers
    ("2001:db8::/32", _RESERVED),  # RFC 3849: documentation
    ("2620:4f:8000::/48", _RESERVED),  # RFC 7534: AS112
    ("3fff::/20", _RESERVED),  # RFC 9637: documentation
)
_BLOCKS = tuple((ip_network(block), reason) for block, reason in _ROWS)

_GLOBAL_UNICAST = IPv6Network("2000::/3")
"""All that IANA gives out (RFC 4291, section 2.4), so site-local and discard-only are outside."""
_NAT64 = IPv6Network("64:ff9b::/96")
_ISATAP = 0x5EFE
"""Second quarter of an interface identifier that ends in an IPv4 address (RFC 5214, section 6.1).

The first quarter is 0, or 0x0200 for a public address.
"""


def refusal(address: str, *, private_ok: bool) -> str | None:
    """Why `address`, a numeric one as `getaddrinfo` gives it, must not be dialled; None if it may.

    Half a sentence that holds nothing of the address. `private_ok` opens private and loopback
    blocks, and never a metadata service in one.
    """
    if "%" in address:
        return "an address with a zone"
    try:
        parsed = ip_address(address)
    except ValueError:
        return "not an address"
    reason = _reason(parsed)
    return None if private_ok and reason in _ALLOWED_IF_PRIVATE else reason


def _reason(address: IPv4Address | IPv6Address) -> str | None:
    if isinstance(address, IPv6Address):
        if address in _NAT64:
            # What DNS64 answers on a network without IPv4. The prefix is for public addresses only
            # (RFC 6052, section 3.1), so a private one stays refused whatever the operator said.
            return _EMBEDDED if _reason(_last_quarter(address)) else None
        if _is_isatap(address):
            return _EMBEDDED
    for block, reason in _BLOCKS:
        if address in block:
            return reason
    is_public = isinstance(address, IPv4Address) or address in _GLOBAL_UNICAST
    return None if is_public else _RESERVED


def _last_quarter(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFF_FFFF)


def _is_isatap(address: IPv6Address) -> bool:
    identifier = int(address) >> 32 & 0xFFFF_FFFF
    return identifier & ~0x0200_0000 == _ISATAP
