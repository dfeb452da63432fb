"""The development backend as a child process of the program that wants one.

Imports nothing of the web side: the child does. Two pipes join the two: over one the child tells
its port or why it cannot start, the other it watches, and ends when its parent is gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from atp_sandbox.errors import SandboxError

START_TIMEOUT_S = 30.0
"""Importing the web framework takes about a second on a slow machine."""
STOP_TIMEOUT_S = 0.8
"""It keeps nothing that could get lost; whoever calls its tools has been answered by then."""
MAX_READY_BYTES = 16_384
"""The child's one line: a port, or an error of a few hundred characters."""

_PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class EmbeddedBackend:
    """A backend on 127.0.0.1 that listens when the constructor returns, until `close()`.

    Port 0 takes a free one. SandboxError says why it could not start; nothing is left behind then.
    """

    def __init__(self, port: int = 0) -> None:
        ready_reader, ready_writer = os.pipe()
        parent_reader, self._parent_writer = os.pipe()
        try:
            self._process = _spawn(port, ready_writer, parent_reader)
        except OSError as error:
            os.close(ready_reader)
            os.close(self._parent_writer)
            raise SandboxError(
                "cannot start the embedded backend", cause=f"{sys.executable}: {error.strerror}"
            ) from None
        finally:
            os.close(ready_writer)
            os.close(parent_reader)
        self._is_closed = False
        try:
            self.port = self._receive_port(ready_reader)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ready_reader)

    @property
    def url(self) -> str:
        """The `base_url` for a toolkit."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def close(self) -> None:
        """End the child and wait until it is gone; safe to call twice."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            os.close(self._parent_writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _receive_port(self, reader: int) -> int:
        line = _read_line(reader, time.monotonic() + START_TIMEOUT_S)
        if line is None:
            raise SandboxError(
                "the embedded backend did not start",
                cause=f"it did not listen within {START_TIMEOUT_S:.0f} s",
            )
        with contextlib.suppress(ValueError):
            match json.loads(line):
                case int(port):
                    return port
                case {"error": str(message), "cause": str(cause), "tip": str(tip)}:
                    raise SandboxError(message, cause=cause, tip=tip)
        status = self._process.wait() if not line else None
        raise SandboxError(
            "the embedded backend did not start",
            cause="it said something unexpected"
            if status is None
            else f"it ended with status {status}; what it wrote stands above",
            tip="run `python -m atp_sandbox backend` by itself to see why",
        )


def _spawn(port: int, ready_fd: int, parent_fd: int) -> subprocess.Popen[bytes]:
    # -P: the working folder may hold a toolkit's files, which must not be imported in its place.
    command = [sys.executable, "-P", "-m", "atp_sandbox", "backend", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--ready-fd", str(ready_fd), "--parent-fd", str(parent_fd)]
    search = [str(_PACKAGE_PARENT), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=(ready_fd, parent_fd),
        start_new_session=True,  # Ctrl-C is for the parent, which may still have answers to send
    )


def _read_line(fd: int, deadline: float) -> bytes | None:
    """What arrives on `fd` up to a newline or its end; None if neither comes before `deadline`."""
    line = b""
    while not line.endswith(b"\n") and len(line) < MAX_READY_BYTES:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = os.read(fd, 4096)
        if not piece:
            break
        line += piece
    return line
