"""The link against real servers: the `websockets` library, and scripted ones for the rest."""

from __future__ import annotations

import email.utils
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from select import select
from typing import TypeVar

import pytest
import trustme
from scripted import PATIENCE_S, ScriptedServer
from websockets.sync.server import ServerConnection, serve

from atp_sandbox.atp.address import LinkAddress, parse_retry_after, redact
from atp_sandbox.atp.connection import LinkTimings
from atp_sandbox.atp.link import (
    Connected,
    Connecting,
    Disconnected,
    Link,
    LinkEvent,
    Refused,
)
from atp_sandbox.errors import UsageError
from atp_sandbox.loop import Loop

KEY = "S3CRET/key+x?y"
FAST = LinkTimings(backoff_first_s=0.02, backoff_cap_s=0.16)
T = TypeVar("T")


class Client:
    """A link on a loop, with everything that it reported."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.events: list[LinkEvent] = []
        self.messages: list[bytes] = []
        self.read: list[int] = []
        self.link: Link = None  # type: ignore[assignment]

    def start(
        self,
        url: str,
        timings: LinkTimings = FAST,
        jitter: Callable[[float, float], float] = lambda _low, high: high,
        generation: str = "0.2",
        key: str = KEY,
    ) -> Link:
        self.link = Link(
            self.loop,
            LinkAddress(url, key, generation),
            on_message=self.messages.append,
            on_state=self.events.append,
            on_read=self.read.append,
            timings=timings,
            jitter=jitter,
        )
        self.link.start()
        return self.link

    def until(self, condition: Callable[[], object]) -> None:
        assert self.loop.run_until(lambda: bool(condition()), PATIENCE_S), self.events

    def saw(self, kind: type[LinkEvent], times: int = 1) -> list[LinkEvent]:
        self.until(lambda: sum(isinstance(event, kind) for event in self.events) >= times)
        return [event for event in self.events if isinstance(event, kind)]

    def beside(self, work: Callable[[], T]) -> T:
        """What `work` gives, run in a thread while the loop runs."""
        results: list[T] = []

        def run() -> None:
            results.append(work())
            self.loop.call_from_thread(lambda: None)  # wakes it

        threading.Thread(target=run, daemon=True).start()
        self.until(lambda: results)
        return results[0]


@pytest.fixture
def client() -> Iterator[Client]:
    loop = Loop()
    made = Client(loop)
    yield made
    if made.link is not None:
        made.link.close()
        loop.run_until(lambda: made.link.closed, 5)
    loop.close()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    made = ScriptedServer()
    yield made
    made.close()


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ssl.SSLContext:
    """A server's context, signed by an authority that the process trusts."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    return context


@pytest.fixture
def tls_server(tls: ssl.SSLContext) -> Iterator[ScriptedServer]:
    made = ScriptedServer(tls)
    yield made
    made.close()


@pytest.fixture(params=["tcp", "tls"])
def echo_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A `websockets` server that greets and then echoes, over TCP and over TLS."""
    context = request.getfixturevalue("tls") if request.param == "tls" else None

    def talk(connection: ServerConnection) -> None:
        connection.send("hello")
        for message in connection:
            connection.send(message)

    with ExitStack() as stack:
        running = stack.enter_context(
            serve(talk, "127.0.0.1", 0, ssl=context, max_size=None, compression=None)
        )
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        stack.callback(thread.join, 5)
        stack.callback(running.shutdown)
        scheme = "https" if context else "http"
        yield f"{scheme}://127.0.0.1:{running.socket.getsockname()[1]}"


# --- the address


@pytest.mark.parametrize(
    ("base_url", "generation", "url"),
    [
        ("http://h:1", "0.1", "ws://h:1/ws/v1/atp/K/"),
        ("https://h", "0.2", "wss://h/ws/v1/atp/toolkit-client/K/"),
        ("HTTPS://h/", "0.1", "wss://h/ws/v1/atp/K/"),
        ("http://h///", "0.1", "ws://h/ws/v1/atp/K/"),
        ("http://h/prefix/", "0.1", "ws://h/prefix/ws/v1/atp/K/"),
        ("http://[::1]:8", "0.1", "ws://[::1]:8/ws/v1/atp/K/"),
    ],
)
def test_the_url_is_made_of_base_path_and_key(base_url: str, generation: str, url: str) -> None:
    address = LinkAddress(base_url, "K", generation)
    assert address.url() == url
    assert address.redacted == url.replace("/K/", "/***/")


def test_the_key_is_put_in_as_it_is_and_never_shown() -> None:
    address = LinkAddress("http://user:pass@h", KEY)
    assert address.url().endswith(f"/toolkit-client/{KEY}/")
    assert "S3CRET" not in repr(address)
    assert address.redacted == "ws://***@h/ws/v1/atp/toolkit-client/***/"


@pytest.mark.parametrize(
    ("base_url", "key"),
    [
        ("http://h", ""),
        ("http://h", "k\r\nX: y"),
        ("http://h", "k\x00"),
        ("http://h", "k\ud800"),
        ("http://h\n", "k"),
        ("http://a b", "k"),
        ("http://h?x=1", "k"),
        ("http://h#x", "k"),
        ("127.0.0.1:80", "k"),
        ("ws://h", "k"),
        ("ftp://h", "k"),
        ("http://", "k"),
        ("http:///p", "k"),
        ("http://h:port", "k"),
        ("http://[::1", "k"),
        ("", "k"),
    ],
)
def test_an_address_that_cannot_be_is_refused_with_a_tip(base_url: str, key: str) -> None:
    with pytest.raises(UsageError) as caught:
        LinkAddress(base_url, key)
    assert caught.value.tip


def test_redact_knows_the_spellings_of_libraries() -> None:
    key = 'a/b c"\u00e9'
    for spelling in (key, "a/b%20c%22%C3%A9", "a%2Fb+c%22%C3%A9", 'a/b c\\"\\u00e9'):
        assert redact(f"<{spelling}>", key) == "<***>"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("30", 30.0),
        (" 5 ", 5.0),
        ("9" * 400, 300.0),
        ("-1", None),
        ("soon", None),
        ("1.5", None),
        (email.utils.formatdate(1_000_030, usegmt=True), 30.0),
        (email.utils.formatdate(999_000, usegmt=True), 0.0),
    ],
)
def test_retry_after_is_read_as_seconds_or_date(value: str | None, seconds: float | None) -> None:
    assert parse_retry_after(value, wall_now=1_000_000.0) == seconds


# --- connecting


@pytest.mark.parametrize(
    ("generation", "path"), [("0.1", "/ws/v1/atp/"), ("0.2", "/ws/v1/atp/toolkit-client/")]
)
def test_the_handshake_is_the_sdks(
    client: Client, server: ScriptedServer, generation: str, path: str
) -> None:
    client.start(server.url, generation=generation, key="K/ey with space?x")
    peer = client.beside(server.next)
    assert peer.request == f"GET {path}K/ey with space?x/ HTTP/1.1"
    host = server.url.removeprefix("http://")
    nonce = dict(peer.headers)["Sec-WebSocket-Key"]
    assert peer.headers == [
        ("Upgrade", "websocket"),
        ("Host", host),
        ("Origin", f"http://{host}"),
        ("Sec-WebSocket-Key", nonce),
        ("Sec-WebSocket-Version", "13"),
        ("Connection", "Upgrade"),
    ]


def test_messages_pass_both_ways(echo_url: str, client: Client) -> None:
    link = client.start(echo_url)
    client.until(lambda: client.messages == [b"hello"])
    for index in range(500):
        link.send(f'{{"n": {index}}}')
    client.until(lambda: len(client.messages) == 501)
    assert client.messages[1:] == [b'{"n": %d}' % index for index in range(500)]
    assert client.events == [Connecting(), Connected()]
    assert link.unsent_bytes == 0


@pytest.mark.parametrize("size", [1 << 20, 8 << 20])
def test_large_messages_pass_both_ways(echo_url: str, client: Client, size: int) -> None:
    link = client.start(echo_url)
    client.saw(Connected)
    link.send("x" * size)
    link.send("small")
    client.until(lambda: len(client.messages) == 3)
    assert client.messages[1] == b"x" * size
    assert client.messages[2] == b"small"


def test_text_beyond_ascii_passes_and_a_lone_surrogate_is_refused(
    echo_url: str, client: Client
) -> None:
    link = client.start(echo_url)
    client.saw(Connected)
    with pytest.raises(UnicodeEncodeError):
        link.send("\ud800")
    link.send("é")
    client.until(lambda: len(client.messages) == 2)
    assert client.messages[1] == "é".encode()


def test_a_frame_in_the_same_packet_as_the_handshake_is_delivered(
    client: Client, server: ScriptedServer
) -> None:
    client.start(server.url)
    client.beside(server.next).accept(and_then=b"\x81\x02hi")
    client.until(lambda: client.messages == [b"hi"])


def test_a_frame_in_the_same_tls_record_as_the_handshake_is_delivered(
    client: Client, tls_server: ScriptedServer
) -> None:
    client.start(tls_server.url)
    client.beside(tls_server.next).accept(and_then=b"\x81\x02hi")
    client.until(lambda: client.messages == [b"hi"])


def test_over_tls_too_the_peer_confirms_what_it_has_read(
    client: Client, tls_server: ScriptedServer
) -> None:
    link = client.start(tls_server.url)
    peer = client.beside(tls_server.next)
    peer.accept()
    client.saw(Connected)
    for index in range(100):
        link.send(f"{index:04}" + "x" * 99_996)
    link.ping()
    frames = client.beside(lambda: [peer.frame() for _ in range(101)])
    assert frames[99] == (0x81, b"0099" + b"x" * 99_996)
    assert frames[100] == (0x89, b"100")
    assert client.read == []
    peer.sock.sendall(b"\x8a\x03100")
    client.until(lambda: client.read == [100])


def test_the_socket_has_keepalive_and_no_delay(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url)
    client.beside(server.next).accept()
    client.saw(Connected)
    sock = link._connection._socket  # type: ignore[union-attr]
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 30


def test_an_unknown_authority_is_not_trusted(echo_url: str, client: Client) -> None:
    if echo_url.startswith("http:"):
        pytest.skip("only with TLS")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SSL_CERT_FILE")
        client.start(echo_url)
        lost = client.saw(Disconnected)[0]
    assert isinstance(lost, Disconnected)
    assert "certificate" in lost.reason


def test_send_without_a_connection_is_refused(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url)
    assert not link.connected
    with pytest.raises(RuntimeError):
        link.send("x")


# --- keeping alive


def test_a_ping_is_answered_at_once_with_its_payload(
    client: Client, server: ScriptedServer
) -> None:
    client.start(server.url)
    peer = client.beside(server.next)
    peer.accept(and_then=b"\x89\x03mid\x89\x00\x8a\x05stray")
    client.saw(Connected)
    began = time.monotonic()
    assert client.beside(peer.frame) == (0x8A, b"mid")
    assert client.beside(peer.frame) == (0x8A, b"")
    assert time.monotonic() - began < 1
    assert client.link.connected


def test_a_pong_waits_until_what_came_before_its_ping_was_dealt_with(
    client: Client, server: ScriptedServer
) -> None:
    answered_before: list[bool] = []

    def deal(_message: bytes) -> None:
        """As a link's owner does: together with what else this turn of the loop brings."""
        client.loop.call_soon(
            lambda: answered_before.append(bool(select([peer.sock], [], [], 0)[0]))
        )

    client.link = Link(
        client.loop,
        LinkAddress(server.url, KEY, "0.2"),
        on_message=deal,
        on_state=client.events.append,
        on_read=client.read.append,
        timings=FAST,
    )
    client.link.start()
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    peer.sock.sendall(b"\x89\x011" + b"\x81\x02{}" + b"\x89\x012")
    client.until(lambda: answered_before)
    assert answered_before == [False]
    assert client.beside(lambda: [peer.frame(), peer.frame()]) == [(0x8A, b"1"), (0x8A, b"2")]


def test_pings_without_an_end_from_a_server_that_does_not_read_are_bounded(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    ping = b"\x89\x7d" + b"p" * 125
    client.beside(lambda: peer.sock.sendall(ping * 100_000))
    assert link.unsent_bytes < 100 * 131


def test_own_pings_count_the_texts_before_them_and_go_on_while_answered(
    client: Client, server: ScriptedServer
) -> None:
    timings = replace(FAST, first_ping_s=0.05, ping_interval_s=0.05)
    client.start(server.url, timings)
    peer = client.beside(server.next)
    peer.accept()
    for _ in range(5):
        assert client.beside(peer.frame) == (0x89, b"")
        peer.sock.sendall(b"\x8a\x00")
    client.link.send("a")
    client.link.send("b")
    assert [client.beside(peer.frame) for _ in range(3)] == [
        *((0x81, b"a"), (0x81, b"b"), (0x89, b"2"))
    ]
    peer.sock.sendall(b"\x8a\x012")
    client.until(lambda: client.read[-1:] == [2])
    assert client.link.connected


def test_a_pong_confirms_what_was_sent_before_its_ping_and_nothing_else(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    link.send("a")
    link.ping()
    link.send("b")
    link.ping()  # one is out already
    sent = [client.beside(peer.frame) for _ in range(3)]
    assert sent == [(0x81, b"a"), (0x89, b"1"), (0x81, b"b")]
    peer.sock.sendall(b"\x8a\x012\x8a\x00\x8a\x0299\x81\x02hi")
    client.until(lambda: client.messages == [b"hi"])
    assert client.read == []
    peer.sock.sendall(b"\x8a\x011\x8a\x011\x81\x02hi")
    client.until(lambda: len(client.messages) == 2)
    assert client.read == [1]
    link.ping()
    assert client.beside(peer.frame) == (0x89, b"2")


def test_texts_are_counted_anew_on_each_connection(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url)
    for connection in (1, 2):
        peer = client.beside(server.next)
        peer.accept()
        client.saw(Connected, connection)
        link.send("a")
        link.ping()
        assert [client.beside(peer.frame) for _ in range(2)] == [(0x81, b"a"), (0x89, b"1")]
        peer.abort()
        client.saw(Disconnected, connection)


def test_a_paused_link_takes_nothing_and_goes_on_where_it_stopped(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    link.pause_reading(True)
    peer.sock.sendall(b"\x81\x02hi")
    link.send("a")  # what we have to say still goes out
    assert client.beside(peer.frame) == (0x81, b"a")
    assert not client.loop.run_until(lambda: bool(client.messages), 0.1)
    link.pause_reading(False)
    client.until(lambda: client.messages == [b"hi"])


def test_a_missing_pong_means_reconnecting(client: Client, server: ScriptedServer) -> None:
    timings = replace(FAST, first_ping_s=0.05, pong_deadline_s=0.1)
    client.start(server.url, timings)
    peer = client.beside(server.next)
    peer.accept()
    peer.sock.sendall(b"\x81\x02hi")
    lost = client.saw(Disconnected)[0]
    assert isinstance(lost, Disconnected)
    assert "no pong" in lost.reason
    client.beside(server.next).accept()
    client.saw(Connected, 2)


def test_a_ping_behind_a_long_answer_waits_for_it(client: Client, server: ScriptedServer) -> None:
    timings = replace(FAST, first_ping_s=0.1, pong_deadline_s=2.0)
    link = client.start(server.url, timings)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    link.send("x" * (32 << 20))

    def read_slowly() -> float:
        """Half of it, so that the ping is still behind the rest; how long that took."""
        began, total = time.monotonic(), 0
        while total < 16 << 20:
            total += len(peer.sock.recv(1 << 18))
            time.sleep(0.04)  # the pace of a slow line
        return time.monotonic() - began

    assert client.beside(read_slowly) > timings.first_ping_s + timings.pong_deadline_s
    assert link.unsent_bytes
    assert link.connected


# --- ends and new beginnings


@pytest.mark.parametrize("code", [1000, 1001, 1008, 1011, 1012, 4001, None])
def test_a_close_frame_is_answered_with_1000_and_followed_by_a_new_connection(
    client: Client, server: ScriptedServer, code: int | None
) -> None:
    client.start(server.url)
    peer = client.beside(server.next)
    payload = b"" if code is None else code.to_bytes(2, "big") + b"bye"
    peer.accept(and_then=bytes((0x88, len(payload))) + payload)
    assert client.beside(peer.frame) == (0x88, b"\x03\xe8")
    again = client.beside(server.next)
    again.accept(and_then=b"\x81\x02hi")
    client.until(lambda: client.messages == [b"hi"])
    assert client.beside(peer.frame) is None


@pytest.mark.parametrize("way", ["fin", "abort"])
def test_a_lost_connection_is_made_again(client: Client, server: ScriptedServer, way: str) -> None:
    client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    if way == "fin":
        peer.sock.close()
    else:
        peer.abort()
    client.saw(Disconnected)
    client.beside(server.next).accept()
    client.saw(Connected, 2)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"\x81\x02\xff\xfe", 1007),
        (b"\x83\x01x", 1002),
        (b"\x81\x7f" + (1 << 40).to_bytes(8, "big"), 1009),
    ],
)
def test_a_broken_protocol_is_named_and_left(
    client: Client, server: ScriptedServer, data: bytes, code: int
) -> None:
    client.start(server.url)
    peer = client.beside(server.next)
    peer.accept(and_then=b"\x81\x04good" + data)
    assert client.beside(peer.frame) == (0x88, code.to_bytes(2, "big"))
    client.beside(server.next).accept()
    client.saw(Connected, 2)
    assert client.messages == [b"good"]


def test_back_off_doubles_up_to_its_cap(client: Client) -> None:
    with socket.socket() as deaf:  # bound, so that nobody else listens there
        deaf.bind(("127.0.0.1", 0))
        client.start(f"http://127.0.0.1:{deaf.getsockname()[1]}")
        lost = client.saw(Disconnected, 6)
    waits = [event.retry_in_s for event in lost]  # type: ignore[union-attr]
    assert waits[:6] == [0.02, 0.04, 0.08, 0.16, 0.16, 0.16]


def test_the_default_back_off_keeps_its_promises(client: Client, server: ScriptedServer) -> None:
    client.start(server.url, LinkTimings(), jitter=lambda _low, high: high)
    client.beside(server.next).reject(500)
    refused = client.saw(Refused)[0]
    assert isinstance(refused, Refused)
    assert refused.retry_in_s == 0.5
    drawn: list[tuple[float, float]] = []

    def draw(low: float, high: float) -> float:
        drawn.append((low, high))
        return low

    link = Link(
        client.loop,
        LinkAddress(server.url, KEY),
        on_message=client.messages.append,
        on_state=client.events.append,
        jitter=draw,
    )
    for _ in range(2000):
        link._retry()
        link._retry_timer.cancel()  # type: ignore[union-attr]
    assert drawn[:3] == [(0.25, 0.5), (0.5, 1.0), (1.0, 2.0)]
    assert drawn[-1] == (15.0, 30.0)


def test_back_off_starts_anew_after_a_connection_that_lasted(
    client: Client, server: ScriptedServer
) -> None:
    client.start(server.url, replace(FAST, stable_after_s=0.0))
    for times in range(1, 4):
        client.beside(server.next).accept(and_then=b"\x88\x00")
        assert client.saw(Disconnected, times)[-1].retry_in_s == 0.02  # type: ignore[union-attr]


def test_back_off_grows_over_connections_that_do_not_last(
    client: Client, server: ScriptedServer
) -> None:
    client.start(server.url)
    waits = []
    for times in range(1, 4):
        client.beside(server.next).accept(and_then=b"\x88\x00")
        waits.append(client.saw(Disconnected, times)[-1].retry_in_s)  # type: ignore[union-attr]
    assert waits == [0.02, 0.04, 0.08]


@pytest.mark.parametrize("status", [401, 403])
def test_a_first_denial_ends_the_link(client: Client, server: ScriptedServer, status: int) -> None:
    link = client.start(server.url)
    client.beside(server.next).reject(status, phrase="Denied")
    client.saw(Refused)
    assert client.events == [Connecting(), Refused(status, "Denied", True, None)]
    assert link.closed
    assert link._retry_timer is None


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_later_denial_is_retried_at_the_cap(
    client: Client, server: ScriptedServer, status: int
) -> None:
    client.start(server.url)
    client.beside(server.next).accept(and_then=b"\x88\x00")
    client.beside(server.next).reject(status)
    assert client.saw(Refused)[0] == Refused(status, "X", False, 0.16)
    client.beside(server.next).accept()
    client.saw(Connected, 2)


@pytest.mark.parametrize("status", [302, 404, 500])
def test_other_rejections_are_retried_soon(
    client: Client, server: ScriptedServer, status: int
) -> None:
    client.start(server.url)
    client.beside(server.next).reject(status, headers="Location: /elsewhere\r\n")
    refused = client.saw(Refused)[0]
    assert isinstance(refused, Refused)
    assert (refused.status, refused.first, refused.retry_in_s) == (status, False, 0.02)
    again = client.beside(server.next)
    assert "elsewhere" not in again.request
    again.accept()
    client.saw(Connected)


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(client: Client, server: ScriptedServer, status: int) -> None:
    client.start(server.url)
    peer = client.beside(server.next)
    began = time.monotonic()
    peer.reject(status, headers="Retry-After: 1\r\n")
    refused = client.saw(Refused)[0]
    assert isinstance(refused, Refused)
    assert refused.retry_in_s == 1.0
    client.beside(server.next).accept()
    assert time.monotonic() - began > 0.9


def test_retry_after_of_another_status_is_not(client: Client, server: ScriptedServer) -> None:
    client.start(server.url)
    client.beside(server.next).reject(500, headers="Retry-After: 100\r\n")
    assert client.saw(Refused)[0].retry_in_s == 0.02  # type: ignore[union-attr]


def test_a_handshake_without_an_end_is_given_up(client: Client, server: ScriptedServer) -> None:
    client.start(server.url, replace(FAST, handshake_s=0.1))
    peer = client.beside(server.next)
    assert client.saw(Disconnected)
    assert client.beside(peer.frame) is None


# --- back-pressure


def test_a_server_that_stops_reading_does_not_block_the_loop(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    began = time.monotonic()
    for _ in range(64):
        link.send("x" * (1 << 20))
    assert link.unsent_bytes == 64 << 20
    client.loop.run_once()
    ticks: list[float] = []
    client.loop.call_later(0.05, lambda: ticks.append(time.monotonic() - began))
    client.until(lambda: ticks)
    assert ticks[0] < 2
    assert 0 < link.unsent_bytes < 64 << 20
    peer.sock.sendall(b"\x81\x02hi")
    client.until(lambda: client.messages == [b"hi"])


def test_a_half_written_text_is_not_finished_behind_the_owners_back(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    for text in ("x" * (64 << 20), "small"):
        link.send(text)
    client.loop.run_once()
    peer.sock.sendall(b"\x88\x02\x03\xe8")
    client.saw(Disconnected)
    assert link.unsent_bytes == 0
    assert client.beside(peer.frames) == []


def test_what_was_sent_in_the_same_turn_as_the_servers_close_is_not_written(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url, replace(FAST, close_wait_s=0.1))
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    peer.sock.sendall(b"\x88\x02\x03\xe8")
    deadline = time.monotonic() + PATIENCE_S
    while b"\x88" not in link._connection._socket.recv(1, socket.MSG_PEEK):  # type: ignore[union-attr]
        assert time.monotonic() < deadline
    link.send("late")
    client.saw(Disconnected)
    assert client.read == []
    assert client.beside(peer.frames) == [(0x88, b"\x03\xe8")]


# --- our own end


def test_close_sends_what_is_queued_then_the_close_frame_and_waits_for_the_answer(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url, replace(FAST, close_wait_s=60))
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    link.send("last")
    link.close(1001)
    link.close(1001)
    assert not link.connected
    assert client.beside(peer.frame) == (0x81, b"last")
    assert client.beside(peer.frame) == (0x88, b"\x03\xe9")
    assert not link.closed
    peer.sock.sendall(b"\x81\x04late\x88\x02\x03\xe9")
    client.until(lambda: link.closed)
    assert client.events[2:] == [Disconnected("closed", None)]
    assert client.messages == []
    assert client.beside(peer.frame) is None


def test_close_writes_long_answers_first(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url, replace(FAST, close_wait_s=60))
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    for _ in range(5):
        link.send("x" * 200_000)
    link.close()
    opcodes = client.beside(lambda: [peer.frame()[0] for _ in range(6)])  # type: ignore[index]
    assert opcodes == [0x81] * 5 + [0x88]
    peer.sock.close()
    client.until(lambda: link.closed)


def test_nothing_follows_our_close_frame(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url, replace(FAST, first_ping_s=0.1, close_wait_s=0.3))
    peer = client.beside(server.next)
    peer.accept()
    client.saw(Connected)
    link.close()
    peer.sock.sendall(b"\x89\x00")
    client.until(lambda: link.closed)
    assert client.beside(peer.frames) == [(0x88, b"\x03\xe8")]


def test_close_waits_for_a_silent_server_only_so_long(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url, replace(FAST, close_wait_s=0.1))
    client.beside(server.next).accept()
    client.saw(Connected)
    link.close()
    client.until(lambda: link.closed)
    assert client.events[2:] == [Disconnected("closed", None)]


def test_close_gives_up_on_a_server_that_does_not_read(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url, replace(FAST, close_wait_s=0.1))
    client.beside(server.next).accept()
    client.saw(Connected)
    text = "x" * (64 << 20)
    link.send(text)
    link.close()
    client.until(lambda: link.closed)
    assert client.events[2:] == [Disconnected("closed", None)]


@pytest.mark.parametrize("answered", [False, True])
def test_close_while_connecting_ends_at_once(
    client: Client, server: ScriptedServer, answered: bool
) -> None:
    link = client.start(server.url)
    peer = server.next()
    if answered:
        peer.accept()
    link.close()
    assert link.closed
    assert client.events == [Connecting(), Disconnected("closed", None)]
    assert client.beside(peer.frame) is None


def test_close_while_waiting_ends_at_once(client: Client, server: ScriptedServer) -> None:
    link = client.start(server.url, LinkTimings())
    client.beside(server.next).reject(500)
    client.saw(Refused)
    link.close()
    assert link.closed
    client.loop.run_once(0)
    assert isinstance(client.events[-1], Disconnected)


def test_close_from_within_a_message_delivers_no_more(
    client: Client, server: ScriptedServer
) -> None:
    link = client.start(server.url)

    def close_on(message: bytes) -> None:
        client.messages.append(message)
        link.close()

    link._on_message = close_on
    peer = client.beside(server.next)
    peer.accept(and_then=b"\x81\x01a\x81\x01b")
    assert client.beside(peer.frame) == (0x88, b"\x03\xe8")
    assert client.messages == [b"a"]


def test_the_close_handshake_satisfies_the_websockets_library(
    echo_url: str, client: Client
) -> None:
    link = client.start(echo_url, replace(FAST, close_wait_s=60))
    client.saw(Connected)
    link.close()
    client.until(lambda: link.closed)


# --- secrets


def test_the_key_is_in_no_log_line_and_no_event(
    client: Client, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "atp_sandbox")
    quoted = "S3CRET/key%2Bx%3Fy"
    client.start(server.url)
    client.beside(server.next).reject(500, phrase=f"no {KEY}")
    peer = client.beside(server.next)
    peer.sock.sendall(f"garbage {quoted}\r\n\r\n".encode())
    peer.sock.close()
    client.saw(Disconnected)
    bye = f"no {KEY}".encode()
    client.beside(server.next).accept(and_then=bytes((0x88, len(bye) + 2)) + b"\x03\xe8" + bye)
    client.saw(Disconnected, 2)
    names = {record.__dict__["event"] for record in caplog.records}
    assert names == {"link_connecting", "link_connected", "link_lost", "link_refused"}
    shown = repr(client.events) + repr([record.__dict__ for record in caplog.records])
    assert "***" in shown
    assert "S3CRET" not in shown
