"""Calls for a system under faults: what they are, when they are repeated, who counts what ran.

The toolkit reports each execution to `Counter` before it does anything else, over the network, so
that what is counted does not depend on anything that the system under test says.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from atp_sandbox.link_unit import ANSWER_GONE
from benchmarks.history import GONE, INTERRUPTED, NOT_STARTED, OK, History
from benchmarks.wire import Link, request_text

TOOLKIT = '''
import os, socket, time
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="faults", app_name="faults", base_url="URL")


def tool(function):
    register = client.register_tool(
        "PREFIX" + function.__name__, ["key", "seconds", "pad"], ["key"], "d", None, None, None)
    return register(function)


def count(key):
    """Report this execution; what cannot be counted is not done."""
    if key == "sample_value":
        raise ValueError("the published SDK calls each tool once while it registers")
    with socket.create_connection(("HOST", PORT), 5) as sock:
        sock.sendall(key.encode() + b"\\n")
        if sock.recv(2) != b"ok":
            raise OSError("not counted")


@tool
def quick(key, **_):
    count(key)
    return {"key": key}


@tool
def slow(key, seconds=0.2, **_):
    count(key)
    time.sleep(seconds)
    return {"key": key, "pid": os.getpid(), "random": os.urandom(8).hex()}


@tool
def fail(key, **_):
    count(key)
    raise ValueError(key)


@tool
def large(key, **_):
    count(key)
    return {"key": key, "text": "x" * 300_000}


@tool
def crash(key, **_):
    count(key)
    os._exit(3)


@tool
def hang(key, **_):
    count(key)
    while True:
        time.sleep(1)


client.start()
'''

MIX = {"quick": 40, "slow": 30, "fail": 10, "large": 8, "crash": 4, "hang": 1, "nosuch": 4}
"""Tools with their weights; `nosuch` is one that nobody registered."""
PUBLISHED_SDK_MIX = {"quick": 40, "slow": 30, "fail": 10, "large": 8}
"""In the SDK's own process a crash or a hanging tool is the end, and an unknown tool no answer."""
P_AGAIN_AT_ONCE = 0.08
P_AGAIN_AFTER_ANSWER = 0.05
P_TWIN = 0.04
P_LONG_AGO = 0.3
GIVEN_UP_S = 10.0
"""A call that waits for longer does not keep others from being made."""
MAX_UNSENT_BYTES = 1 << 20
TICK_S = 0.05
DECLINED = ("unavailable", "overloaded")
DECLINED_S = 0.3
"""Without new calls for whoever says that he takes none."""
_KEY = re.compile(r'"(c\d+[ab])"')


def write_toolkit(path: str, *, prefix: str, url: str, host: str, port: int) -> None:
    values = {"PREFIX": prefix, "URL": url, "HOST": host, "PORT": str(port)}
    text = re.sub(r"\b(PREFIX|URL|HOST|PORT)\b", lambda found: values[found[0]], TOOLKIT)
    with open(path, "w") as file:
        file.write(text)


@dataclass(frozen=True, slots=True)
class _Call:
    content: str
    request_id: object
    text: bytes
    is_patient: bool
    """Not asked again once it has surely arrived: then its answer must come by itself."""

    @property
    def id_json(self) -> str:
        return json.dumps(self.request_id)


class Load:
    """Keeps calls under way; hands all that is sent and received to the history."""

    def __init__(
        self,
        history: History,
        *,
        seed: int,
        concurrency: int,
        prefixes: Mapping[str, int],
        mix: Mapping[str, int] = MIX,
        patience: float = 0.5,
    ) -> None:
        """`prefixes`: of the toolkits' tools, with weights. `patience`: the part of the calls that
        are not asked again once they have surely arrived."""
        self._history = history
        self._random = random.Random(seed)
        self._concurrency = concurrency
        self._prefixes, self._mix, self._patience = prefixes, mix, patience
        self._calls: dict[str, _Call] = {}
        self._numbers: dict[int, int] = {}
        self._answered: deque[_Call] = deque(maxlen=200)
        self._count = 0
        self._link: Link | None = None
        self._pause_until = 0.0
        self.is_restarted = False
        """Whether the next link is a new process's."""
        self.is_over = False
        """No new calls any more; what is open is still asked for."""

    async def run(self) -> None:
        """Until cancelled; most of the work is done as answers come in."""
        while True:
            self._top_up()
            await asyncio.sleep(TICK_S)

    def new_request(self) -> bytes:
        """The text of a request that nobody has been told of."""
        return self._make(f"c{self._next()}a", None).text

    # -- what the backend tells --------------------------------------------------------------------

    def link_opened(self, link: Link) -> None:
        self._link = link
        if self.is_restarted:
            self.is_restarted = False
            self._history.restarted(time.monotonic())
        for content in self._history.unanswered():
            call = self._calls[content.key]
            if not (content.is_sure and call.is_patient):
                self._send(call)
        if self._answered and self._random.random() < P_LONG_AGO:
            self._send(self._random.choice(self._answered))
        self._top_up()

    def link_closed(self, link: Link) -> None:
        self._history.ended(link.number)
        if self._link is link:
            self._link = None

    def pong_received(self, link: Link, payload: bytes) -> None:
        if payload.isdigit():
            self._history.confirmed(link.number, int(payload))

    def text_received(self, link: Link, data: bytes) -> None:
        answer = json.loads(data)
        result = answer["result"]
        key = _KEY.search(json.dumps(result)[:500])
        digest = hashlib.blake2b(data, digest_size=8).hexdigest()
        self._history.received(
            time.monotonic(),
            link.number,
            json.dumps(answer["request_id"]),
            digest,
            kind_of(result),
            None if key is None else key[1],
        )
        if key is not None and key[1] in self._calls:
            call = self._calls[key[1]]
            self._answered.append(call)
            if self._random.random() < P_AGAIN_AFTER_ANSWER:
                self._send(call)
        if kind_of(result) in DECLINED:
            self._pause_until = time.monotonic() + DECLINED_S
        self._top_up()

    # -- what goes out -----------------------------------------------------------------------------

    def _top_up(self) -> None:
        now = time.monotonic()
        waiting = sum(
            now - content.first_sent_at < GIVEN_UP_S for content in self._history.unanswered()
        )
        if self.is_over or now < self._pause_until:
            return
        while waiting < self._concurrency and self._can_send():
            waiting += 1
            self._begin()

    def _can_send(self) -> bool:
        link = self._link
        return link is not None and link.can_send and link.unsent_bytes < MAX_UNSENT_BYTES

    def _begin(self) -> None:
        number = self._next()
        request_id: object = number if number % 2 else f"r{number}"
        call = self._make(f"c{number}a", request_id)
        self._send(call)
        chance = self._random.random()
        if chance < P_AGAIN_AT_ONCE:
            self._send(call)
        elif chance < P_AGAIN_AT_ONCE + P_TWIN:
            self._send(self._make(f"c{number}b", request_id))

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _make(self, content: str, request_id: object) -> _Call:
        draw = self._random
        (prefix,) = draw.choices(list(self._prefixes), list(self._prefixes.values()))
        (tool,) = draw.choices(list(self._mix), list(self._mix.values()))
        params = {
            "key": content,
            "seconds": draw.choice((0.05, 0.2, 0.6)),
            "pad": "p" * draw.choice((0, 0, 100, 20_000)),
        }
        text = request_text(request_id, prefix + tool, params)
        call = _Call(content, request_id, text, draw.random() < self._patience)
        if request_id is not None:
            self._calls[content] = call
        return call

    def _send(self, call: _Call) -> None:
        if not self._can_send():
            return
        link = self._link
        assert link is not None
        number = self._numbers.get(link.number, 0) + 1
        self._numbers[link.number] = number
        now = time.monotonic()
        self._history.sent(now, link.number, number, call.id_json, call.content)
        link.send_text(call.text)
        link.send_ping(b"%d" % number)


def kind_of(result: object) -> str:
    """What an answer's result says of its call, in the words of `benchmarks.history`."""
    if not isinstance(result, dict) or "error" not in result:
        return OK
    kind = str(result.get("error_type", "error"))
    if kind != INTERRUPTED:
        return kind
    if result["error"] == ANSWER_GONE.error:
        return GONE
    return NOT_STARTED if result["retryable"] else INTERRUPTED


class Counter:
    """Takes the reports of executions: a connection, a key, a line's end; answers `ok`."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._handle, "127.0.0.1", 0, backlog=256)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            line = await reader.readline()
            if line.endswith(b"\n"):
                self._history.executed(time.monotonic(), line.decode().rstrip("\n"))
                writer.write(b"ok")
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
