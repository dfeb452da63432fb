"""What the load generator asks for, and the bytes it must get, from templates. PURE."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

ID_DIGITS = 9
ANSWER_HEAD = b'{"type": "tool_response", "request_id": "r'
ID_END = len(ANSWER_HEAD) + ID_DIGITS
ECHO_BYTES = 300

TEXT, PING, PONG, CLOSE = 1, 9, 10, 8


def frame(opcode: int, payload: bytes) -> bytes:
    """One whole frame of a server, which masks nothing."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 1 << 16:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


def unmasked(data: bytes, mask: bytes) -> bytes:
    size = len(data)
    pattern = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pattern, "little")).to_bytes(
        size, "little"
    )


@dataclass(slots=True)
class Load:
    """Calls of one tool with the same parameters, and what each must answer."""

    tool: str
    params: dict[str, object]
    result: object = None
    """What the tool returns; compared byte by byte."""
    holds: bytes = b""
    """Instead of `result`, where the answer is not known to the byte: what it must hold."""
    outstanding: int = 1
    _head: bytes = field(init=False, repr=False)
    _tail: bytes = field(init=False, repr=False)
    _answer_tail: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sample = "0" * ID_DIGITS
        payload = {"request_id": "r" + sample, "tool_name": self.tool, "params": self.params}
        text = json.dumps({"message_type": "atp_tool_request", "payload": payload}).encode()
        self._head, self._tail = frame(TEXT, text).split(sample.encode(), 1)
        self._answer_tail = b'", "result": ' + json.dumps(self.result).encode() + b"}"

    def request(self, number: int) -> bytes:
        return b"%s%09d%s" % (self._head, number, self._tail)

    def is_answer(self, text: bytes) -> bool:
        """Whether a text with the head of an answer is the one that is due."""
        if self.holds:
            return self.holds in text
        return text[ID_END:] == self._answer_tail


def echo(outstanding: int, size: int = ECHO_BYTES, tool: str = "echo") -> Load:
    value = "x" * size
    return Load(tool, {"value": value}, value, outstanding=outstanding)


def cpu(outstanding: int, seconds: float, tool: str = "cpu") -> Load:
    return Load(tool, {"seconds": seconds}, seconds, outstanding=outstanding)


def sleep(outstanding: int, seconds: float, tool: str = "sleep") -> Load:
    return Load(tool, {"seconds": seconds}, seconds, outstanding=outstanding)
