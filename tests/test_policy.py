"""Host names have one spelling, and a policy allows what it names and nothing else."""

from __future__ import annotations

import socket
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_sandbox import loopback
from atp_sandbox.egress import messages
from atp_sandbox.learned import MAX_HOSTS, Learned
from atp_sandbox.policy import (
    MAX_NAMES,
    MAX_PORTS,
    EgressLimits,
    EgressPolicy,
    Endpoint,
    canonical_host,
    parse_endpoint,
    parse_port,
    parse_reroute,
    policy_of,
)

NO_HOSTS = [
    "",
    ".",
    "..",
    ".example.com",
    "example..com",
    "example.com..",
    "127.0.0.1",
    "127.1",
    "2130706433",
    "0x7f.1",
    "0x7f000001",
    "0177.0.0.1",
    "1.2.3.4.",
    "a.1",
    "a.0x1",
    "a.0x",
    "[::1]",
    "::1",
    "::ffff:1.2.3.4",
    "fe80::1%lo",
    "example.com%lo",
    "example.com\0.evil.example",
    "example.com\r\nX: y",
    "example.com\t",
    " example.com",
    "example.com ",
    "user@example.com",
    "example.com#evil",
    "example.com?evil",
    "example.com/evil",
    "example.com\\evil",
    "example.com;evil",
    "evil.example\u3002example.com",
    "ex\u0430mple.com",
    "bücher.example",
    "ＥＸＡＭＰＬＥ.com",
    "-a.example",
    "a-.example",
    "*.example.com",
    "a" * 64 + ".example",
    "a." * 127 + "com",
]


@pytest.mark.parametrize("text", NO_HOSTS)
def test_what_is_no_plain_host_name_has_no_canonical_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="host name"):
        canonical_host(text)


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("API.HubAPI.com", "api.hubapi.com"),
        ("api.hubapi.com.", "api.hubapi.com"),
        ("my_bucket.s3.example", "my_bucket.s3.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("db", "db"),
        ("1.example", "1.example"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_a_host_name_has_one_spelling(text: str, host: str) -> None:
    assert canonical_host(text) == host
    assert canonical_host(host) == host


@given(st.text())
def test_canonical_names_are_plain_ascii_whatever_is_given(text: str) -> None:
    try:
        host = canonical_host(text)
    except ValueError:
        return
    assert set(host) <= set(string.ascii_lowercase + string.digits + "._-")
    assert canonical_host(host) == host
    assert text.lower().rstrip(".") == host
    with pytest.raises(OSError, match="illegal IP address"):
        socket.inet_aton(host)


@pytest.mark.parametrize(
    "text", ["", "0", "0443", "+443", " 443", "443 ", "65536", "-1", "４４３", "1e3"]
)
def test_a_port_has_one_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="not a port"):
        parse_port(text)


def test_the_port_is_443_where_none_is_said() -> None:
    assert parse_endpoint("api.example.com") == Endpoint("api.example.com", 443)
    assert parse_endpoint("db.internal:5432") == Endpoint("db.internal", 5432)
    assert parse_endpoint("*.Example.com:80") == Endpoint("*.example.com", 80)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("https://api.example.com", "without a scheme"),
        ("api.example.com/v1", "without a scheme or a path"),
        ("10.0.0.1:5432", "is an address"),
        ("[::1]:80", "is an address"),
        ("2001:db8::1", "is an address"),
        ("*", "a pattern is"),
        ("*.com", "a pattern needs a domain"),
        ("*.*.example.com", "a pattern is"),
        ("a*.example.com", "a pattern is"),
        ("localhost:80", "the jail itself"),
        ("x.localhost", "the jail itself"),
        ("bücher.example", "write xn--bcher-kva.example"),
        ("api.example.com:", "not a port"),
        ("api.example.com:443:80", "not a port"),
        ("", "not a host name"),
    ],
)
def test_a_wrong_endpoint_says_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_endpoint(text)


def test_an_empty_policy_allows_nothing() -> None:
    policy = EgressPolicy()
    assert not policy.allows("api.example.com", 443)
    assert policy.names == policy.ports == policy.injected_hosts == ()


def test_a_policy_allows_the_named_host_at_the_named_port_alone() -> None:
    policy = policy_of(["api.example.com", "db.internal:5432"])
    assert policy.allows("api.example.com", 443)
    assert policy.allows("db.internal", 5432)
    for host, port in [
        ("api.example.com", 5432),
        ("db.internal", 443),
        ("example.com", 443),
        ("x.api.example.com", 443),
        ("evilapi.example.com", 443),
        ("api.example.com.evil.example", 443),
    ]:
        assert not policy.allows(host, port), host


def test_a_pattern_covers_what_is_below_its_domain_and_not_the_domain() -> None:
    policy = policy_of(["*.example.com"])
    assert policy.allows("a.example.com", 443)
    assert policy.allows("a.b.example.com", 443)
    for host in ("example.com", "evilexample.com", "a.example.com.evil.example", ".example.com"):
        assert not policy.allows(host, 443), host


@given(st.lists(st.text("ab.", min_size=1, max_size=8), max_size=4), st.text("ab.", max_size=12))
def test_only_what_is_named_or_below_a_pattern_is_allowed(texts: list[str], host: str) -> None:
    allowed = []
    for text in texts:
        for form in (text, f"*.{text}"):
            try:
                allowed.append(str(parse_endpoint(form)))
            except ValueError:
                continue
    policy = policy_of(allowed)
    expected = any(
        host == one.partition(":")[0]
        or (one.startswith("*.") and host.endswith(one.partition(":")[0][1:]) and host[0] != ".")
        for one in allowed
        if host
    )
    assert policy.allows(host, 443) is expected


def test_private_and_injected_hosts_must_be_among_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"db\.internal may be private, but is not among"):
        policy_of(["api.example.com"], ["db.internal"])
    with pytest.raises(ValueError, match="the token of hub is for"):
        policy_of(["api.example.com"], inject={"hub": ["other.example"]})
    with pytest.raises(ValueError, match="named hosts only"):
        policy_of(["*.example.com"], inject={"hub": ["*.example.com"]})
    with pytest.raises(ValueError, match="no provider"):
        policy_of(["api.example.com"], inject={"": ["api.example.com"]})


def test_a_host_is_private_only_if_it_is_said_of_it() -> None:
    policy = policy_of(
        ["db.internal:5432", "*.svc.example", "x.example"], ["db.internal", "*.svc.example"]
    )
    assert policy.may_be_private("db.internal")
    assert policy.may_be_private("a.svc.example")
    assert not policy.may_be_private("x.example")
    assert not policy.may_be_private("svc.example")


def test_a_policy_is_bounded() -> None:
    with pytest.raises(ValueError, match="hosts"):
        policy_of([f"h{i}.example" for i in range(MAX_NAMES + 1)])
    with pytest.raises(ValueError, match="ports"):
        policy_of([f"h.example:{i}" for i in range(1, MAX_PORTS + 2)])


def test_the_egress_process_reads_the_policy_that_was_written() -> None:
    policy = policy_of(
        ["api.example.com", "*.example.com:80"],
        ["*.example.com"],
        {"hub": ["api.example.com"]},
        EgressLimits(3, 4_096, 1.5),
    )
    assert EgressPolicy.from_json(policy.to_json()) == policy


def test_names_and_loopback_addresses_are_the_same_both_ways() -> None:
    names = tuple(f"h{i:03}.example" for i in range(MAX_NAMES))
    addresses = [loopback.address_of(i) for i in range(MAX_NAMES)]
    assert len(set(addresses)) == MAX_NAMES
    assert [loopback.name_at(address, names) for address in addresses] == list(names)
    for other in (loopback.PROXY_ADDRESS, loopback.DNS_ADDRESS, "127.0.0.1", "127.255.255.254"):
        assert other not in addresses
        assert loopback.name_at(other, names) is None


def test_a_name_with_a_pattern_below_it_is_not_kept_from_the_proxy() -> None:
    names = ("example.com", "api.example.com", "other.example")
    assert loopback.names_past_proxy(names, ["*.example.com"])[3:] == ["other.example"]
    assert loopback.names_past_proxy(names, [])[3:] == list(names)


@pytest.mark.parametrize(
    ("place", "addresses", "port"),
    [
        ("127.0.0.1", ("127.0.0.1",), 443),
        ("127.0.0.1:8443", ("127.0.0.1",), 8443),
        ("[::1]:8443", ("::1",), 8443),
        ("127.0.0.1,[::1]:80", ("127.0.0.1", "::1"), 80),
    ],
)
def test_a_reroute_says_where_a_host_is(place: str, addresses: tuple[str, ...], port: int) -> None:
    found = parse_reroute("api.example.com", place)
    assert (found.addresses, found.port) == (addresses, port)


@pytest.mark.parametrize(
    "place", ["", ":80", "localhost", "1.2.3.4:", "1.2.3.4:0", "::1", "1.2.3.4:x"]
)
def test_a_wrong_reroute_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="write ADDRESS"):
        parse_reroute("api.example.com", place)


# -- tickets ---------------------------------------------------------------------------------------


def test_a_ticket_is_good_for_its_worker_and_its_jail_alone() -> None:
    key, other = b"k" * 32, b"o" * 32
    ticket = messages.ticket(key, 7)
    assert messages.worker_of(key, "worker-7", ticket) == 7
    for name, given_ticket, with_key in [
        ("worker-8", ticket, key),
        ("worker-7", ticket, other),
        ("worker-7", ticket[:-1], key),
        ("worker-7", "", key),
        ("worker-7", "é" * 32, key),
        ("worker-", ticket, key),
        ("worker-+7", ticket, key),
        ("worker-７", ticket, key),
        ("worker-" + "9" * 40, ticket, key),
        ("7", ticket, key),
    ]:
        assert messages.worker_of(with_key, name, given_ticket) is None, name


# -- learning --------------------------------------------------------------------------------------


def test_learning_gives_the_lines_that_would_allow_it() -> None:
    learned = Learned({"kit": policy_of(["a.example"]), "other": EgressPolicy()})
    refused = "is not allowed for toolkit kit"
    assert learned.note("kit", "api.example.com", 8443, refused)
    assert not learned.note("kit", "api.example.com", 8443, refused)
    assert not learned.note("kit", "api.example.com", None, refused)  # its port is known
    assert learned.note("kit", "db.example", None, refused)
    assert learned.note("kit", "a.example", 443, "resolves to a private address")
    assert learned.lines("kit") == [
        'egress = ["a.example:443", "api.example.com:8443", "db.example:443"]',
        'private-ok = ["a.example"]',
    ]
    assert learned.options("kit") == [
        "--allow api.example.com:8443",
        "--allow db.example:443",
        "--private-ok a.example",
    ]
    assert learned.toolkits() == ["kit"]


def test_what_no_line_could_allow_is_not_learned() -> None:
    learned = Learned({"kit": policy_of(["a.example"])})
    for host, port, reason in [
        ("", None, "has more than 64 connections at once"),
        ("169.254.169.254", 80, "is not allowed for toolkit kit"),
        ("a.example", 443, "resolves to a cloud metadata address"),
        ("a.example", 443, "was asked for with another TLS server name"),
        ('x", "*', 443, "is not allowed for toolkit kit"),
    ]:
        assert not learned.note("kit", host, port, reason)
    assert learned.toolkits() == []


def test_a_toolkit_cannot_fill_the_memory_with_names() -> None:
    learned = Learned({"kit": EgressPolicy()})
    taken = [learned.note("kit", f"h{i}.example", 443, "") for i in range(2 * MAX_HOSTS)]
    assert sum(taken) == MAX_HOSTS
