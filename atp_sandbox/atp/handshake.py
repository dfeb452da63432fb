"""One attempt to connect a websocket: `websocket-client`'s, in a thread, because it blocks."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import websocket

from atp_sandbox.atp.address import LinkAddress, parse_retry_after, redact
from atp_sandbox.loop import Loop

_MAX_REASON_CHARS = 200


@dataclass(frozen=True, slots=True)
class Rejection:
    status: int
    reason: str
    retry_after_s: float | None


class Handshake:
    """One attempt to connect, in a daemon thread.

    `on_done` is called in the loop, unless abandoned, with the connected socket, the backend's
    rejection or a sentence that says what failed.
    """

    def __init__(
        self,
        loop: Loop,
        address: LinkAddress,
        timeout_s: float,
        on_done: Callable[[socket.socket | Rejection | str], None],
    ) -> None:
        self._loop, self._address, self._timeout_s = loop, address, timeout_s
        self._on_done = on_done
        self._client = websocket.WebSocket(enable_multithread=False)
        self._lock = threading.Lock()
        self._abandoned = False
        self._result: socket.socket | Rejection | str = ""
        self._overdue = loop.call_later(2 * timeout_s, self._give_up)
        threading.Thread(target=self._run, name="atp-link-handshake", daemon=True).start()

    def abandon(self) -> None:
        """Let go of it, whatever it has reached. Safe to call again."""
        self._overdue.cancel()
        with self._lock:
            self._abandoned = True
            if isinstance(self._result, socket.socket):
                self._result.close()
            elif isinstance(self._client.sock, socket.socket):
                with suppress(OSError):  # wakes the thread, which then closes it
                    self._client.sock.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        result = self._connect()
        with self._lock:
            if self._abandoned:
                if isinstance(result, socket.socket):
                    result.close()
                return
            self._result = result
        self._loop.call_from_thread(self._deliver)

    def _connect(self) -> socket.socket | Rejection | str:
        client = self._client
        try:
            url = self._address.url()
            client.connect(url, timeout=self._timeout_s, redirect_limit=0)  # type: ignore[no-untyped-call]
            assert client.sock is not None
            return client.sock
        except websocket.WebSocketBadStatusException as error:
            headers = error.resp_headers or {}
            retry_after_s = parse_retry_after(headers.get("retry-after"))
            return Rejection(error.status_code, self._safe(error.status_message), retry_after_s)
        except Exception as error:  # the thread's outer door: each fault is a failed attempt
            if client.status is not None and 300 <= client.status < 400:
                return Rejection(client.status, "redirects are not followed", None)
            return self._safe(describe(error))

    def _safe(self, text: str | None) -> str:
        return redact(text or "", self._address.api_key)[:_MAX_REASON_CHARS]

    def _give_up(self) -> None:
        self.abandon()
        self._on_done("the handshake did not end in time")

    def _deliver(self) -> None:
        if not self._abandoned:
            self._overdue.cancel()
            self._on_done(self._result)


def describe(error: Exception) -> str:
    """What went wrong on a socket, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate is not valid: {error.verify_message}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}"
