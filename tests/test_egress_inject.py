"""Tokens put in outside the jail: real clients and a real TLS host, with the relay between them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import io
import queue
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import requests
import trustme

from atp_sandbox.egress import inject
from atp_sandbox.egress.authority import Issuer, make_authority
from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.inject import InjectLimits, serve_injected
from atp_sandbox.egress.meter import Meter
from atp_sandbox.egress.placeholders import PREFIX

HOST = "localhost"
PATIENCE_S = 40.0
PLACEHOLDER = PREFIX + "0123456789abcdef" * 2
ENDED = PREFIX + "f" * 32
TOKEN = "ghp_Zq7XvK2mWb9/RtYu4LsNcD8e"
BIG = 32 * 1024 * 1024
BLOCK = bytes(range(256)) * 256

AUTHORITY = make_authority([HOST])
ISSUER = Issuer(AUTHORITY.cert_pem, AUTHORITY.key_pem)
HOSTS_CA = trustme.CA()


@pytest.fixture(autouse=True)
def no_long_good_byes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that stays connected after a refusal keeps a test for so long."""
    monkeypatch.setattr(inject, "LINGER_S", 0.3)


class Host:
    """The allowed host: answers by path, and records each request and connection."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = 0
        self.ended: queue.Queue[None] = queue.Queue()
        self.started: queue.Queue[None] = queue.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self.answer(reader, writer):
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.transport.abort()
            self.ended.put(None)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        path = head.split()[1].split(b"?")[0]
        if path == b"/early":
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 3\r\n\r\nbig")
            await writer.drain()
            await reader.read()
            return False
        if b"100-continue" in head.lower():
            writer.write(
                b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
            )
        body = await self.body(head, reader)
        self.bodies.append(body)
        await self.respond(path, head, body, writer)
        if path == b"/hang":
            await reader.read()
        return path not in (b"/closes", b"/until-end", b"/cut")

    async def body(self, head: bytes, reader: asyncio.StreamReader) -> bytes:
        lines = head.lower().split(b"\r\n")
        found = bytearray()
        if b"transfer-encoding: chunked" in lines:
            while size := int(await reader.readline(), 16):
                found += (await reader.readexactly(size + 2))[:-2]
                self.started.put(None)
            await reader.readline()
            return bytes(found)
        length = [int(line[15:]) for line in lines if line.startswith(b"content-length:")]
        return await reader.readexactly(length[0]) if length else b""

    async def respond(
        self, path: bytes, head: bytes, body: bytes, writer: asyncio.StreamWriter
    ) -> None:
        start = b"HTTP/1.1 200 OK\r\n"
        if path == b"/down":
            writer.write(start + b"Content-Length: %d\r\n\r\n" % BIG)
            for _ in range(BIG // len(BLOCK)):
                writer.write(BLOCK)
                await writer.drain()
        elif path == b"/echo":  # in chunks of 3 bytes: each token is cut by framing
            parts = [head[at : at + 3] for at in range(0, len(head), 3)]
            chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
            writer.write(start + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        elif path == b"/echo-header":
            value = head.split(b"X-Key: ")[1].split(b"\r\n")[0]
            writer.write(start + b"X-Back: %b\r\nContent-Length: 0\r\n\r\n" % value)
        elif path == b"/echo-reason":
            value = head.split(b"X-Key: ")[1].split(b"\r\n")[0]
            writer.write(b"HTTP/1.1 200 %b\r\nContent-Length: 0\r\n\r\n" % value)
        elif path == b"/204":
            writer.write(b"HTTP/1.1 204 No Content\r\n\r\n")
        elif path == b"/304":
            writer.write(b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n")
        elif path == b"/gzip":
            writer.write(start + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx")
        elif path == b"/until-end":
            writer.write(b"HTTP/1.0 200 OK\r\n\r\nto the end")
        elif path == b"/cut":
            writer.write(start + b"Content-Length: 10\r\n\r\nshort")
        elif path == b"/nonsense":
            writer.write(b"220 smtp ready\r\n\r\n")
        elif path == b"/upgrade":
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n")
        elif path != b"/hang":
            text = b"" if head.startswith(b"HEAD") else hashlib.sha256(body).hexdigest().encode()
            writer.write(start + b"X-Kept: yes\r\nContent-Length: 64\r\n\r\n" + text)
        await writer.drain()


class World:
    """A loop in a thread with the host, and a port whose connections go to `serve_injected`."""

    def __init__(self, folder: Path) -> None:
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(AUTHORITY.cert_pem)
        self.host = Host()
        self.outcomes: queue.Queue[BaseException | None] = queue.Queue()
        self.alive = {PLACEHOLDER.encode(): TOKEN.encode()}
        self.limits = InjectLimits(idle_s=PATIENCE_S, max_bytes=4 * BIG)
        self.meter = Meter()
        self.hosts_name = HOST
        self._certificates: dict[str, ssl.SSLContext] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.do(self._start())

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    async def _start(self) -> None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        HOSTS_CA.issue_cert(self.hosts_name).configure_cert(context)
        self._upstream = await asyncio.start_server(
            self.host.serve, "127.0.0.1", 0, ssl=context, limit=BIG
        )
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept())

    async def _accept(self) -> None:
        while True:
            client, _ = await self._loop.sock_accept(self._listener)
            client.setblocking(False)
            task = asyncio.create_task(self._serve(client))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, client: socket.socket) -> None:
        context = ssl.create_default_context()
        HOSTS_CA.configure_trust(context)
        try:
            await serve_injected(
                client,
                host=HOST,
                port=self.port,
                server_context=ISSUER.context(HOST),
                upstream_context=context,
                dial=self.dial,
                secrets=lambda: dict(self.alive),
                limits=self.limits,
                meter=self.meter,
            )
        except BaseException as error:
            self.outcomes.put(error)
        else:
            self.outcomes.put(None)

    async def dial(self) -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await self._loop.sock_connect(sock, self._upstream.sockets[0].getsockname())
        return sock

    async def _stop(self) -> None:
        self._accepting.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._accepting, *self._tasks, return_exceptions=True)
        self._listener.close()
        self._upstream.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await asyncio.sleep(0)  # for transports that were aborted to be closed

    def close(self) -> None:
        self.do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    def trust(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.ca))
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of Python 3.13
        return context

    def connect(self, name: str = HOST) -> ssl.SSLSocket:
        plain = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
        try:
            return self.trust().wrap_socket(plain, server_hostname=name)
        finally:
            plain.close()

    def request(self, path: str = "/", *lines: str, method: str = "GET") -> bytes:
        head = [f"{method} {path} HTTP/1.1", f"Host: {HOST}:{self.port}", *lines, "", ""]
        return "\r\n".join(head).encode()

    def say(self, data: bytes) -> bytes:
        """All bytes that one connection gives back for `data`, until it is ended."""
        with self.connect() as client:
            client.sendall(data)
            return read_all(client)

    def outcome(self) -> BaseException | None:
        """How the next connection to end did."""
        return self.outcomes.get(timeout=PATIENCE_S)

    def denied(self) -> str:
        error = self.outcome()
        assert isinstance(error, Denied), error
        return error.reason

    def failed(self) -> str:
        error = self.outcome()
        assert isinstance(error, Failed), error
        return error.reason


def read_all(client: ssl.SSLSocket) -> bytes:
    found = b""
    try:
        while data := client.recv(65536):
            found += data
    except (ConnectionError, ssl.SSLError):
        pass
    return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


# Each client posts `body` with the header `X-Key`, and gives the status and the answer's body.
Client = Callable[[World, str, bytes], tuple[int, bytes]]
KEY = {"X-Key": PLACEHOLDER}


def with_requests(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    with requests.Session() as session:
        answer = session.post(world.url + path, data=body, headers=KEY, verify=str(world.ca))
        return answer.status_code, answer.content


def with_requests_chunked(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    parts = (body[at : at + 65536] for at in range(0, len(body), 65536))
    with requests.Session() as session:
        answer = session.post(world.url + path, data=parts, headers=KEY, verify=str(world.ca))
        return answer.status_code, answer.content


def with_httpx(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    with httpx.Client(verify=world.trust(), timeout=PATIENCE_S) as client:
        answer = client.post(world.url + path, content=body, headers=KEY)
        return answer.status_code, answer.content


def with_aiohttp(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    async def post() -> tuple[int, bytes]:
        async with (
            aiohttp.ClientSession() as session,
            session.post(
                world.url + path,
                data=io.BytesIO(body),
                headers=KEY,
                ssl=world.trust(),
                expect100=True,
            ) as answer,
        ):
            return answer.status, await answer.read()

    return asyncio.run(post())


def with_urllib(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    request = urllib.request.Request(world.url + path, body, KEY, method="PUT")
    with urllib.request.urlopen(request, context=world.trust(), timeout=PATIENCE_S) as answer:
        return answer.status, answer.read()


def with_curl(world: World, path: str, body: bytes) -> tuple[int, bytes]:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    command = ["curl", "-sS", "--cacert", str(world.ca), "-H", f"X-Key: {PLACEHOLDER}"]
    command += ["-H", "Expect: 100-continue", "--data-binary", "@-", "-w", "%{http_code}"]
    ran = subprocess.run([*command, world.url + path], input=body, capture_output=True, check=True)
    return int(ran.stdout[-3:]), ran.stdout[:-3]


CLIENTS = [
    with_requests,
    with_requests_chunked,
    with_httpx,
    with_aiohttp,
    with_urllib,
    with_curl,
]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("size", [1, BIG])
def test_real_clients_upload_and_the_host_sees_the_token(
    world: World, client: Client, size: int
) -> None:
    body = (BLOCK * (size // len(BLOCK) + 1))[:size]
    status, answer = client(world, "/", body)
    assert (status, answer) == (200, hashlib.sha256(body).hexdigest().encode())
    (head,) = world.host.heads
    assert f"X-Key: {TOKEN}\r\n".encode() in head
    assert b"Accept-Encoding: identity" in head
    assert PREFIX.encode() not in head


@pytest.mark.parametrize("client", CLIENTS)
def test_real_clients_download_much(world: World, client: Client) -> None:
    status, answer = client(world, "/down", b"x")
    assert status == 200
    assert answer == BLOCK * (BIG // len(BLOCK))
    assert world.meter.received_bytes > BIG


def test_many_requests_share_both_connections(world: World) -> None:
    with requests.Session() as session:
        session.trust_env = False  # an environment with a CA bundle wins over `verify` below
        session.verify = str(world.ca)
        for _ in range(5):
            assert session.get(world.url, headers=KEY).headers["X-Kept"] == "yes"
            assert session.head(world.url).status_code == 200
            assert session.get(f"{world.url}/204").status_code == 204
            assert session.get(f"{world.url}/304").status_code == 304
    assert world.outcome() is None
    assert len(world.host.heads) == 20
    assert world.host.connections == 1


def test_requests_sent_at_once_are_answered_in_order(world: World) -> None:
    both = world.request("/204") + world.request("/", "Connection: close")
    answer = world.say(both)
    assert answer.index(b" 204 ") < answer.index(b" 200 ")


@pytest.mark.parametrize("first", ["GET", "HEAD"])
def test_a_refusal_of_a_later_request_is_answered_too(world: World, first: str) -> None:
    answer = world.say(world.request("/204", method=first) + b"nonsense\r\n\r\n")
    assert answer.index(b" 204 ") < answer.index(b" 403 blocked by policy: ")
    assert answer.endswith(b"proper HTTP/1.1\n")
    world.denied()


def test_a_host_that_ended_between_requests_is_dialled_again(world: World) -> None:
    connection = http.client.HTTPSConnection(HOST, world.port, context=world.trust())
    for _ in range(3):
        connection.request("GET", "/closes", headers=KEY)
        assert connection.getresponse().read()
        world.host.ended.get(timeout=PATIENCE_S)
    connection.close()
    assert world.host.connections == 3


def test_an_answer_that_ends_with_its_connection_is_whole(world: World) -> None:
    assert requests.get(f"{world.url}/until-end", verify=str(world.ca)).text == "to the end"


def test_an_answer_that_was_cut_short_is_seen_to_be(world: World) -> None:
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        requests.get(f"{world.url}/cut", verify=str(world.ca))
    assert "ended the connection" in world.failed()


def test_a_client_that_waits_is_told_to_continue_by_the_host(world: World) -> None:
    with world.connect() as client:
        head = world.request("/", "Content-Length: 1", "Expect: 100-continue", method="PUT")
        client.sendall(head)
        assert client.recv(1000) == b"HTTP/1.1 100 \r\n\r\n"
        client.sendall(b"x")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize("expect", [[], ["Expect: 100-continue"]])
def test_an_answer_before_the_end_of_the_body_reaches_the_client(
    world: World, expect: list[str]
) -> None:
    with world.connect() as client:
        client.sendall(world.request("/early", "Content-Length: 1000000", *expect, method="PUT"))
        client.sendall(b"" if expect else b"x" * 1000)
        answer = client.recv(1000)
        assert answer.startswith(b"HTTP/1.1 413 Too Large\r\n")
        assert b"Connection: close" in answer
    assert world.outcome() is None


def test_basic_credentials_hold_the_token_at_the_host(world: World) -> None:
    requests.get(world.url, auth=("user", PLACEHOLDER), verify=str(world.ca))
    expected = base64.b64encode(f"user:{TOKEN}".encode())
    assert b"Authorization: Basic " + expected in world.host.heads[0]


@pytest.mark.parametrize("path", ["/echo", "/echo-header", "/echo-reason"])
def test_a_host_that_echoes_the_token_does_not_give_it_to_the_client(
    world: World, path: str
) -> None:
    received = world.say(world.request(path, f"X-Key: {PLACEHOLDER}", "Connection: close"))
    assert world.denied() == "the answer holds the token"
    assert TOKEN.encode() in world.host.heads[0]
    assert all(TOKEN[at : at + 4].encode() not in received for at in range(len(TOKEN) - 3))


def test_a_host_that_echoes_basic_credentials_does_not_give_them(world: World) -> None:
    encoded = base64.b64encode(f"me:{PLACEHOLDER}".encode()).decode()
    received = world.say(world.request("/echo", f"Authorization: Basic {encoded}"))
    assert world.denied() == "the answer holds the token"
    assert base64.b64encode(f"me:{TOKEN}".encode())[8:20] not in received


def test_a_token_is_found_after_its_call_has_ended(world: World) -> None:
    with world.connect() as client:
        client.sendall(world.request("/", f"X-Key: {PLACEHOLDER}"))
        assert client.recv(1000)
        world.alive = {}
        client.sendall(world.request("/echo", f"X-Other: {TOKEN}"))
        assert TOKEN.encode() not in read_all(client)
    assert world.denied() == "the answer holds the token"


def test_a_compressed_answer_is_refused_and_parts_are_not_asked_for(world: World) -> None:
    answer = world.say(world.request("/gzip", "Range: bytes=0-3", "Accept-Encoding: gzip"))
    assert answer.startswith(b"HTTP/1.1 403 blocked by policy: an answer that is compressed")
    assert b"range" not in world.host.heads[0].lower()
    assert b"gzip" not in world.host.heads[0].split(b"\r\n", 1)[1]
    world.denied()


@pytest.mark.parametrize(
    "lines",
    [
        [f"X-Key: {ENDED}"],
        [f"Authorization: Bearer {ENDED}"],
        ["Authorization: Basic " + base64.b64encode(f"u:{ENDED}".encode()).decode()],
        [f"{PLACEHOLDER}: x"],
        [f"Range: {ENDED}"],
    ],
)
def test_a_placeholder_that_is_not_alive_or_misplaced_is_refused(
    world: World, lines: list[str]
) -> None:
    answer = world.say(world.request("/", *lines))
    assert answer.startswith(b"HTTP/1.1 403 blocked by policy: a placeholder")
    assert "placeholder" in world.denied()
    assert world.host.connections == 0


def test_a_placeholder_in_the_query_is_refused(world: World) -> None:
    answer = requests.get(world.url, params={"key": PLACEHOLDER}, verify=str(world.ca))
    assert answer.status_code == 403
    assert answer.reason.startswith("blocked by policy: a placeholder outside")
    assert world.host.connections == 0
    world.denied()


@pytest.mark.parametrize("before", [0, 100_000, 3_000_000])
@pytest.mark.parametrize("is_chunked", [True, False])
def test_a_placeholder_in_a_body_is_refused_and_the_request_never_whole(
    world: World, before: int, is_chunked: bool
) -> None:
    body = b"x" * before + PLACEHOLDER.encode()
    data: Any = iter([body[:-20], body[-20:]]) if is_chunked else body
    answer = requests.post(world.url, data=data, verify=str(world.ca))
    assert answer.status_code == 403
    assert world.denied() == "a placeholder in the body of a request"
    assert world.host.bodies == []


@pytest.mark.parametrize(
    "text",
    [
        "GET / HTTP/1.1\r\nHost: other.example\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",  # the port is not 443
        "GET / HTTP/1.1\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {own}\r\nHost: {own}\r\n\r\n",
        "GET https://other.example/ HTTP/1.1\r\nHost: {own}\r\n\r\n",
        "GET * HTTP/1.1\r\nHost: {own}\r\n\r\n",
        "CONNECT {own} HTTP/1.1\r\nHost: {own}\r\n\r\n",
        "TRACE / HTTP/1.1\r\nHost: {own}\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {own}\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        "POST / HTTP/1.1\r\nHost: {own}\r\nContent-Length: 3\r\nTransfer-Encoding: chunked"
        "\r\n\r\n0\r\n\r\nGET /second HTTP/1.1\r\nHost: {own}\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {own}\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: {own}\r\nContent-Length : 3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nHost: {own}\r\nContent-Length: +3\r\n\r\nabc",
        "GET / HTTP/1.1\r\nHost: {own}\r\nX: a\0b\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: {own}\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n",
        "\x16\x03\x01",
        "GET / HTTP/1.1\r\nHost: {own}\r\nX: " + "a" * 70_000 + "\r\n\r\n",
    ],
)
def test_a_request_for_another_host_or_of_doubtful_form_is_refused(world: World, text: str) -> None:
    answer = world.say(text.replace("{own}", f"{HOST}:{world.port}").encode() + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 403 blocked by policy: ")
    assert answer.count(b"HTTP/1.1") == 1 + answer.count(b"proper HTTP/1.1")
    world.denied()
    assert world.host.connections == 0


@pytest.mark.parametrize(
    "lines",
    [
        ["X: a\r\n b: c"],  # folded
        ["X: a\nTransfer-Encoding: chunked"],  # a bare line feed
        ["Connection: content-length, transfer-encoding, host", "Content-Length: 0"],
        ["Upgrade: websocket", "Connection: upgrade"],
    ],
)
def test_shapes_that_readers_differ_on_reach_the_host_as_one_plain_request(
    world: World, lines: list[str]
) -> None:
    data = world.request("/", *lines) + b"0\r\n\r\n" + world.request("/second")
    with world.connect() as client:
        client.sendall(data)
        assert client.recv(1000)
    world.outcome()
    head = world.host.heads[0]
    assert b"\n" not in head.replace(b"\r\n", b"")
    assert b"\r\n " not in head
    assert head.lower().count(b"\nhost:") == 1
    assert b"upgrade" not in head.lower()


def test_an_upgrade_that_the_host_agrees_to_is_refused(world: World) -> None:
    assert world.say(world.request("/upgrade")).startswith(b"HTTP/1.1 502 ")
    world.failed()


def test_a_body_is_framed_anew_and_trailers_are_dropped(world: World) -> None:
    lines = ("Transfer-Encoding: chunked", "Trailer: X-Key", "Connection: close")
    body = f"3;a={PLACEHOLDER}\r\nabc\r\n0\r\nX-Key: {PLACEHOLDER}\r\n\r\n".encode()
    answer = world.say(world.request("/", *lines, method="POST") + body)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert world.host.bodies == [b"abc"]
    assert b"railer" not in world.host.heads[0]


@pytest.mark.parametrize("name", ["other.example", None])
def test_tls_for_another_name_is_refused(world: World, name: str | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", world.port), PATIENCE_S) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
    ):
        context.wrap_socket(plain, server_hostname=name)
    assert world.denied() == "TLS for another host's name"


def test_a_client_that_does_not_trust_the_authority_is_sent_nothing(world: World) -> None:
    with pytest.raises(requests.exceptions.SSLError):
        requests.get(world.url)
    world.failed()


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b""])
def test_a_client_that_does_not_speak_tls_is_ended(world: World, greeting: bytes) -> None:
    with socket.create_connection(("127.0.0.1", world.port), PATIENCE_S) as plain:
        plain.sendall(greeting)
        plain.shutdown(socket.SHUT_WR)
        assert plain.recv(100)[:1] in (b"", b"\x15")  # an alert
    world.failed()


def test_a_host_whose_certificate_is_not_valid_gets_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.HOSTS_CA", trustme.CA())
    world = World(tmp_path)  # whose host has a certificate of this authority
    monkeypatch.setattr(f"{__name__}.HOSTS_CA", trustme.CA())  # and this one is trusted
    try:
        answer = requests.get(world.url, headers=KEY, verify=str(world.ca))
        assert answer.status_code == 502
        assert answer.reason.startswith("the host's certificate: ")
        assert world.failed() == answer.reason
        assert world.host.heads == []
    finally:
        world.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(111, "refused"), "502 the host cannot be reached: ECONNREFUSED"),
        (Failed("no route"), "502 no route"),
        (Denied("an address inside"), "403 blocked by policy: an address inside"),
    ],
)
def test_a_host_that_is_not_dialled_is_told_in_the_status_line(
    world: World, error: Exception, status: str
) -> None:
    async def dial() -> socket.socket:
        raise error

    world.dial = dial  # type: ignore[method-assign]
    answer = requests.get(world.url, verify=str(world.ca))
    assert f"{answer.status_code} {answer.reason}" == status
    assert isinstance(world.outcome(), Denied | Failed)


def test_a_host_that_does_not_speak_http_is_answered_for(world: World) -> None:
    assert world.say(world.request("/nonsense")).startswith(b"HTTP/1.1 502 the host's answer")
    world.failed()


@pytest.mark.parametrize(
    "text", ["GET /hang HTTP/1.1\r\nHost: {own}\r\n\r\n", "GET /hang HTTP/1.1\r\nHost: "]
)
def test_a_connection_on_which_nothing_moves_is_ended(world: World, text: str) -> None:
    world.limits = InjectLimits(idle_s=0.3, max_bytes=BIG)
    answer = world.say(text.replace("{own}", f"{HOST}:{world.port}").encode())
    assert answer.startswith(b"HTTP/1.1 504 no byte moved in 0.3 s")
    assert "no byte moved" in world.failed()


def test_a_kept_connection_that_is_not_used_ends_in_silence(world: World) -> None:
    world.limits = InjectLimits(idle_s=0.3, max_bytes=BIG)
    assert world.say(world.request()).count(b"HTTP/1.1") == 1
    assert world.outcome() is None


def test_a_client_that_does_not_read_is_ended(world: World) -> None:
    world.limits = InjectLimits(idle_s=0.5, max_bytes=4 * BIG)
    with world.connect() as client:
        client.sendall(world.request("/down"))
        assert "no byte moved" in world.failed()


def test_a_body_that_comes_slowly_is_passed_on_as_it_comes(world: World) -> None:
    with world.connect() as client:
        client.sendall(world.request("/", "Transfer-Encoding: chunked", method="POST"))
        for _ in range(3):
            client.sendall(b"1\r\nx\r\n")
            world.host.started.get(timeout=PATIENCE_S)  # before the next is sent
        client.sendall(b"0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
    assert world.host.bodies == [b"xxx"]


@pytest.mark.parametrize("path", ["/", "/down"])
def test_a_connection_moves_no_more_than_its_limit(world: World, path: str) -> None:
    world.limits = InjectLimits(idle_s=PATIENCE_S, max_bytes=1_000_000)
    size = 2_000_000 if path == "/" else 1
    head = world.request(path, f"Content-Length: {size}", method="POST")
    received = world.say(head + b"x" * size)
    assert world.denied() == "more than 1000000 bytes on one connection"
    assert len(received) < 1_000_000
    assert world.meter.sent_bytes + world.meter.received_bytes < 1_200_000


def test_a_client_that_goes_away_is_no_fault(world: World) -> None:
    with world.connect() as client:
        client.sendall(world.request("/", "Content-Length: 100", method="POST"))
    assert world.outcome() is None
    world.host.ended.get(timeout=PATIENCE_S)


def test_a_host_that_would_not_be_verified_is_refused_at_once(world: World) -> None:
    ours, theirs = socket.socketpair()
    careless = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    careless.check_hostname = False
    work = serve_injected(
        ours,
        host=HOST,
        port=443,
        server_context=ISSUER.context(HOST),
        upstream_context=careless,
        dial=world.dial,
        secrets=dict,
        limits=world.limits,
        meter=Meter(),
    )
    with theirs, pytest.raises(ValueError, match="verified"):
        world.do(work)


@pytest.mark.parametrize("hosts", [[], ["127.0.0.1"], ["a.*.example"]])
def test_an_authority_is_for_named_hosts_only(hosts: list[str]) -> None:
    with pytest.raises(ValueError, match="names"):
        make_authority(hosts)


def test_an_authority_speaks_for_its_hosts_only() -> None:
    authority = make_authority(["api.example.com", "*.example.org"])
    issuer = Issuer(authority.cert_pem, authority.key_pem)
    assert issuer.context("api.example.com") is issuer.context("api.example.com")
    assert issuer.context("a.example.org")
    for other in ("example.com", "evil-api.example.com", "example.net"):
        with pytest.raises(ValueError, match="not for this host"):
            issuer.context(other)
    assert "PRIVATE" not in repr(authority)
