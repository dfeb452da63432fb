"""What the way out costs: a jail's connections to an allowed host, against direct ones.

    python -m benchmarks.egress [--rounds 5] [--megabytes 256] [--json FILE]

Everything is on this machine's loopback, in one run, direct and through the egress process in turn.
Direct is the same client code outside of any jail. Printed are medians with their spread, and the
ratio to direct: throughput down and up, the time of a small exchange
on a connection of its own and on one that is kept, by name and through the proxy of patterns; then
HTTPS requests whose token the tool has (`named`) or is put in outside the jail (`inject`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import ssl
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import trustme

from atp_sandbox import log
from atp_sandbox.limits import Limits
from atp_sandbox.outcome import Success
from atp_sandbox.policy import EgressLimits, parse_reroute, policy_of
from atp_sandbox.settings import ToolkitSettings
from atp_sandbox.single import SingleToolkit

HOST = "host.example"
PORT = 8000
CLIENT = '''
import os, socket, statistics, time
from urllib.parse import urlsplit


def open_connection(host, port, proxied):
    if not proxied:
        return socket.create_connection((host, port), 60)
    import base64
    url = urlsplit(os.environ["HTTPS_PROXY"])
    sock = socket.create_connection((url.hostname, url.port), 60)
    credentials = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
    head = f"CONNECT {host}:{port} HTTP/1.1\\r\\nHost: {host}:{port}\\r\\n"
    sock.sendall((head + f"Proxy-Authorization: Basic {credentials}\\r\\n\\r\\n").encode())
    answer = sock.recv(4096)
    assert b" 200 " in answer, answer
    return sock


def down(host, port, proxied, amount):
    """Megabytes a second."""
    with open_connection(host, port, proxied) as sock:
        sock.sendall(b"d%016d" % amount)
        began, left, room = time.perf_counter(), amount, bytearray(1 << 20)
        while left:
            left -= sock.recv_into(room)
        return amount / (time.perf_counter() - began) / 1e6


def up(host, port, proxied, amount):
    """Megabytes a second, until the other side has said that it has all."""
    with open_connection(host, port, proxied) as sock:
        sock.sendall(b"u%016d" % amount)
        began, chunk = time.perf_counter(), bytes(1 << 20)
        for _ in range(amount // len(chunk)):
            sock.sendall(chunk)
        sock.recv(1)
        return amount / (time.perf_counter() - began) / 1e6


def connections(host, port, proxied, count):
    """Median milliseconds from connecting to the answer of 64 bytes."""
    times = []
    for _ in range(count):
        began = time.perf_counter()
        with open_connection(host, port, proxied) as sock:
            sock.sendall(b"e" + bytes(63))
            sock.recv(64)
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def exchanges(host, port, proxied, count):
    """Median microseconds of 64 bytes there and back on one connection."""
    times = []
    with open_connection(host, port, proxied) as sock:
        for _ in range(count):
            began = time.perf_counter()
            sock.sendall(b"e" + bytes(63))
            sock.recv(64)
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def https(where, context, token, count, kept):
    """Median milliseconds of a request, over a connection of its own or one that is kept."""
    head = "GET / HTTP/1.1\\r\\nHost: host.example:8000\\r\\n"
    head += f"Authorization: Bearer {token}\\r\\n\\r\\n"
    times, tls = [], None
    for _ in range(count):
        began = time.perf_counter()
        if tls is None:
            sock = socket.create_connection(where, 60)
            tls = context.wrap_socket(sock, server_hostname="host.example")
        tls.sendall(head.encode())
        answer = b""
        while not answer.endswith(b"done"):
            answer += tls.recv(4096)
        assert b" 200 " in answer, answer
        if not kept:
            tls.close()
            tls = None
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3
'''
TOOLKIT = (
    CLIENT
    + """
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="x", app_name="egress-benchmark")


@client.register_tool(
    function_name="measure", params=["name", "proxied", "amount"], required_params=["name"],
    description="", auth_provider=None, auth_type=None, auth_with=None)
def measure(name, proxied, amount, **_):
    return globals()[name]("HOST", PORT, proxied, amount)


@client.register_tool(
    function_name="measure_https", params=["kept", "count"], required_params=["kept"],
    description="", auth_provider="provider", auth_type="OAuth2", auth_with="access_token")
def measure_https(kept, count, auth_token, **_):
    import ssl
    return https(("HOST", PORT), ssl.create_default_context(), auth_token, count, kept)


client.start()
""".replace("HOST", HOST).replace("PORT", str(PORT))
)
MEASURES = {
    "down": ("MB/s", True),
    "up": ("MB/s", True),
    "connections": ("ms", False),
    "exchanges": ("µs", False),
}
"""Name → unit, and whether more is better."""
TOKEN = "t" * 40
HTTPS = {"https": False, "https, kept": True}
HTTPS_COUNT = 200


class Host:
    """Sends, takes and echoes, as the first byte says."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            while first := client.recv(64):
                if first[:1] == b"e":
                    client.sendall(first)
                    continue
                amount = int(first[1:17])
                if first[:1] == b"d":
                    chunk = bytes(1 << 20)
                    for _ in range(amount // len(chunk)):
                        client.sendall(chunk)
                else:
                    left, room = amount - len(first[17:]), bytearray(1 << 20)
                    while left:
                        left -= client.recv_into(room)
                    client.sendall(b"!")


class TlsHost(Host):
    """Answers each request over TLS, on connections that it keeps."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.certificates = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(self.certificates))
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(HOST).configure_cert(self._context)
        super().__init__()

    def _serve(self, client: socket.socket) -> None:
        answer = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\ndone"
        with contextlib.suppress(OSError), self._context.wrap_socket(client, True) as tls:
            request = b""
            while chunk := tls.recv(65536):
                request += chunk
                if request.endswith(b"\r\n\r\n"):
                    assert TOKEN.encode() in request
                    request = b""
                    tls.sendall(answer)


def measure_https(
    path: Path, host: TlsHost, direct: dict[str, Any], name: str, rounds: int
) -> dict[str, Any]:
    """One row: direct, TLS end to end through the egress process, and ended there."""
    reroute = parse_reroute(f"{HOST}:{PORT}", f"127.0.0.1:{host.port}")
    kept = HTTPS[name]
    plain = ToolkitSettings(
        "kit",
        path,
        (host.certificates,),
        {"SSL_CERT_FILE": "/toolkit/authority.pem"},
        limits=replace(Limits(), time_s=300.0),
        egress=policy_of([f"{HOST}:{PORT}"], [HOST]),
    )
    bound = policy_of([f"{HOST}:{PORT}"], [HOST], {"provider": [HOST]})
    context = ssl.create_default_context(cafile=str(host.certificates))

    def inside(settings: ToolkitSettings) -> float:
        with SingleToolkit(settings, [reroute]) as single:
            tool = next(t for t in single.discovery.registrations if t.name == "measure_https")
            params = json.dumps({"kept": kept, "count": HTTPS_COUNT}).encode()
            outcome, _ = single.call(tool, params, json.dumps(TOKEN).encode())
        assert isinstance(outcome, Success), outcome
        return float(json.loads(outcome.result_json))

    where = ("127.0.0.1", host.port)
    ways: dict[str, Callable[[], float]] = {
        "direct": lambda: float(direct["https"](where, context, TOKEN, HTTPS_COUNT, kept)),
        "named": lambda: inside(plain),
        "inject": lambda: inside(replace(plain, env={}, data=(), egress=bound)),
    }
    return {"name": name, "unit": "ms", "rounds": in_turn(name, ways, rounds)}


def in_turn(name: str, ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each way gave, round after round."""
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds):
        for way, run in ways.items():
            found[way].append(run())
        print(f"{name}: round {number + 1} of {rounds}", file=sys.stderr)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    log.configure(level=log.WARNING)
    host = Host()
    amounts = {"connections": 200, "exchanges": 2_000}
    direct: dict[str, Any] = {}
    exec(CLIENT, direct)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kit.py"
        path.write_text(TOOLKIT)
        settings = ToolkitSettings(
            "kit",
            path,
            limits=replace(Limits(), time_s=300.0),
            egress=policy_of([f"{HOST}:{PORT}"], [HOST], limits=EgressLimits(bytes=1 << 40)),
        )
        rows = [measure(settings, host, direct, name, amounts, given) for name in MEASURES]
        tls_host = TlsHost(Path(folder))
        # By which the egress process knows whom the host's certificate must come from.
        os.environ["SSL_CERT_FILE"] = str(tls_host.certificates)
        rows += [measure_https(path, tls_host, direct, name, given.rounds) for name in HTTPS]
    print(f"{platform.machine()}, Linux {platform.release()}, Python {platform.python_version()}")
    for row in rows:
        print(table_line(row))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))
    return 0


def measure(
    settings: ToolkitSettings,
    host: Host,
    direct: dict[str, Any],
    name: str,
    amounts: dict[str, int],
    given: argparse.Namespace,
) -> dict[str, Any]:
    """One row: each way in turn, round after round."""
    amount = amounts.get(name, given.megabytes << 20)
    reroute = parse_reroute(f"{HOST}:{PORT}", f"127.0.0.1:{host.port}")

    def inside(proxied: bool) -> float:
        with SingleToolkit(settings, [reroute]) as single:
            tool = next(t for t in single.discovery.registrations if t.name == "measure")
            params = {"name": name, "proxied": proxied, "amount": amount}
            outcome, _ = single.call(tool, json.dumps(params).encode(), None)
        assert isinstance(outcome, Success), outcome
        return float(json.loads(outcome.result_json))

    ways: dict[str, Callable[[], float]] = {
        "direct": lambda: float(direct[name]("127.0.0.1", host.port, False, amount)),
        "named": lambda: inside(False),
        "proxy": lambda: inside(True),
    }
    return {"name": name, "unit": MEASURES[name][0], "rounds": in_turn(name, ways, given.rounds)}


def table_line(row: dict[str, Any]) -> str:
    shown = [f"{row['name']:12}"]
    usual = statistics.median(row["rounds"]["direct"])
    for way, values in row["rounds"].items():
        middle = statistics.median(values)
        spread = f"{min(values):.4g} to {max(values):.4g}"
        shown.append(f"{way} {middle:.4g} {row['unit']} ({spread}) ×{middle / usual:.2f}")
    return "  ".join(shown)


if __name__ == "__main__":
    raise SystemExit(main())
