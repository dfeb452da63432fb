"""The certificate authority of one run: what lets the egress process end a jail's TLS.

The supervisor makes it (`make_authority`) and puts the certificate, never the key, into the jails;
the egress process alone holds the key and issues a certificate for each host that a secret is bound
to (`Issuer`). The authority is constrained to those hosts' names, so that a stolen key opens no
other host, and lives no longer than the run's directory.

Confinement: `Issuer` imports everything as it is made, before the lock-down. `Issuer.context` then
opens one thing, a memfd of its own by way of /proc/self/fd, as `ssl` takes a key from a path only.
Landlock lets that pass without any rule, for a memfd is on no mount that a user can see; needed are
a /proc in the process's root and, of system calls, memfd_create and openat. Without a /proc, call
`context` for all hosts before.

`cryptography` is imported by what needs it and not by this module. RFC 5280.
"""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import os
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

_VALID_BEFORE = datetime.timedelta(days=1)
"""Back in time, for a jail whose clock is behind."""
_VALID_AFTER = datetime.timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority's certificate, for all, and its key, for the egress process alone."""

    cert_pem: bytes
    key_pem: bytes = field(repr=False)


def is_available() -> bool:
    """Whether `cryptography` is installed."""
    return importlib.util.find_spec("cryptography") is not None


def make_authority(hosts: Sequence[str]) -> Authority:
    """A fresh authority for `hosts`: names, or `*.name` for all beneath a name.

    A name constraint cannot leave out what is beneath a name (RFC 5280, section 4.2.1.10), so each
    host stands for its subdomains too; the `Issuer` decides. ValueError for no host, or an address.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = _subject("atp-sandbox egress authority")
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - _VALID_BEFORE)
        .not_valid_after(now + _VALID_AFTER)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(_constraints(hosts), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key))


class Issuer:
    """Issues a certificate for one host at a time, within the authority's constraint."""

    def __init__(self, cert_pem: bytes, key_pem: bytes) -> None:
        """ValueError if either is not what `make_authority` gives."""
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key = serialization.load_pem_private_key(key_pem, None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("the authority's key is of another kind")
        self._key = key
        self._certificate = x509.load_pem_x509_certificate(cert_pem)
        found = self._certificate.extensions.get_extension_for_class(x509.NameConstraints)
        self._permitted = [tree.value for tree in found.value.permitted_subtrees or []]
        self._contexts: dict[str, ssl.SSLContext] = {}

    def context(self, host: str) -> ssl.SSLContext:
        """The server's side of TLS for exactly `host`, kept for the next time.

        It ends a handshake that asks for another name or for none. HTTP/1.1 only. ValueError if
        the authority may not speak for `host`.
        """
        known = self._contexts.get(host)
        if known is None:
            if not any(host == name or host.endswith(f".{name}") for name in self._permitted):
                raise ValueError("the authority is not for this host")
            known = self._contexts[host] = _server_context(host, self._issue(host))
        return known

    def _issue(self, host: str) -> bytes:
        """A certificate and its key, as PEM."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID

        key, issuer = ec.generate_private_key(ec.SECP256R1()), self._certificate
        identifier = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        # OpenSSL's X509_V_FLAG_X509_STRICT, the default of Python 3.13, asks for both identifiers.
        from_issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
        own = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        certificate = (
            x509.CertificateBuilder(issuer.subject, _subject("atp-sandbox egress"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(issuer.not_valid_before_utc)
            .not_valid_after(issuer.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(purpose, critical=False)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(own, critical=False)
            .add_extension(from_issuer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM) + _key_pem(key)


def _server_context(host: str, pem: bytes) -> ssl.SSLContext:
    def refuse_other_names(
        _: ssl.SSLSocket | ssl.SSLObject, name: str | None, __: ssl.SSLContext
    ) -> int | None:
        is_host = name is not None and name.lower() == host
        return None if is_host else int(ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME)

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    # mypy: typeshed leaves out the object of a connection without a socket, as asyncio has it.
    context.sni_callback = refuse_other_names
    memory_fd = os.memfd_create("egress-certificate", os.MFD_CLOEXEC)
    try:
        os.write(memory_fd, pem)  # far below what one write to memory may leave out
        context.load_cert_chain(f"/proc/self/fd/{memory_fd}")
    finally:
        os.close(memory_fd)
    return context


def _subject(organisation: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    # No common name: an old reader might take it for a host.
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation)])


def _constraints(hosts: Sequence[str]) -> x509.NameConstraints:
    from cryptography import x509

    names = sorted({host.removeprefix("*.") for host in hosts})
    if not names or any(_is_address(name) or "*" in name for name in names):
        raise ValueError("an authority is for hosts with names")
    every_address = [ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0")]
    return x509.NameConstraints(
        permitted_subtrees=[x509.DNSName(name) for name in names],
        # A constraint on names says nothing of addresses.
        excluded_subtrees=[x509.IPAddress(network) for network in every_address],
    )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
