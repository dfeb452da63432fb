"""A peer that answers at once: `python -m benchmarks.null_peer URL BYTES`.

It reads nothing of a request but its id, so that what it reaches is what the load generator can
do. It shows that the generator is not the bottleneck of the others.
"""

from __future__ import annotations

import base64
import os
import socket
import sys

from benchmarks.loads import ANSWER_HEAD, ID_DIGITS, unmasked

REQUEST_HEAD = b'{"message_type": "atp_tool_request", "payload": {"request_id": "r'
MASK = b"\x5a\xa5\x3c\xc3"


def _answer_parts(size: int) -> tuple[bytes, bytes, int]:
    """Head and tail of a masked answer, and where the id in it begins to be masked."""
    text = ANSWER_HEAD + b"0" * ID_DIGITS + b'", "result": "' + b"x" * size + b'"}'
    length = bytes((0x81, 0x80 | 126)) + len(text).to_bytes(2, "big")
    whole = length + MASK + unmasked(text, MASK)
    at = len(length) + len(MASK) + len(ANSWER_HEAD)
    return whole[:at], whole[at + ID_DIGITS :], len(ANSWER_HEAD) % 4


def main(url: str, size: int) -> None:
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = base64.b64encode(os.urandom(16)).decode()
    connection.sendall(
        f"GET /ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
    )
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 20)
    data = data.partition(b"\r\n\r\n")[2]
    head, tail, shift = _answer_parts(size)
    mask = (MASK * 4)[shift:][:ID_DIGITS]
    while True:
        # Each request ends where the next one's head is found: the generator's frames are known.
        begin, answers = 0, []
        while (found := data.find(REQUEST_HEAD, begin)) >= 0:
            first = found + len(REQUEST_HEAD)
            end = data.find(b"}}", first)
            if end < 0:
                break
            answers.append(head + unmasked(data[first : first + ID_DIGITS], mask) + tail)
            begin = end + 2
        data = data[begin:]
        if answers:
            connection.sendall(b"".join(answers))
        piece = connection.recv(1 << 20)
        if not piece:
            return
        data += piece


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
