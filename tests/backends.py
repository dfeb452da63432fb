"""A small ATP backend for tests, and `serve` as a process: what its operator would see of it.

Not the development backend of `atp_sandbox.backend`, so that a misunderstanding of the protocol
which both sides of ours share does not go unnoticed.
"""

from __future__ import annotations

import http
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import psutil
from conftest import PATIENCE_S, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

ROOT = Path(__file__).resolve().parents[1]


class FakeBackend:
    """Takes registrations over HTTP and toolkits over websockets, on one port."""

    def __init__(self) -> None:
        self.refuse_with: int | None = None
        """An HTTP status for every handshake."""
        self.answers_pings = True
        self.registered: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self._links: queue.Queue[FakeLink] = queue.Queue()
        self._all_links: list[FakeLink] = []
        self._server = serve(
            self._on_link,
            "127.0.0.1",
            0,
            process_request=self._on_request,
            max_size=None,
            ping_interval=None,
        )
        # The library's server knows no POST: look at the first bytes before it does.
        self._websocket_handler = self._server.handler
        self._server.handler = self._on_connection
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def accept(self, timeout_s: float = PATIENCE_S) -> FakeLink:
        """The next link that a supervisor opens, greeted."""
        try:
            link = self._links.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError("no link was opened") from None
        link.send("atp_client_connected", {"message": "hello"})
        return link

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for link in self._all_links:
            link.reads.set()
        self._server.shutdown()
        self._thread.join()

    def _on_connection(self, sock: socket.socket, address: Any) -> None:
        if sock.recv(4, socket.MSG_PEEK | socket.MSG_WAITALL) != b"POST":
            self._websocket_handler(sock, address)
            return
        try:
            with sock, sock.makefile("rb") as file:
                while file.readline().startswith(b"POST "):
                    self.registered.append(_read_body(file))
                    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except ConnectionError:
            pass
        finally:
            with self._server.lock:  # which the library does for its own connections
                self._server.handler_threads.discard(threading.current_thread())

    def _on_request(self, connection: ServerConnection, request: Request) -> Response | None:
        self.paths.append(request.path)
        if self.refuse_with is None:
            return None
        return connection.respond(http.HTTPStatus(self.refuse_with), "refused\n")

    def _on_link(self, connection: ServerConnection) -> None:
        send_frame = connection.protocol.send_frame

        def send_unless_mute(frame: Frame) -> None:
            if frame.opcode is not Opcode.PONG or self.answers_pings:
                send_frame(frame)
            if frame.opcode is Opcode.PONG and self.answers_pings:
                link.confirmed = int(bytes(frame.data) or link.confirmed)

        link = FakeLink(connection)
        connection.protocol.send_frame = send_unless_mute  # type: ignore[method-assign]
        self._all_links.append(link)
        self._links.put(link)
        link.read()


def _read_body(file: BinaryIO) -> dict[str, Any]:
    """The JSON object of a request whose first line has been read."""
    length = 0
    while line := file.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    body: dict[str, Any] = json.loads(file.read(length))
    return body


class FakeLink:
    """One open link, as the backend sees it."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self.texts: list[str] = []
        """Everything that was received."""
        self.confirmed = 0
        """How many of them a pong has told the other side of."""
        self.close_code: int | None = None
        self.is_closed = False
        self.reads = threading.Event()
        """Without it nothing is taken, until no more fits between the two sides."""
        self.reads.set()

    def read(self) -> None:
        """Collect until the end; runs in the thread of the connection."""
        try:
            for message in self._connection:
                self.texts.append(message if isinstance(message, str) else message.decode())
                self.reads.wait()
        except ConnectionClosed:
            pass
        finally:
            self.close_code = self._connection.close_code
            self.is_closed = True

    def send(self, message_type: str, payload: dict[str, Any]) -> None:
        self._connection.send(json.dumps({"message_type": message_type, "payload": payload}))

    def request(self, request_id: Any, tool: str, **params: Any) -> None:
        token = params.pop("auth_token", None)
        payload = {"request_id": request_id, "tool_name": tool, "params": params}
        if token is not None:
            payload["auth_token"] = token
        self.send("atp_tool_request", payload)

    def settle(self) -> None:
        """Return once everything that was received has been confirmed."""
        wait_until(lambda: self.confirmed == len(self.texts), "a ping after the last answer")

    def cut(self) -> None:
        """End the TCP connection without a word."""
        self._connection.socket.shutdown(socket.SHUT_RDWR)

    @property
    def answers(self) -> list[dict[str, Any]]:
        """All answers so far, in order."""
        found = [json.loads(text) for text in self.texts]
        assert all(answer["type"] == "tool_response" for answer in found)
        return found

    def result(self, request_id: Any, timeout_s: float = PATIENCE_S) -> Any:
        """The one result for `request_id`."""

        def matching() -> list[Any]:
            return [a["result"] for a in self.answers if a["request_id"] == request_id]

        wait_until(matching, f"an answer to {request_id!r}", timeout_s)
        (result,) = matching()
        return result

    def call(self, request_id: Any, tool: str, **params: Any) -> Any:
        self.request(request_id, tool, **params)
        return self.result(request_id)


class Serving:
    """`python -m atp_sandbox serve …` as a process of its own."""

    def __init__(
        self,
        *arguments: object,
        state_dir: Path,
        cwd: Path | None = None,
        stdin: str = "",
        **environment: str,
    ) -> None:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("ATP_")}
        command = [sys.executable, "-m", "atp_sandbox", "serve", *map(str, arguments)]
        self.process = subprocess.Popen(
            [*command, "--state-dir", str(state_dir)],
            env={**ours, "PYTHONPATH": str(ROOT), **environment},
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(stdin)
        self.process.stdin.close()
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def log(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """The first match of `pattern` in the log."""
        wait_until(
            # Not `process.poll()`: what it logged last may still have to be read.
            lambda: re.search(pattern, self.log) or not self._reader.is_alive(),
            pattern,
            timeout_s,
        )
        found = re.search(pattern, self.log)
        assert found, self.log
        return found

    def events(self) -> list[dict[str, Any]]:
        """The log of `--log-format json`: every line of it is one object."""
        return [json.loads(line) for line in self.lines]

    def family(self) -> list[psutil.Process]:
        """The supervisor and every process below it."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = PATIENCE_S) -> int:
        """Signal it and return the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout_s)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """The exit code; afterwards the log is complete, and standard output was empty."""
        status = self.process.wait(timeout_s)
        self._reader.join()
        assert self.process.stdout is not None
        assert self.process.stdout.read() == ""
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()
        if error is not None:
            print(self.log)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def is_janitor(process: psutil.Process) -> bool:
    """Whether it is the process that clears up after a supervisor, which is of no jail."""
    try:
        return any(part.endswith("jails/janitor.py") for part in process.cmdline())
    except psutil.Error:
        return False


def wait_until_gone(processes: list[psutil.Process], timeout_s: float) -> None:
    """Each of these processes has ended within `timeout_s`."""

    def living() -> list[psutil.Process]:
        return [p for p in processes if p.is_running() and _state(p) != psutil.STATUS_ZOMBIE]

    deadline = time.monotonic() + timeout_s
    while left := living():
        assert time.monotonic() < deadline, f"still there after {timeout_s} s: {left}"
        threading.Event().wait(0.01)


def _state(process: psutil.Process) -> str:
    try:
        state: str = process.status()
        return state
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE
