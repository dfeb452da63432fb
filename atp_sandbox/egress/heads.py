"""Heads of requests and answers where TLS is ended: what is sent on in their place. PURE.

A head is refused where two readers could take it differently, and written anew where not.
"""

from __future__ import annotations

from collections.abc import Mapping

import h11

from atp_sandbox.egress.denial import Denied
from atp_sandbox.egress.placeholders import Headers, fill_headers, holds_placeholder

MAX_HEAD_BYTES = 64 * 1024
"""All header lines of a message; servers in use take 8 to 64 KiB."""

# RFC 9110, section 7.6.1, and what clients send in its spirit.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade http2-settings".split()
)
_SET_HERE = frozenset((b"host", b"content-length", b"accept-encoding", b"range", b"if-range"))


def forwarded(
    request: h11.Request, host: str, port: int, secrets: Mapping[bytes, bytes]
) -> h11.Request:
    """What the host is sent in place of `request`. Denied if it is to see none of it."""
    headers, target = request.headers, request.target
    if request.http_version not in (b"1.0", b"1.1"):
        raise Denied("a request that is not proper HTTP/1.1")
    # h11 bounds what is not whole yet; this is a head that came in one read with another's end.
    if sum(len(name) + len(value) for name, value in headers) + len(target) > MAX_HEAD_BYTES:
        raise Denied("a request whose head is too long")
    if request.method in (b"CONNECT", b"TRACE"):
        raise Denied("a method that is not for this host")  # TRACE tells what it was sent
    if not target.startswith(b"/") and (request.method, target) != (b"OPTIONS", b"*"):
        raise Denied("a request whose target is not a path")
    if holds_placeholder(target) or holds_placeholder(request.method):
        raise Denied("a placeholder outside the value of a header")
    names = [name for name, _ in headers]
    if b"transfer-encoding" in names and b"content-length" in names:
        raise Denied("a request with two lengths")
    _check_host(headers, host.encode(), port)
    kept = end_to_end(fill_headers(headers.raw_items(), secrets), headers)
    own = [(b"Host", host.encode() if port == 443 else b"%b:%d" % (host.encode(), port))]
    own += [(name, value) for name, value in headers if name == b"content-length"]
    if b"transfer-encoding" in names:
        own.append((b"Transfer-Encoding", b"chunked"))
    own.append((b"Accept-Encoding", b"identity"))
    kept = [(name, value) for name, value in kept if name.lower() not in _SET_HERE]
    return h11.Request(method=request.method, target=target, headers=own + kept)


def _check_host(headers: Headers, host: bytes, port: int) -> None:
    told = [value.lower() for name, value in headers if name == b"host"]
    allowed = [b"%b:%d" % (host, port)] + ([host] if port == 443 else [])
    if len(told) != 1 or told[0] not in allowed:
        raise Denied("a request for another host")


def end_to_end(raw: Headers, headers: Headers) -> list[tuple[bytes, bytes]]:
    """`raw` without what is for one connection only; `headers` are the same in lower case."""
    named = b",".join(value for name, value in headers if name == b"connection").lower().split(b",")
    # A Connection header that names what frames a body shall not take the framing away.
    dropped = _HOP_BY_HOP | ({name.strip() for name in named} - {b"content-length"})
    return [(name, value) for name, value in raw if name.lower() not in dropped]


def has_body(headers: Headers) -> bool:
    """Whether any byte may come: h11 has checked that a length is a number."""
    return any(
        name == b"transfer-encoding" or (name == b"content-length" and int(value) > 0)
        for name, value in headers
    )


def is_plain(headers: Headers) -> bool:
    codings = [value.strip().lower() for name, value in headers if name == b"content-encoding"]
    return all(coding in (b"", b"identity") for coding in codings)
