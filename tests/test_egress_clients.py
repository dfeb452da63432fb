"""Clients as they are reach what the policy names and nothing else, and learn at once of the rest.

The clients run in a real jail. What they reach are servers of this machine (`standins`), put in the
place of the names by `Reroute`; TLS is theirs from end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import standins
import trustme
from conftest import NodeMaker, ServedNode, Ticket, toolkit_text

from atp_sandbox import loopback
from atp_sandbox.egress.budget import Budget
from atp_sandbox.egress.connection import Connection, Tls
from atp_sandbox.egress.dial import SystemResolver
from atp_sandbox.egress.gate import Gate
from atp_sandbox.limits import KIB
from atp_sandbox.policy import EgressLimits, EgressPolicy, Reroute, parse_reroute, policy_of

pytestmark = pytest.mark.xdist_group("egress_clients")

AT_ONCE_S = 15.0
"""What is refused takes milliseconds, the start of a process on a busy machine included some
seconds; whoever waits in vain takes the twenty of the clients' own patience."""
TOGETHER = 40
NOT_ALLOWED = "is not allowed for toolkit kit"
TEXT = toolkit_text("import aiohttp, asyncio, http.client, httpx, requests, smtplib, websocket\n")
"""Imported before the calls, as toolkits do; `aiohttp` without `trust_env`."""


@dataclass(slots=True)
class World:
    """The stand-ins and where each is."""

    ca: str
    """PEM; nothing else vouches for the stand-ins."""
    fingerprint: str
    """SHA-256 of the certificate that the stand-ins show."""
    reroutes: list[Reroute]
    ends_first: standins.EndsFirst
    web: standins.StandIn


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    authority = trustme.CA()
    certificate = authority.issue_cert("example.com", "*.example.com", "a.b.example.com")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    der = ssl.PEM_cert_to_DER_cert(certificate.cert_chain_pems[0].bytes().decode())
    ends_first = standins.EndsFirst()
    with contextlib.ExitStack() as stack:
        reroutes: list[Reroute] = []

        def put(names: str, place: str) -> None:
            reroutes.extend(parse_reroute(name, place) for name in names.split())

        def stand(names: str, talk: standins.Talk, address: str = "127.0.0.1") -> standins.StandIn:
            server = standins.StandIn(talk, address)
            stack.callback(server.close)
            put(names, server.place)
            return server

        https = standins.in_tls(context, standins.talk_http)
        sites = "example.com", "api.example.com", "a.example.com", "a.b.example.com"
        web = stand(" ".join(f"{host}:443" for host in sites), https)
        stand(" ".join(f"{host}:80" for host in sites), standins.talk_http)
        stand("six.example.com:443 w.example.com:443", https, "::1")
        stand("six.example.com:80 w.example.com:80", standins.talk_http, "::1")
        stand("mail.example.com:587", standins.talk_smtp(context))
        stand("db.example.com:5432", standins.talk_postgres(context))
        stand("raw.example.com:7001", standins.talk_echo)
        stand("raw.example.com:7002 mute.example.com:80", standins.talk_digest)
        stand("raw.example.com:7003 stream.example.com:80", standins.talk_stream)
        stand("raw.example.com:7004", ends_first.talk)
        stand("raw.example.com:7005", standins.talk_slowly)
        stand("raw.example.com:7006", standins.talk_not)
        stand("raw.example.com:7008", standins.Meeting(TOGETHER).talk)
        stand("raw.example.com:7009", standins.Meeting(2).talk)
        holder, refusing = standins.refused_port()
        stack.callback(holder.close)
        put("raw.example.com:7007 r.example.com:443 r.example.com:80", f"127.0.0.1:{refusing}")
        put("public.example.com:443", web.place)
        key = certificate.private_key_pem.bytes()
        chain = b"".join(one.bytes() for one in certificate.cert_chain_pems)
        put("grpc.example.com:443", f"127.0.0.1:{stack.enter_context(_grpc(key, chain))}")
        put("grpc.example.com:50051", f"127.0.0.1:{stack.enter_context(_grpc())}")
        websocket = standins.websocket_server(context)
        put("ws.example.com:443", f"127.0.0.1:{stack.enter_context(websocket)}")
        ca = authority.cert_pem.bytes().decode()
        yield World(ca, hashlib.sha256(der).hexdigest(), reroutes, ends_first, web)


def _grpc(*key_and_chain: bytes) -> contextlib.AbstractContextManager[int]:
    return standins.grpc_server(*key_and_chain)


USUAL = EgressLimits()
TIGHT = EgressLimits(connections=3, bytes=256 * KIB, idle_s=1.0)


def policy(*allowed: str, limits: EgressLimits = USUAL) -> EgressPolicy:
    """All of these, which are on this machine but for `public.example.com`."""
    hosts = {text.partition(":")[0] for text in allowed} - {"public.example.com"}
    return policy_of(allowed, hosts, limits=limits)


NAMED = policy(
    *(f"api.example.com:{port}" for port in (443, 80)),
    *(f"six.example.com:{port}" for port in (443, 80)),
    *("mail.example.com:587", "db.example.com:5432", "ws.example.com:443"),
    *("grpc.example.com:443", "grpc.example.com:50051", "public.example.com:443"),
    *(f"raw.example.com:{port}" for port in range(7001, 7010)),
)
PATTERN = policy("example.com:443", "*.example.com:443", "*.example.com:80")


@pytest.fixture(scope="module")
def named(make_module_node: NodeMaker, world: World) -> ServedNode:
    """Hosts by name; nothing here needs the proxy."""
    return make_module_node(TEXT, egress=NAMED, reroutes=world.reroutes)


@pytest.fixture(scope="module")
def pattern(make_module_node: NodeMaker, world: World) -> ServedNode:
    """All hosts below a domain, and the domain's own."""
    return make_module_node(TEXT, egress=PATTERN, reroutes=world.reroutes)


@pytest.fixture(scope="module")
def tight(make_module_node: NodeMaker, world: World) -> ServedNode:
    allowed = [f"raw.example.com:{port}" for port in (7001, 7003)]
    egress = policy("*.example.com:80", *allowed, limits=TIGHT)
    return make_module_node(TEXT, egress=egress, reroutes=world.reroutes)


@pytest.fixture(scope="module")
def programs(make_module_node: NodeMaker, world: World) -> ServedNode:
    return make_module_node(TEXT, egress=PATTERN, reroutes=world.reroutes, programs=True)


def failed(node: ServedNode, function: Callable[..., Any], *arguments: Any) -> Ticket:
    """A call that ends at once, and with an error."""
    ticket = node.begin_inside(function, *arguments)
    node.finish(ticket)
    assert ticket.failure.error
    assert ticket.seconds < AT_ONCE_S, f"{ticket.failure.error} took {ticket.seconds:.1f} s"
    return ticket


def denied(ticket: Ticket) -> list[tuple[str, int | None, str]]:
    """What the answer says was refused."""
    rows: Any = ticket.failure.details.get("denied", [])
    return [(row["host"], row["port"], row["reason"]) for row in rows]


# -- clients, each a function that runs in the jail: what the server said, and its certificate -----


def requests_get(url: str, ca: str) -> list[str]:
    import hashlib
    import os

    import requests

    path = os.path.join(os.environ["TMPDIR"], "ca.pem")
    with open(path, "w") as file:
        file.write(ca)
    with requests.get(url, verify=path, stream=True, timeout=20) as answer:
        answer.raise_for_status()
        seen = ""
        if url.startswith("https"):
            seen = hashlib.sha256(answer.raw.connection.sock.getpeercert(True)).hexdigest()
        return [answer.text, seen]


def httpx_get(url: str, ca: str) -> list[str]:
    import hashlib
    import ssl

    import httpx

    context = ssl.create_default_context(cadata=ca)
    with httpx.Client(verify=context) as client, client.stream("GET", url) as answer:
        seen = ""
        if url.startswith("https"):
            inner = answer.extensions["network_stream"].get_extra_info("ssl_object")
            seen = hashlib.sha256(inner.getpeercert(True)).hexdigest()
        return [answer.raise_for_status().read().decode(), seen]


def aiohttp_get(url: str, ca: str) -> list[str]:
    import asyncio
    import hashlib
    import ssl

    import aiohttp

    certificates = [b""]

    class Seen(ssl.SSLObject):
        def do_handshake(self) -> None:
            super().do_handshake()
            certificates.append(self.getpeercert(True))

    async def get() -> str:
        context = ssl.create_default_context(cadata=ca)
        context.sslobject_class = Seen
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context) as answer:
            answer.raise_for_status()
            return await answer.text()

    said = asyncio.run(get())
    return [said, hashlib.sha256(certificates[-1]).hexdigest() if certificates[-1] else ""]


def urllib_get(url: str, ca: str) -> list[str]:
    import hashlib
    import ssl
    import urllib.request

    context = ssl.create_default_context(cadata=ca)
    with urllib.request.urlopen(url, context=context, timeout=20) as answer:
        seen = ""
        if url.startswith("https"):
            seen = hashlib.sha256(answer.fp.raw._sock.getpeercert(True)).hexdigest()
        return [answer.read().decode(), seen]


def http_client_get(url: str, ca: str) -> list[str]:
    import hashlib
    import http.client
    import ssl
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    seen = ""
    if parts.scheme == "https":
        context = ssl.create_default_context(cadata=ca)
        connection = http.client.HTTPSConnection(parts.netloc, context=context, timeout=20)
        connection.connect()
        seen = hashlib.sha256(connection.sock.getpeercert(True)).hexdigest()
    else:
        connection = http.client.HTTPConnection(parts.netloc, timeout=20)
    connection.request("GET", parts.path)
    return [connection.getresponse().read().decode(), seen]


def websocket_talk(host: str, ca: str) -> list[str]:
    import hashlib
    import ssl

    import websocket

    context = ssl.create_default_context(cadata=ca)
    connection = websocket.create_connection(
        f"wss://{host}/", sslopt={"context": context}, timeout=20
    )
    connection.send("through a socket")
    seen = hashlib.sha256(connection.sock.getpeercert(True)).hexdigest()
    said = connection.recv()
    connection.close()
    return [said, seen]


def grpc_say(place: str, ca: str) -> str:
    import grpc

    if ca:
        channel = grpc.secure_channel(place, grpc.ssl_channel_credentials(ca.encode()))
    else:
        channel = grpc.insecure_channel(place)
    with channel:
        say = channel.unary_unary("/standin.Echo/Say")
        return say(b"through a channel", timeout=20).decode()


def psycopg_select(mode: str, ca: str) -> list[Any]:
    import os

    import psycopg

    path = os.path.join(os.environ["TMPDIR"], "ca.pem")
    with open(path, "w") as file:
        file.write(ca)
    settings = {"sslmode": mode, "gssencmode": "disable", "connect_timeout": 20}
    if mode != "disable":
        settings["sslrootcert"] = path
    with psycopg.connect(
        host="db.example.com", port=5432, user="u", dbname="d", autocommit=True, **settings
    ) as connection:
        rows = connection.execute("select 1", prepare=True).fetchall()
        return [rows, connection.info.parameter_status("kind")]


def smtp_send(host: str, port: int, ca: str) -> list[Any]:
    import hashlib
    import smtplib
    import ssl

    with smtplib.SMTP(host, port, timeout=20) as mail:
        mail.starttls(context=ssl.create_default_context(cadata=ca))
        seen = hashlib.sha256(mail.sock.getpeercert(True)).hexdigest()
        return [mail.sendmail("a@example.com", ["b@example.com"], "Subject: x\n\nhello"), seen]


def raw_echo(host: str, port: int) -> str:
    import socket

    with socket.create_connection((host, port), timeout=20) as sock:
        sock.sendall(b"straight")
        return sock.recv(100).decode()


HTTP_CLIENTS = [requests_get, httpx_get, aiohttp_get, urllib_get]
ALL_HTTP_CLIENTS = [*HTTP_CLIENTS, http_client_get]


# -- hosts by name ---------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["api.example.com", "six.example.com"])
@pytest.mark.parametrize("get", ALL_HTTP_CLIENTS)
def test_http_client_reaches_an_allowed_name(
    named: ServedNode, world: World, get: Callable[..., Any], host: str
) -> None:
    said, seen = named.inside(get, f"https://{host}/x", world.ca)
    assert (said, seen) == (f"GET /x {host}", world.fingerprint)
    assert named.inside(get, f"http://{host}/x", world.ca) == [f"GET /x {host}", ""]


def test_websocket_client_reaches_an_allowed_name(named: ServedNode, world: World) -> None:
    answer = named.inside(websocket_talk, "ws.example.com", world.ca)
    assert answer == ["through a socket", world.fingerprint]


def test_grpc_reaches_an_allowed_name_in_tls(named: ServedNode, world: World) -> None:
    assert named.inside(grpc_say, "grpc.example.com:443", world.ca) == "through a channel"


def test_grpc_reaches_an_allowed_name_in_the_clear(named: ServedNode) -> None:
    assert named.inside(grpc_say, "grpc.example.com:50051", "") == "through a channel"


@pytest.mark.parametrize(("mode", "kind"), [("disable", "plain"), ("verify-full", "TLS")])
def test_psycopg_reaches_an_allowed_name(
    named: ServedNode, world: World, mode: str, kind: str
) -> None:
    assert named.inside(psycopg_select, mode, world.ca) == [[[1]], kind]


def test_smtplib_hears_the_server_first_and_goes_over_to_tls(
    named: ServedNode, world: World
) -> None:
    answer = named.inside(smtp_send, "mail.example.com", 587, world.ca)
    assert answer == [{}, world.fingerprint]


def test_plain_socket_reaches_an_allowed_name(named: ServedNode) -> None:
    assert named.inside(raw_echo, "raw.example.com", 7001) == "straight"


@pytest.mark.parametrize("lifetime", ["jail", "calls:3"])
def test_clients_reach_an_allowed_name_in_every_lifetime(
    make_node: NodeMaker, world: World, lifetime: str
) -> None:
    node = make_node(TEXT, egress=NAMED, reroutes=world.reroutes, lifetime=lifetime)
    for _ in range(2):
        said = node.inside(requests_get, "https://api.example.com/x", world.ca)
        assert said == ["GET /x api.example.com", world.fingerprint]
    ticket = failed(node, requests_get, "https://other.example.net/", world.ca)
    assert denied(ticket) == [("other.example.net", 443, NOT_ALLOWED)]
    assert "denied" not in failed(node, refuse_to_work).failure.details


def refuse_to_work() -> None:
    raise ValueError("for a reason of its own")


# -- hosts by pattern ------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["a.example.com", "w.example.com", "a.b.example.com"])
@pytest.mark.parametrize("get", HTTP_CLIENTS)
def test_http_client_reaches_a_host_of_a_pattern(
    pattern: ServedNode, world: World, get: Callable[..., Any], host: str
) -> None:
    said, seen = pattern.inside(get, f"https://{host}/x", world.ca)
    assert (said, seen) == (f"GET /x {host}", world.fingerprint)
    assert pattern.inside(get, f"http://{host}/x?y", world.ca) == [f"GET /x?y {host}", ""]


@pytest.mark.parametrize("get", ALL_HTTP_CLIENTS)
def test_http_client_reaches_a_name_that_has_a_pattern_below_it(
    pattern: ServedNode, world: World, get: Callable[..., Any]
) -> None:
    said, seen = pattern.inside(get, "https://example.com/x", world.ca)
    assert (said, seen) == ("GET /x example.com", world.fingerprint)


def curl(url: str, ca: str) -> list[Any]:
    import os
    import subprocess

    path = os.path.join(os.environ["TMPDIR"], "ca.pem")
    with open(path, "w") as file:
        file.write(ca)
    command = ["/usr/bin/curl", "-sS", "--max-time", "20", "--cacert", path, url]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [done.returncode, done.stdout]


@pytest.mark.skipif(not os.access("/usr/bin/curl", os.X_OK), reason="no curl on this machine")
@pytest.mark.parametrize("url", ["https://a.example.com/x", "http://a.example.com/x"])
def test_curl_reaches_a_host_of_a_pattern(programs: ServedNode, world: World, url: str) -> None:
    assert programs.inside(curl, url, world.ca) == [0, "GET /x a.example.com"]


@pytest.mark.skipif(not os.access("/usr/bin/curl", os.X_OK), reason="no curl on this machine")
def test_curl_is_refused_another_host(programs: ServedNode, world: World) -> None:
    ticket = programs.begin_inside(curl, "https://other.example.net/", world.ca)
    programs.finish(ticket)
    assert "403" in ticket.failure.error
    assert denied(ticket) == [("other.example.net", 443, NOT_ALLOWED)]


# -- streams ---------------------------------------------------------------------------------------


def send_then_end(size: int) -> str:
    import socket

    block = bytes(range(256)) * 256
    with socket.create_connection(("raw.example.com", 7002), timeout=30) as sock:
        for _ in range(size // len(block)):
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)
        return sock.makefile("r").read()


def test_64_mib_go_up_intact_and_are_answered_after_the_clients_end(named: ServedNode) -> None:
    answer = named.inside(send_then_end, standins.STREAM_BYTES)
    assert answer == f"{standins.STREAM_BYTES} {standins.stream_digest()}"


def test_server_answers_a_client_that_ended_without_a_byte(named: ServedNode) -> None:
    assert named.inside(send_then_end, 0) == f"0 {hashlib.sha256(b'').hexdigest()}"


def receive_stream() -> str:
    import hashlib
    import socket

    digest = hashlib.sha256()
    with socket.create_connection(("raw.example.com", 7003), timeout=30) as sock:
        sock.sendall(b"!")
        while data := sock.recv(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def test_64_mib_come_down_intact(named: ServedNode) -> None:
    assert named.inside(receive_stream) == standins.stream_digest()


def hear_end_then_talk() -> str:
    import socket

    with socket.create_connection(("raw.example.com", 7004), timeout=20) as sock:
        said = sock.makefile("r").read()
        sock.sendall(b"and still there is more")
        return said


def test_client_goes_on_after_the_servers_end(named: ServedNode, world: World) -> None:
    assert named.inside(hear_end_then_talk) == "that was all from here"
    named.until(lambda: world.ends_first.heard, "what came after the server's end")
    assert world.ends_first.heard == [b"and still there is more"]


def read_all(port: int) -> str:
    import socket

    with socket.create_connection(("raw.example.com", port), timeout=20) as sock:
        return sock.makefile("r").read()


def test_slow_server_is_heard_to_its_end(named: ServedNode) -> None:
    assert named.inside(read_all, 7005) == "dribble, " * 6


def test_server_that_closes_at_once_reads_as_an_end(named: ServedNode) -> None:
    ticket = named.begin_inside(read_all, 7006)
    named.finish(ticket)
    assert (ticket.value, ticket.seconds < AT_ONCE_S) == ("", True)


def test_server_that_refuses_is_an_error_at_once(named: ServedNode) -> None:
    ticket = failed(named, read_all, 7007)
    assert "reset" in ticket.failure.error
    assert not denied(ticket), "it was allowed"


@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_proxy_says_that_the_server_could_not_be_reached(
    pattern: ServedNode, world: World, scheme: str, port: int
) -> None:
    ticket = failed(pattern, requests_get, f"{scheme}://r.example.com/", world.ca)
    said = f"egress failed: r.example.com:{port} could not be reached"
    assert said in ticket.failure.error
    assert "502" in ticket.failure.error
    assert not denied(ticket), "it was allowed"


def test_jail_does_not_learn_which_address_was_dialled(pattern: ServedNode, world: World) -> None:
    ticket = failed(pattern, requests_get, "http://r.example.com/", world.ca)
    assert "could not be reached: Connection refused" in ticket.failure.error
    assert "127.0.0.1" not in ticket.failure.error


def meet(count: int) -> list[str]:
    import asyncio

    async def one() -> str:
        reader, writer = await asyncio.open_connection("raw.example.com", 7008)
        writer.write(b"!")
        said = await reader.read(100)
        writer.close()
        return said.decode()

    async def all_of_them() -> list[str]:
        async with asyncio.timeout(25):
            return await asyncio.gather(*(one() for _ in range(count)))

    return asyncio.run(all_of_them())


def test_forty_connections_are_open_at_once(named: ServedNode) -> None:
    assert named.inside(meet, TOGETHER) == ["all here"] * TOGETHER


def dribble_hello(host: str, ca: str) -> str:
    import socket
    import ssl

    inbox, outbox = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context(cadata=ca)
    tls = context.wrap_bio(inbox, outbox, server_hostname=host)

    def step(action, *arguments):
        while True:
            try:
                return action(*arguments)
            except ssl.SSLWantReadError:
                for byte in outbox.read():
                    sock.sendall(bytes([byte]))
                inbox.write(sock.recv(65536))

    with socket.create_connection((host, 443), timeout=20) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        step(tls.do_handshake)
        tls.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        return step(tls.read, 65536).decode().rpartition("\r\n")[2]


def test_tls_hello_may_come_byte_by_byte(named: ServedNode, world: World) -> None:
    assert named.inside(dribble_hello, "api.example.com", world.ca) == "GET /slow x"


# -- what is not allowed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("get", "shown"),
    [
        (requests_get, "blocked by policy: other.example.net:443 is not allowed for toolkit kit"),
        (httpx_get, "403 blocked by policy: other.example.net:443"),
        (aiohttp_get, "blocked by policy: other.example.net:443"),
        (urllib_get, "blocked by policy: other.example.net:443"),
    ],
)
def test_http_client_says_that_another_host_is_blocked(
    named: ServedNode, world: World, get: Callable[..., Any], shown: str
) -> None:
    ticket = failed(named, get, "https://other.example.net/", world.ca)
    assert shown in ticket.failure.error
    assert denied(ticket) == [("other.example.net", 443, NOT_ALLOWED)]


def test_plain_http_to_another_host_is_answered_with_403(named: ServedNode, world: World) -> None:
    ticket = failed(named, requests_get, "http://other.example.net/", world.ca)
    assert f"blocked by policy: other.example.net:80 {NOT_ALLOWED}" in ticket.failure.error
    assert denied(ticket) == [("other.example.net", 80, NOT_ALLOWED)]


@pytest.mark.parametrize("get", HTTP_CLIENTS)
def test_other_port_of_a_pattern_is_blocked_and_named(
    pattern: ServedNode, world: World, get: Callable[..., Any]
) -> None:
    ticket = failed(pattern, get, "https://a.example.com:8443/", world.ca)
    assert "blocked by policy: a.example.com:8443" in ticket.failure.error
    assert denied(ticket) == [("a.example.com", 8443, NOT_ALLOWED)]


@pytest.mark.parametrize("get", ALL_HTTP_CLIENTS)
def test_port_that_is_nobodys_is_refused(
    named: ServedNode, world: World, get: Callable[..., Any]
) -> None:
    failed(named, get, "https://api.example.com:8443/", world.ca)


def test_port_of_another_host_is_reset_and_named(named: ServedNode) -> None:
    ticket = failed(named, raw_echo, "api.example.com", 7001)
    assert denied(ticket) == [("api.example.com", 7001, NOT_ALLOWED)]


@pytest.mark.parametrize("address", ["8.8.8.8", "169.254.169.254", "127.0.0.1"])
def test_address_is_out_of_reach_of_a_socket(named: ServedNode, address: str) -> None:
    failed(named, raw_echo, address, 443)


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://8.8.8.8/", "8.8.8.8", 443),
        ("http://169.254.169.254/latest/", "169.254.169.254", 80),
    ],
)
@pytest.mark.parametrize("get", HTTP_CLIENTS)
def test_address_is_out_of_reach_of_an_http_client(
    named: ServedNode, world: World, get: Callable[..., Any], url: str, host: str, port: int
) -> None:
    ticket = failed(named, get, url, world.ca)
    assert "blocked by policy" in ticket.failure.error
    assert denied(ticket) == [(host, port, "is an address, and hosts are allowed by their names")]


def test_name_on_this_machine_is_out_of_reach_unless_that_was_said(
    named: ServedNode, world: World
) -> None:
    before = world.web.accepted
    ticket = failed(named, requests_get, "https://public.example.com/", world.ca)
    ((host, port, reason),) = denied(ticket)
    assert (host, port) == ("public.example.com", 443)
    assert reason.startswith("resolves to a loopback address")
    assert world.web.accepted == before


def handshake(host: str, server_name: str | None) -> str:
    import socket
    import ssl

    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, 443), timeout=20) as sock:
        return context.wrap_socket(sock, server_hostname=server_name).version()


def test_tls_to_another_name_is_reset_and_named(named: ServedNode) -> None:
    ticket = failed(named, handshake, "api.example.com", "other.example.net")
    assert denied(ticket) == [
        ("api.example.com", 443, "was asked for with another TLS server name")
    ]


def test_tls_without_a_name_is_reset_and_named(named: ServedNode) -> None:
    ticket = failed(named, handshake, "api.example.com", None)
    assert denied(ticket) == [("api.example.com", 443, "was asked for without a TLS server name")]


def test_plain_http_at_port_443_is_reset_and_named(named: ServedNode, world: World) -> None:
    ticket = failed(named, requests_get, "http://api.example.com:443/", world.ca)
    assert denied(ticket) == [("api.example.com", 443, "was spoken to at port 443, but not in TLS")]


def tunnel_to_another_name(host: str, server_name: str, ca: str) -> str:
    import http.client
    import os
    import ssl
    from base64 import b64encode
    from urllib.parse import urlsplit

    proxy = urlsplit(os.environ["HTTPS_PROXY"])
    ticket = b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
    connection = http.client.HTTPConnection(proxy.hostname, proxy.port, timeout=20)
    connection.set_tunnel(host, 443, {"Proxy-Authorization": f"Basic {ticket}"})
    connection.connect()
    context = ssl.create_default_context(cadata=ca)
    return context.wrap_socket(connection.sock, server_hostname=server_name).version()


def test_tls_to_another_name_through_a_tunnel_is_reset_and_named(
    pattern: ServedNode, world: World
) -> None:
    ask = tunnel_to_another_name
    assert pattern.inside(ask, "a.example.com", "a.example.com", world.ca).startswith("TLS")
    ticket = failed(pattern, ask, "a.example.com", "api.example.com", world.ca)
    assert denied(ticket) == [("a.example.com", 443, "was asked for with another TLS server name")]


def test_denial_is_told_before_the_client_reads_of_it() -> None:
    told: list[bool] = []
    names = policy_of(["api.example.com:443"])

    async def serve() -> None:
        listener = socket.create_server((loopback.address_of(0), 0))
        with listener, socket.create_connection(listener.getsockname()):
            client, _ = listener.accept()
            client.setblocking(False)
            gate = Gate(1, "kit", names, b"", [], asyncio.Semaphore(1), Budget(1, 1.0))
            connection = Connection(
                gate,
                client,
                SystemResolver(),
                Tls(),
                lambda _gate, _report: told.append(client.fileno() >= 0),
                lambda: None,
            )
            await connection.serve()

    asyncio.run(serve())
    assert told == [True]


# -- names -----------------------------------------------------------------------------------------


def look_up(name: str, how: str) -> list[str]:
    import socket

    if how == "gethostbyname":
        return [socket.gethostbyname(name)]
    kinds = socket.SOCK_STREAM
    return sorted({row[4][0] for row in socket.getaddrinfo(name, 443, type=kinds)})


@pytest.mark.parametrize("how", ["getaddrinfo", "gethostbyname"])
@pytest.mark.parametrize("name", ["api.example.com", "API.Example.COM"])
def test_allowed_name_has_one_loopback_address(named: ServedNode, name: str, how: str) -> None:
    (address,) = named.inside(look_up, name, how)
    assert address.startswith("127.128.")
    assert [address] == named.inside(look_up, "api.example.com", "getaddrinfo")


@pytest.mark.parametrize("how", ["getaddrinfo", "gethostbyname"])
def test_allowed_name_has_its_address_with_a_final_dot(named: ServedNode, how: str) -> None:
    (address,) = named.inside(look_up, "api.example.com.", how)
    assert address.startswith("127.128.")


@pytest.mark.parametrize("how", ["getaddrinfo", "gethostbyname"])
@pytest.mark.parametrize("name", ["other.example.net", "other.example.com", "sub.api.example.com"])
def test_unknown_name_is_unknown_at_once_and_named(named: ServedNode, name: str, how: str) -> None:
    ticket = failed(named, look_up, name, how)
    assert denied(ticket) == [(name, None, NOT_ALLOWED)]


# -- whose denial it is ----------------------------------------------------------------------------


def ask_and_go_on(url: str, ca: str) -> str:
    import requests

    try:
        requests.get(url, timeout=20)
    except requests.RequestException as error:
        return str(error)
    return "reached"


def test_successful_answer_says_nothing_of_what_was_refused(
    named: ServedNode, world: World
) -> None:
    said = named.inside(ask_and_go_on, "https://other.example.net/", world.ca)
    assert "blocked by policy" in said
    assert any(one.host == "other.example.net" for one in named.denials)


def ask_together(name: str, times: int) -> None:
    """Returns from neither call before both have been refused."""
    import contextlib
    import socket

    import requests

    for i in range(times):
        for scheme in ("http", "https"):
            try:
                requests.get(f"{scheme}://{name}-{i}.example.net/", timeout=20)
            except requests.RequestException:
                continue
    with contextlib.suppress(OSError):
        socket.getaddrinfo(f"{name}-looked-up.example.net", 80)
    with socket.create_connection(("raw.example.com", 7009), timeout=20) as sock:
        sock.sendall(b"!")
        assert sock.recv(100) == b"all here"
    raise ValueError("in vain")


def test_denials_of_one_call_never_name_what_another_asked_for(named: ServedNode) -> None:
    tickets = [named.begin_inside(ask_together, name, 2) for name in ("left", "right")]
    named.finish(*tickets)
    for ticket, name in zip(tickets, ("left", "right"), strict=True):
        assert ticket.failure.error == "in vain"
        places = {(f"{name}-{i}.example.net", port) for i in range(2) for port in (80, 443)}
        wanted = {*places, (f"{name}-looked-up.example.net", None)}
        assert {(host, port) for host, port, _ in denied(ticket)} == wanted


# -- limits ----------------------------------------------------------------------------------------


def test_connection_that_moves_too_much_is_ended_and_told(tight: ServedNode) -> None:
    ticket = failed(tight, receive_stream)
    assert "reset" in ticket.failure.error.lower()
    assert denied(ticket) == [("raw.example.com", 7003, "took more than 256 KiB on one connection")]


def wait_idly() -> str:
    import socket

    with socket.create_connection(("raw.example.com", 7001), timeout=20) as sock:
        sock.sendall(b"!")
        assert sock.recv(1) == b"!"
        try:
            return repr(sock.recv(1))
        except ConnectionResetError:
            return "reset"


def test_idle_connection_is_reset(tight: ServedNode) -> None:
    assert tight.inside(wait_idly) == "reset"


def post(size: int) -> str:
    import requests

    answer = requests.post("http://mute.example.com/", data=b"x" * size, timeout=20)
    answer.raise_for_status()
    return answer.text


def test_request_through_the_proxy_that_moves_too_much_is_ended_and_told(
    tight: ServedNode,
) -> None:
    ticket = tight.begin_inside(post, 1024 * KIB)
    tight.finish(ticket)
    reason = "took more than 256 KiB on one connection"
    assert denied(ticket) == [("mute.example.com", 80, reason)]


def test_idle_request_through_the_proxy_is_ended(tight: ServedNode) -> None:
    ticket = tight.begin_inside(post, 1)
    tight.finish(ticket)
    assert "egress failed: mute.example.com:80 was idle for 1 s" in ticket.failure.error
    assert not denied(ticket), "it was allowed"


def download(host: str) -> int:
    import requests

    return len(requests.get(f"http://{host}/", timeout=6).content)


def test_answer_through_the_proxy_that_is_too_large_is_ended_and_told(tight: ServedNode) -> None:
    ticket = failed(tight, download, "stream.example.com")
    reason = "took more than 256 KiB on one connection"
    assert denied(ticket) == [("stream.example.com", 80, reason)]


def hold(count: int) -> str:
    """Holds `count` connections, and says how one more ends."""
    import socket

    held = []
    for _ in range(50 * count):
        # Those of the calls before are given back a little after their end.
        sock = socket.create_connection(("raw.example.com", 7001), timeout=20)
        try:
            sock.sendall(b"!")
            if sock.recv(1):
                held.append(sock)
        except OSError:
            sock.close()
        if len(held) == count:
            break
    assert len(held) == count
    more = socket.create_connection(("raw.example.com", 7001), timeout=20)
    more.sendall(b"!")
    more.recv(1)
    return "there was room for more"


def test_connection_beyond_those_allowed_is_reset_and_told(tight: ServedNode) -> None:
    ticket = failed(tight, hold, 3)
    assert "reset" in ticket.failure.error.lower() or "Broken pipe" in ticket.failure.error
    reason = "has more than 3 connections at once"
    assert ("raw.example.com", 7001, reason) in denied(ticket)
