"""TLS ended in a host's stead: joins connections of jails to `inject` and their authorities."""

from __future__ import annotations

import socket
import ssl

from atp_sandbox.egress.authority import Issuer, make_authority
from atp_sandbox.egress.connection import Connection, Tls
from atp_sandbox.egress.gate import Gate, Target
from atp_sandbox.egress.inject import InjectLimits, serve_injected


class Substitute(Tls):
    """Owns an issuer of certificates for each authority that jails trust."""

    def __init__(self, upstream: ssl.SSLContext) -> None:
        """`upstream` says whom the hosts' own certificates must come from."""
        # Done once while files can be opened: what is imported on the way is then there.
        rehearsal = make_authority(["rehearsal.invalid"])
        Issuer(rehearsal.cert_pem, rehearsal.key_pem).context("rehearsal.invalid")
        self._upstream = upstream
        self._issuers: dict[bytes, Issuer] = {}
        self._of_jail: dict[int, Issuer] = {}

    def prepare(self, gate: Gate, cert_pem: bytes, key_pem: bytes) -> None:
        if cert_pem not in self._issuers:
            self._issuers[cert_pem] = Issuer(cert_pem, key_pem)
        self._of_jail[gate.number] = self._issuers[cert_pem]

    def forget(self, gate: Gate) -> None:
        self._of_jail.pop(gate.number, None)

    async def serve(self, client: socket.socket, target: Target, connection: Connection) -> None:
        limits = connection.gate.policy.limits
        await serve_injected(
            client,
            host=target.host,
            port=target.port,
            server_context=self._of_jail[connection.gate.number].context(target.host),
            upstream_context=self._upstream,
            dial=lambda: connection.dial(target),
            secrets=lambda: connection.secrets_for(target),
            limits=InjectLimits(limits.idle_s, limits.bytes),
            meter=connection.report.meter,
            on_refusal=connection.tell_refusal,
        )
