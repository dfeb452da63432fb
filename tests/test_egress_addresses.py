"""Only public addresses may be dialled, and private ones only where the operator said so.

The tables are the IANA special-purpose registries as they stand, written out here a second time.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox.egress.addresses import refusal

NEVER_V4 = [
    ("0.0.0.0/8", "an unspecified address"),
    ("169.254.0.0/16", "a link-local address"),
    ("192.0.0.0/24", "a reserved address"),
    ("192.0.0.0/29", "a reserved address"),
    ("192.0.0.8/32", "a reserved address"),
    ("192.0.0.9/32", "a reserved address"),
    ("192.0.0.10/32", "a reserved address"),
    ("192.0.0.170/31", "a reserved address"),
    ("192.0.2.0/24", "a reserved address"),
    ("192.31.196.0/24", "a reserved address"),
    ("192.52.193.0/24", "a reserved address"),
    ("192.88.99.0/24", "a reserved address"),
    ("192.175.48.0/24", "a reserved address"),
    ("198.18.0.0/15", "a reserved address"),
    ("198.51.100.0/24", "a reserved address"),
    ("203.0.113.0/24", "a reserved address"),
    ("224.0.0.0/4", "a multicast address"),
    ("240.0.0.0/5", "a reserved address"),
    ("255.255.255.255/32", "the broadcast address"),
]
NEVER_V6 = [
    ("::/128", "an unspecified address"),
    ("::2/127", "an IPv4 address in an IPv6 one"),
    ("::7f00:0/104", "an IPv4 address in an IPv6 one"),
    ("::808:808/128", "an IPv4 address in an IPv6 one"),
    ("::ffff:0:0/96", "an IPv4 address in an IPv6 one"),
    ("::ffff:0:0:0/96", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::7f00:0/104", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::a00:0/104", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::6440:0/106", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::a9fe:0/112", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::a83f:8110/128", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::e000:0/100", "an IPv4 address in an IPv6 one"),
    ("64:ff9b::/104", "an IPv4 address in an IPv6 one"),
    ("64:ff9b:1::/48", "an IPv4 address in an IPv6 one"),
    ("2001::/32", "an IPv4 address in an IPv6 one"),
    ("2002::/16", "an IPv4 address in an IPv6 one"),
    ("2a00:1450:4001:80b:0:5efe::/96", "an IPv4 address in an IPv6 one"),
    ("2a00:1450:4001:80b:200:5efe::/96", "an IPv4 address in an IPv6 one"),
    ("fe80::5efe:0:0/96", "an IPv4 address in an IPv6 one"),
    ("fd12::5efe:0:0/96", "an IPv4 address in an IPv6 one"),
    ("100::/64", "a reserved address"),
    ("100:0:0:1::/64", "a reserved address"),
    ("2001:1::1/128", "a reserved address"),
    ("2001:1::2/128", "a reserved address"),
    ("2001:1::3/128", "a reserved address"),
    ("2001:2::/48", "a reserved address"),
    ("2001:3::/32", "a reserved address"),
    ("2001:4:112::/48", "a reserved address"),
    ("2001:10::/28", "a reserved address"),
    ("2001:20::/28", "a reserved address"),
    ("2001:30::/28", "a reserved address"),
    ("2001:db8::/32", "a reserved address"),
    ("2620:4f:8000::/48", "a reserved address"),
    ("3fff::/20", "a reserved address"),
    ("5f00::/16", "a reserved address"),
    ("200::/7", "a reserved address"),
    ("4000::/3", "a reserved address"),
    ("e000::/4", "a reserved address"),
    ("fe00::/9", "a reserved address"),
    ("fec0::/10", "a reserved address"),
    ("fe80::/10", "a link-local address"),
    ("ff00::/8", "a multicast address"),
]
NEVER = NEVER_V4 + NEVER_V6
METADATA = [
    "169.254.169.254",
    "169.254.169.123",
    "169.254.170.2",
    "169.254.170.23",
    "100.100.100.200",
    "192.0.0.192",
    "168.63.129.16",
    "fd00:ec2::254",
    "fd00:ec2::23",
    "fd00:ec2:ffff:ffff:ffff:ffff:ffff:ffff",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
    "fd00:42::42",
]
PRIVATE = [
    ("10.0.0.0/8", "a private address"),
    ("172.16.0.0/12", "a private address"),
    ("192.168.0.0/16", "a private address"),
    ("100.64.0.0/10", "a private address"),
    ("127.0.0.0/8", "a loopback address"),
    ("::1/128", "a loopback address"),
    ("fc00::/7", "a private address"),
]
# Public addresses next to a block, on either side of it where that is public, and some well known.
PUBLIC = [
    "1.0.0.0",
    "9.255.255.255",
    "11.0.0.0",
    "100.63.255.255",
    "100.128.0.0",
    "126.255.255.255",
    "128.0.0.0",
    "168.63.129.15",
    "168.63.129.17",
    "169.253.255.255",
    "169.255.0.0",
    "172.15.255.255",
    "172.32.0.0",
    "191.255.255.255",
    "192.0.1.0",
    "192.0.1.255",
    "192.0.3.0",
    "192.31.195.255",
    "192.31.197.0",
    "192.52.192.255",
    "192.52.194.0",
    "192.88.98.255",
    "192.88.100.0",
    "192.167.255.255",
    "192.169.0.0",
    "192.175.47.255",
    "192.175.49.0",
    "198.17.255.255",
    "198.20.0.0",
    "198.51.99.255",
    "198.51.101.0",
    "203.0.112.255",
    "203.0.114.0",
    "223.255.255.255",
    "8.8.8.8",
    "1.1.1.1",
    "104.16.0.1",
    "2000::",
    "2001:200::",
    "2001:db7:ffff:ffff:ffff:ffff:ffff:ffff",
    "2001:db9::",
    "2003::",
    "2001:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2620:4f:7fff:ffff:ffff:ffff:ffff:ffff",
    "2620:4f:8001::",
    "3ffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "3fff:1000::",
    "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    "2606:4700:4700::1111",
    "2a00:1450:4001:80b::200e",
    "2a00::5eff:808:808",
    "2a00::5efd:808:808",
    "2a00::100:5efe:808:808",
    "2a00:5efe::1",
    "64:ff9b::808:808",
    "64:ff9b::8.8.8.8",
    "64:ff9b::101:101",
]
NO_ADDRESS = [
    "",
    " ",
    "127.1",
    "127.0.1",
    "0x7f.1",
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "010.8.8.8",
    "8.8.8.08",
    "1.2.3.4\0",
    "\x001.2.3.4",
    "1.2.3.4 ",
    " 1.2.3.4",
    "1.2.3.4\n",
    "1.2.3.4\r\n",
    "1.2.3.4.",
    "1.2.3",
    "1.2.3.4.5",
    "1.2.3.256",
    "1.2.3.-4",
    "+1.2.3.4",
    "1_0.2.3.4",
    "1.2.3.4/32",
    "1.2.3.4:80",
    "8。8。8。8",
    "８.8.8.8",
    "٨.8.8.8",
    "[2a00::1]",
    "2a00::1/128",
    "2a00:::1",
    "2a00::1::2",
    "2a00",
    "::ffff:127.1",
    "::ffff:0177.0.0.1",
    "localhost",
    "localhost.",
    "example.com",
    "\ud800",
]

anything = st.booleans()
octets = st.integers(0, 2**32 - 1).map(IPv4Address)
blocks = st.sampled_from([ip_network(block) for block, _ in NEVER])


def edges(block: str) -> tuple[str, str]:
    network = ip_network(block)
    return str(network[0]), str(network[-1])


def is_refused(address: object) -> bool:
    """Whatever the operator says."""
    return all(refusal(str(address), private_ok=ok) is not None for ok in (False, True))


@pytest.mark.parametrize("private_ok", [False, True])
@pytest.mark.parametrize(("block", "reason"), NEVER)
def test_a_special_purpose_block_is_refused_from_its_first_to_its_last_address(
    block: str, reason: str, private_ok: bool
) -> None:
    for address in edges(block):
        assert refusal(address, private_ok=private_ok) == reason


@pytest.mark.parametrize("private_ok", [False, True])
@pytest.mark.parametrize("address", METADATA)
def test_a_metadata_service_is_refused_even_where_private_addresses_are_allowed(
    address: str, private_ok: bool
) -> None:
    assert refusal(address, private_ok=private_ok) == "a cloud metadata address"


@pytest.mark.parametrize(("block", "reason"), PRIVATE)
def test_a_private_block_is_open_only_where_the_operator_said_so(block: str, reason: str) -> None:
    for address in edges(block):
        assert refusal(address, private_ok=False) == reason
        assert refusal(address, private_ok=True) is None


@pytest.mark.parametrize("private_ok", [False, True])
@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_next_to_a_refused_one_is_allowed(address: str, private_ok: bool) -> None:
    assert refusal(address, private_ok=private_ok) is None


@pytest.mark.parametrize("private_ok", [False, True])
@pytest.mark.parametrize("text", NO_ADDRESS)
def test_a_spelling_that_only_some_parsers_take_is_no_address(text: str, private_ok: bool) -> None:
    assert refusal(text, private_ok=private_ok) == "not an address"


@pytest.mark.parametrize("text", ["fe80::1%lo", "fe80::1%1", "2a00::1%eth0", "8.8.8.8%lo", "%"])
def test_an_address_with_a_zone_is_refused_whatever_the_address(text: str) -> None:
    assert refusal(text, private_ok=False) == "an address with a zone"
    assert refusal(text, private_ok=True) == "an address with a zone"


@pytest.mark.parametrize(
    "text", ["::ffff:8.8.8.8", "::FFFF:808:808", "::8.8.8.8", "2002:808:808::"]
)
def test_a_public_ipv4_address_in_an_ipv6_one_is_refused_too(text: str) -> None:
    assert refusal(text, private_ok=True) == "an IPv4 address in an IPv6 one"


@given(st.text() | st.text("0123456789abcdefx.:%/ \0", max_size=50), anything)
def test_no_text_raises_and_only_addresses_are_allowed(text: str, private_ok: bool) -> None:
    if refusal(text, private_ok=private_ok) is None:
        ip_address(text)


@given(blocks, st.data())
def test_no_address_of_a_refused_block_is_ever_allowed(
    block: IPv4Network | IPv6Network, data: st.DataObject
) -> None:
    assert is_refused(block[data.draw(st.integers(0, block.num_addresses - 1))])


@given(octets)
def test_no_form_with_an_embedded_address_is_ever_allowed(inner: IPv4Address) -> None:
    number = int(inner)
    for start, shift in (
        ("::ffff:0:0", 0),
        ("::ffff:0:0:0", 0),
        ("64:ff9b:1::", 0),
        ("2002::", 80),
        ("2001::", 0),
        ("2001::", 64),
        ("2a00::5efe:0:0", 0),
        ("2a00::200:5efe:0:0", 0),
        ("fd00::5efe:0:0", 0),
    ):
        assert is_refused(IPv6Address(int(IPv6Address(start)) | number << shift))
    if number > 1:
        assert is_refused(IPv6Address(number))
    assert is_refused(f"::ffff:{inner}")


@given(octets, anything)
def test_a_nat64_address_is_allowed_only_if_its_ipv4_address_is_public(
    inner: IPv4Address, private_ok: bool
) -> None:
    outer = refusal(f"64:ff9b::{inner}", private_ok=private_ok)
    assert (outer is None) == (refusal(str(inner), private_ok=False) is None)


@given(st.integers(0, 2**128 - 1).map(IPv6Address), anything)
def test_what_is_allowed_of_ipv6_is_global_unicast_private_loopback_or_nat64(
    address: IPv6Address, private_ok: bool
) -> None:
    if refusal(str(address), private_ok=private_ok) is None:
        opened = ["2000::/3", "64:ff9b::/96"] + ["fc00::/7", "::1/128"] * private_ok
        assert any(address in IPv6Network(block) for block in opened)


@given(octets | st.integers(0, 2**128 - 1).map(IPv6Address))
def test_saying_private_opens_private_and_loopback_blocks_only(
    address: IPv4Address | IPv6Address,
) -> None:
    closed = refusal(str(address), private_ok=False)
    if refusal(str(address), private_ok=True) != closed:
        assert any(address in ip_network(block) for block, _ in PRIVATE)
        assert str(address) not in METADATA


@given(octets | st.integers(0, 2**128 - 1).map(IPv6Address))
def test_what_the_standard_library_calls_not_global_is_never_public(
    address: IPv4Address | IPv6Address,
) -> None:
    nat64 = IPv6Network("64:ff9b::/96")  # not global in some versions of Python
    if not address.is_global and address not in nat64:
        assert refusal(str(address), private_ok=False) is not None


def test_a_spelling_of_an_ipv6_address_makes_no_difference() -> None:
    for text in ("fd00:0ec2::254", "FD00:EC2:0:0:0:0:0:254", "fd00:ec2::0.0.2.84"):
        assert refusal(text, private_ok=True) == "a cloud metadata address"
