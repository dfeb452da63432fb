"""The egress process: accepts what jails connect to, and dials what their policies allow.

Its ritual: import everything, say good-bye to all but sockets (`lockdown`), tell the supervisor,
serve. It ends when the supervisor's end of its channel closes. It holds no API key, decides on no
call, and takes orders from its channel alone.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import resource
import socket
import ssl
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from atp_sandbox.egress import messages
from atp_sandbox.egress.budget import Budget
from atp_sandbox.egress.connection import Connection, Report, Tls
from atp_sandbox.egress.dial import Rerouted, Resolver, SystemResolver
from atp_sandbox.egress.gate import RESOLVING_AT_ONCE, Gate
from atp_sandbox.egress.lockdown import Refused, lock_down
from atp_sandbox.egress.relay import reset
from atp_sandbox.loopback import name_at, ports_to_bind
from atp_sandbox.policy import EgressPolicy
from workers import frames

_BACKLOG = 128
_ACCEPTS_AT_ONCE = 32
"""Of one listener, before the others have their turn."""
_RESOLVER_THREADS = 64
_REPORTS_AT_ONCE = 200
_REPORTS_A_SECOND = 50.0
"""Of one toolkit: a flood of connections is one line that says how many there were."""
_NO_ROOM_S = 0.1
"""Until accepting is tried again, when there is no descriptor left."""
_MAX_DESCRIPTORS = 64
"""In one message: a socket for each port of a jail."""


def run(config: dict[str, Any]) -> None:
    """Be the egress process; never returns but by ending it."""
    channel = socket.socket(fileno=config["channel_fd"])
    tls = _prepare_tls() if config["injects"] else Tls()
    # Made while it can have its pair of sockets.
    loop = asyncio.new_event_loop()
    loop.set_default_executor(ThreadPoolExecutor(_RESOLVER_THREADS, "resolver"))
    sys.unraisablehook = lambda _: None  # it would print what was sent
    try:
        _allow_descriptors()
        lock_down(
            config["outside_id"],
            has_landlock=config["has_landlock"],
            has_seccomp=config["has_seccomp"],
        )
    except Refused as refused:
        channel.sendall(frames.encode("refused", refused.step, refused.reason))
        return
    resolver = Rerouted([tuple(row) for row in config["reroutes"]], SystemResolver())
    server = EgressServer(loop, channel, resolver, tls)
    channel.sendall(frames.encode("ready"))
    try:
        loop.run_until_complete(server.serve())
    finally:
        os._exit(0)  # a resolver's thread may hang in the C library


def _prepare_tls() -> Tls:
    """Everything that ending TLS needs from a file is read now."""
    import certifi

    from atp_sandbox.egress.substitute import Substitute

    context = ssl.create_default_context()
    if "SSL_CERT_FILE" not in os.environ:
        # The machine's own may be in a directory, of which files are read when they are needed.
        context.load_verify_locations(certifi.where())
    return Substitute(context)


def _allow_descriptors() -> None:
    try:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except OSError as error:
        raise Refused("resource_limits", str(error.strerror)) from None


def _plain(text: str) -> str:
    """The system's words may be of any language; ours are ASCII."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in text)


class EgressServer:
    """Owns the gates of all jails and their connections; one task for each connection."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        channel: socket.socket,
        resolver: Resolver,
        tls: Tls,
    ) -> None:
        self._loop = loop
        self._channel = channel
        self._channel.setblocking(False)
        self._resolver = resolver
        self._tls = tls
        self._gates: dict[int, Gate] = {}
        self._resolving: dict[str, asyncio.Semaphore] = {}
        self._budgets: dict[str, Budget] = {}
        """Both of each toolkit, however many jails it has."""
        self._decoder = frames.Decoder(messages.TO_EGRESS, messages.MAX_ORDER_BYTES)
        self._descriptors: list[int] = []
        self._outgoing = bytearray()
        self._ended = loop.create_future()

    async def serve(self) -> None:
        """Until the supervisor hangs up."""
        self._loop.add_reader(self._channel.fileno(), self.catch_up)
        await self._ended

    # -- orders ------------------------------------------------------------------------------------

    def catch_up(self) -> None:
        """Take in what the supervisor has said; also before a placeholder is looked up.

        What cannot be taken in ends this process: a successor gets everything anew.
        """
        try:
            self._catch_up()
        except Exception:
            traceback.print_exc()
            self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)

    def _catch_up(self) -> None:
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        while not self._ended.done():
            try:
                data, ancillary, flags, _ = self._channel.recvmsg(
                    256 * 1024, room, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, "no room for the sockets that came")
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    passed = array.array("i")
                    passed.frombytes(payload[: len(payload) - len(payload) % passed.itemsize])
                    self._descriptors.extend(passed)
            if not data:
                self._end()
                return
            for message in self._decoder.feed(data):
                self._obey(message)

    def _obey(self, message: frames.Message) -> None:
        match message:
            case ["open", number, toolkit, policy, key, cert, cert_key]:
                self._open(number, toolkit, EgressPolicy.from_json(policy), key, cert, cert_key)
            case ["close", number]:
                self._close(number)
            case ["fill", number, provider, placeholder, token] if number in self._gates:
                self._gates[number].secrets[placeholder.encode()] = (provider, token)
            case ["forget", number, placeholder] if number in self._gates:
                self._gates[number].secrets.pop(placeholder.encode(), None)

    def _open(
        self,
        number: int,
        toolkit: str,
        policy: EgressPolicy,
        key: bytes,
        cert: bytes,
        cert_key: bytes,
    ) -> None:
        mine, self._descriptors = self._descriptors, []
        if len(mine) != len(ports_to_bind(policy.ports)):
            raise OSError(errno.EBADF, "not as many sockets as ports")
        resolving = self._resolving.setdefault(toolkit, asyncio.Semaphore(RESOLVING_AT_ONCE))
        listeners = [socket.socket(fileno=fd) for fd in mine]
        budget = self._budgets.setdefault(toolkit, Budget(_REPORTS_AT_ONCE, _REPORTS_A_SECOND))
        gate = Gate(number, toolkit, policy, key, listeners, resolving, budget)
        self._gates[number] = gate
        if cert:
            self._tls.prepare(gate, cert, cert_key)
        for listener in gate.listeners:
            listener.setblocking(False)
            listener.listen(_BACKLOG)
            self._watch(gate, listener)
        self._send(frames.encode("opened", number))

    def _close(self, number: int) -> None:
        gate = self._gates.pop(number, None)
        if gate is None:
            return
        if gate.budget.dropped:
            self._tell_dropped(gate, gate.budget)
        for listener in gate.listeners:
            self._loop.remove_reader(listener.fileno())
            listener.close()
        for task in gate.connections:
            task.cancel()
        self._tls.forget(gate)

    # -- connections -------------------------------------------------------------------------------

    def _watch(self, gate: Gate, listener: socket.socket) -> None:
        if gate.number in self._gates:
            self._loop.add_reader(listener.fileno(), self._accept, gate, listener)

    def _accept(self, gate: Gate, listener: socket.socket) -> None:
        for _ in range(_ACCEPTS_AT_ONCE):
            try:
                client, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError:
                self._loop.remove_reader(listener.fileno())
                self._loop.call_later(_NO_ROOM_S, self._watch, gate, listener)
                return
            client.setblocking(False)
            if gate.is_full:
                self._refuse_full(gate, client)
                continue
            with contextlib.suppress(OSError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(
                gate, client, self._resolver, self._tls, self.tell, self.catch_up
            )
            task = self._loop.create_task(connection.serve())
            gate.connections.add(task)
            task.add_done_callback(gate.connections.discard)

    def _refuse_full(self, gate: Gate, client: socket.socket) -> None:
        most = gate.policy.limits.connections
        report = Report(messages.ANY_WORKER, verdict=messages.DENIED)
        with contextlib.suppress(OSError):
            address, port = client.getsockname()
            host = name_at(address, gate.policy.names)
            report.host, report.port = host or "", port if host else None
        report.reason = f"has more than {most} connections at once"
        self.tell(gate, report)  # before the client learns of it
        reset(client)

    # -- what is told ------------------------------------------------------------------------------

    def tell(self, gate: Gate, report: Report) -> None:
        """Send the supervisor a line of a connection, unless its jail floods it."""
        now = time.monotonic()
        budget = gate.budget
        if not budget.take(now):
            return
        if budget.dropped:
            self._tell_dropped(gate, budget)
        self._send_report(gate, report, now)

    def _tell_dropped(self, gate: Gate, budget: Budget) -> None:
        dropped, budget.dropped = budget.dropped, 0
        report = Report(messages.UNKNOWN_WORKER, verdict=messages.DENIED)
        report.reason = f"{dropped} more connections are not told of"
        self._send_report(gate, report, time.monotonic())

    def _send_report(self, gate: Gate, report: Report, now: float) -> None:
        self._send(
            frames.encode(
                "connection",
                gate.number,
                report.worker,
                report.host,
                report.port,
                report.address,
                report.meter.sent_bytes,
                report.meter.received_bytes,
                int((now - report.began_at) * 1000),
                report.verdict,
                _plain(report.reason)[: messages.MAX_REASON_CHARS],
            )
        )

    def _send(self, data: bytes) -> None:
        """At once if there is room, so that it is there before the client learns of it."""
        if not self._outgoing:
            try:
                data = data[self._channel.send(data) :]
            except BlockingIOError:
                pass
            except OSError:
                return
        if data:
            self._outgoing += data
            self._loop.add_writer(self._channel.fileno(), self._flush)

    def _flush(self) -> None:
        with contextlib.suppress(OSError):
            del self._outgoing[: self._channel.send(self._outgoing)]
        if not self._outgoing:
            self._loop.remove_writer(self._channel.fileno())
