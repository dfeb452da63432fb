"""A floor: the best simple system over the websocket, without any checks, limits or journal.

    python -m benchmarks.unchecked URL

Registers `echo`, `sleep` and `cpu`, then one epoll loop hands requests to two warm workers over
socket pairs. Reads and writes are batched. Serves one connection, until it ends.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import socket
import sys
from urllib.parse import urlsplit

import requests

from benchmarks import work

WORKERS = 2
READ_BYTES = 1 << 20
TOOLS = {"echo": work.echo, "sleep": work.sleep, "cpu": work.cpu}


def frame(opcode: int, body: bytes) -> bytes:
    """One websocket frame of a client, masked as it must be."""
    size, mask = len(body), os.urandom(4)
    if size < 126:
        head = bytes((0x80 | opcode, 0x80 | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, 0xFE)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, 0xFF)) + size.to_bytes(8, "big")
    pattern = (mask * (size // 4 + 1))[:size]
    mixed = int.from_bytes(body, "little") ^ int.from_bytes(pattern, "little")
    return head + mask + mixed.to_bytes(size, "little")


def split_frames(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The whole frames as opcode and body, and what is left of the data."""
    frames, at = [], 0
    while len(data) - at >= 2:
        size, start = data[at + 1], at + 2
        if size >= 126:
            wide = 2 if size == 126 else 8
            size, start = int.from_bytes(data[start : start + wide], "big"), start + wide
        if len(data) < start + size:
            break
        frames.append((data[at] & 15, data[start : start + size]))
        at = start + size
    return frames, data[at:]


def serve_worker(channel: socket.socket) -> None:
    """A request is a line of JSON, and so is its answer."""
    rest = b""
    while data := channel.recv(READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        answers = []
        for line in lines:
            payload = json.loads(line)
            result = TOOLS[payload["tool_name"]](*payload["params"].values())
            answer = {"type": "tool_response", "request_id": payload["request_id"]}
            answers.append(json.dumps({**answer, "result": result}).encode() + b"\n")
        channel.sendall(b"".join(answers))


def start_workers() -> list[socket.socket]:
    channels: list[socket.socket] = []
    for _ in range(WORKERS):
        near, far = socket.socketpair()
        if not os.fork():
            for other in (near, *channels):
                other.close()
            serve_worker(far)
            os._exit(0)
        far.close()
        channels.append(near)
    return channels


def register(url: str) -> None:
    for name in TOOLS:
        body = {"app_name": "unchecked", "function_name": name, "params": ["value"]}
        requests.post(f"{url}/api/v1/register_tool", json=body, timeout=30).raise_for_status()


def connect(url: str) -> socket.socket:
    """The websocket after its handshake."""
    address = urlsplit(url)
    sock = socket.create_connection((address.hostname, address.port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    head = f"GET /ws/v1/atp/benchmark/ HTTP/1.1\r\nHost: {address.netloc}\r\n"
    head += "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    head += f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}\r\n\r\n"
    sock.sendall(head.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        if not (byte := sock.recv(1)):  # one by one: no frame that follows is swallowed
            break
        answer += byte
    if b" 101 " not in answer:
        raise ConnectionError(f"no handshake: {answer[:200]!r}")
    return sock


def serve(link: socket.socket, channels: list[socket.socket]) -> None:
    sockets = {sock.fileno(): sock for sock in (link, *channels)}
    unread = dict.fromkeys(sockets, b"")
    unsent = dict.fromkeys(sockets, b"")
    poll = select.epoll()
    for number, sock in sockets.items():
        sock.setblocking(False)
        poll.register(number, select.EPOLLIN)
    blocked: set[int] = set()
    at_work = dict.fromkeys((channel.fileno() for channel in channels), 0)
    while True:
        for number, events in poll.poll():
            if events & (select.EPOLLIN | select.EPOLLHUP):
                data = sockets[number].recv(READ_BYTES)
                if not data:
                    return
                if number == link.fileno():
                    frames, unread[number] = split_frames(unread[number] + data)
                    for opcode, body in frames:
                        if opcode == 1:
                            payload = json.loads(body)["payload"]
                            worker = min(at_work, key=at_work.__getitem__)
                            at_work[worker] += 1
                            unsent[worker] += json.dumps(payload).encode() + b"\n"
                        elif opcode == 9:
                            unsent[link.fileno()] += frame(10, body)
                else:
                    *answers, unread[number] = (unread[number] + data).split(b"\n")
                    at_work[number] -= len(answers)
                    unsent[link.fileno()] += b"".join(frame(1, answer) for answer in answers)
        for number, data in unsent.items():
            if data:
                with contextlib.suppress(BlockingIOError):
                    unsent[number] = data[sockets[number].send(data) :]
                if bool(unsent[number]) != (number in blocked):
                    blocked ^= {number}
                    wants = select.EPOLLOUT if unsent[number] else 0
                    poll.modify(number, select.EPOLLIN | wants)


if __name__ == "__main__":
    base_url = sys.argv[1].rstrip("/")
    register(base_url)
    serve(connect(base_url), start_workers())
