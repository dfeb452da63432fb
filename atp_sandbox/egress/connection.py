"""One connection out of a jail, from its first byte to the line that is logged of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from atp_sandbox import loopback
from atp_sandbox.egress import messages
from atp_sandbox.egress.bounds import Bounds
from atp_sandbox.egress.denial import Denied, Failed
from atp_sandbox.egress.dial import Resolver, dial
from atp_sandbox.egress.dns import DnsError, Queries, refuse
from atp_sandbox.egress.gate import Gate, NotAllowed, Target
from atp_sandbox.egress.meter import Meter
from atp_sandbox.egress.proxy import Front
from atp_sandbox.egress.relay import relay, reset

_DNS_BYTES = 4096
_DNS_S = 10.0
"""For all questions of a connection; a C library asks and closes."""
_MAX_QUERIES = 64
"""Of a connection."""


@dataclass(slots=True)
class Report:
    """What is told of a connection. Host and reason hold nothing but names and words of ours."""

    worker: int
    host: str = ""
    port: int | None = None
    address: str = ""
    verdict: str = messages.ALLOWED
    reason: str = ""
    meter: Meter = field(default_factory=Meter)
    began_at: float = field(default_factory=time.monotonic)

    @property
    def is_worth_telling(self) -> bool:
        """Whoever connects and says nothing has asked for nothing."""
        return bool(self.host or self.reason)


Tell = Callable[[Gate, Report], None]


class Tls:
    """Ends TLS in a host's stead, to put tokens in: here, for nobody. See `substitute`."""

    def prepare(self, gate: Gate, cert_pem: bytes, key_pem: bytes) -> None:
        """Take the authority that the jail of `gate` trusts."""
        raise NotImplementedError

    def forget(self, gate: Gate) -> None:
        """Its jail has ended."""

    async def serve(self, client: socket.socket, target: Target, connection: Connection) -> None:
        """The whole connection, from its first byte on; Denied and Failed as for any."""
        raise NotImplementedError


class Connection:
    """Serves one accepted socket, and owns it; tells of it once, at its refusal or its end."""

    def __init__(
        self,
        gate: Gate,
        client: socket.socket,
        resolver: Resolver,
        tls: Tls,
        tell: Tell,
        catch_up: Callable[[], None],
    ) -> None:
        """`catch_up()` takes in what the supervisor has said of placeholders by now."""
        self.gate = gate
        self._client = client
        self._resolver = resolver
        self._tls = tls
        self._tell = tell
        self._catch_up = catch_up
        self.report = Report(messages.ANY_WORKER)
        self._is_told = False

    async def serve(self) -> None:
        """Until it is over; never raises but when cancelled."""
        clean = False
        try:
            clean = await self._serve()
        except (Denied, Failed) as error:
            self.tell_refusal(error)
        except OSError as error:
            # Either side reset it; what was moved until then counts.
            self._conclude(self.report.verdict, error.strerror or type(error).__name__)
        except Exception:  # the outer door: a bug of ours ends this connection and no other
            self._conclude(messages.FAILED, "ended for a fault of ours, which is in the log")
            traceback.print_exc()
        finally:
            if self.report.is_worth_telling and not self._is_told:
                self._tell(self.gate, self.report)
            if clean:
                self._client.close()
            else:
                reset(self._client)

    async def _serve(self) -> bool:
        """Whether it ended as it should; otherwise it is reset."""
        address, port = self._client.getsockname()
        if address == loopback.PROXY_ADDRESS and port == loopback.PROXY_PORT:
            return await self._serve_proxy()
        if address == loopback.DNS_ADDRESS and port == loopback.DNS_PORT:
            await self._serve_dns()
            return True
        host = loopback.name_at(address, self.gate.policy.names)
        if host is None:
            return False
        self.report.host, self.report.port = host, port
        await self._tunnel(self.gate.decide(host, port))
        return True

    async def _serve_proxy(self) -> bool:
        front = Front(self.gate, self._client)
        self.report.worker = messages.UNKNOWN_WORKER
        try:
            request = await front.read()
            self.report.worker = front.request.worker
            if request is None or request.target is None or request.head is None:
                return True
            target = request.target
            self._name(target)
            if request.head.method == b"CONNECT":
                await self._serve_connect(front, target, request.early)
            elif self.gate.is_injected(target):
                raise Denied("is given its token through TLS alone")
            else:
                scans = bool(self.gate.policy.inject)
                await front.forward(lambda: self.dial(target), self._bounds(), scans=scans)
        except (Denied, Failed) as error:
            self.report.worker = front.request.worker
            if isinstance(error, NotAllowed):
                front.request.asked = (error.host, error.port)
                self.report.host, self.report.port = error.host, error.port
            self.tell_refusal(error)
            if front.has_answered:
                return False
            await front.refuse(error)
        return True

    async def _serve_connect(self, front: Front, target: Target, early: bytes) -> None:
        """The host is dialled first, so that what fails is told by the proxy's answer."""
        if self.gate.is_injected(target):
            if early:
                raise Denied("was sent data before the proxy's answer")
            await front.accept_tunnel()
            await self._tls.serve(self._client, target, self)
            return
        upstream = await self.dial(target)
        with upstream:
            await front.accept_tunnel()
            await self._relay(upstream, target, early)

    async def _tunnel(self, target: Target) -> None:
        if self.gate.is_injected(target):
            await self._tls.serve(self._client, target, self)
            return
        upstream = await self.dial(target)
        with upstream:
            await self._relay(upstream, target, b"")

    async def dial(self, target: Target) -> socket.socket:
        """A connected socket to a judged address of `target`, which is noted."""
        upstream = await dial(self.gate, target, self._resolver)
        with contextlib.suppress(OSError):
            self.report.address = upstream.getpeername()[0]
        return upstream

    def secrets_for(self, target: Target) -> Mapping[bytes, bytes]:
        """Placeholder → token, as of now, of those that are meant for `target`."""
        self._catch_up()
        return self.gate.secrets_for(target.host)

    async def _relay(self, upstream: socket.socket, target: Target, early: bytes) -> None:
        await relay(
            self._client,
            upstream,
            host=target.host,
            port=target.port,
            bounds=self._bounds(),
            early=early,
            scans=bool(self.gate.policy.inject),
        )

    async def _serve_dns(self) -> None:
        """No name is known here: each was asked for in vain, and that is told once it is asked with
        the search domain of a worker, which is its ticket."""
        self.report.worker = messages.UNKNOWN_WORKER
        loop, queries = asyncio.get_running_loop(), Queries()
        told: set[str] = set()
        asked = 0
        with contextlib.suppress(TimeoutError, DnsError):
            async with asyncio.timeout(_DNS_S):
                while asked < _MAX_QUERIES:
                    data = await loop.sock_recv(self._client, _DNS_BYTES)
                    if not data:
                        return
                    for query in queries.feed(data):
                        asked += 1
                        self._note_query(query.name, told)
                        await loop.sock_sendall(self._client, refuse(query))
                    await asyncio.sleep(0)

    def _note_query(self, name: str | None, told: set[str]) -> None:
        host, _, domain = (name or "").rpartition(".")
        kind, _, rest = domain.partition("-")
        number, _, ticket = rest.partition("-")
        worker = self.gate.worker_of(f"{kind}-{number}", ticket)
        if not host or worker is None or host in told:
            return
        told.add(host)
        reason = NotAllowed(host, None, self.gate.toolkit).reason
        if any(e.host == host for e in self.gate.policy.allowed):
            reason = "was asked for by another kind of address than IPv4"
        self._tell(
            self.gate,
            Report(worker or messages.UNKNOWN_WORKER, host, None, "", messages.DENIED, reason),
        )

    def _bounds(self) -> Bounds:
        return Bounds(self.gate.policy.limits, self.report.meter)

    def tell_refusal(self, error: Denied | Failed) -> None:
        """Before the client learns of it: its call may fail at once, and is then to say why."""
        if self._is_told:
            return
        self._conclude(
            messages.DENIED if isinstance(error, Denied) else messages.FAILED, error.reason
        )
        self._tell(self.gate, self.report)
        self._is_told = True

    def _name(self, target: Target) -> None:
        self.report.host, self.report.port = target.host, target.port

    def _conclude(self, verdict: str, reason: str) -> None:
        self.report.verdict, self.report.reason = verdict, reason
