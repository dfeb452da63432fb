"""Where a placeholder may stand, and where a token may not. PURE: bytes in, bytes or Denied out.

Egress process only. A toolkit holds a *placeholder*, `PREFIX` and 32 hexadecimal digits, in place
of each token. `fill_headers` puts the token in, `Leaving` finds a placeholder that leaves by any
other way, `Returning` finds a token on its way back.

Whatever begins with `PREFIX` counts as a placeholder, whether one was ever made of it or not: the
prefix is nothing that turns up by chance, and one rule is easier to keep than two.
"""

from __future__ import annotations

import base64
import binascii
import html
import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote, quote_plus

from atp_sandbox.egress.denial import Denied

PREFIX = "atp-placeholder-"
DIGITS = 32
"""Lower-case hexadecimal digits after the prefix: `PREFIX + secrets.token_hex(DIGITS // 2)`."""

_PREFIX = PREFIX.encode()
_PLACEHOLDER = re.compile(re.escape(_PREFIX) + rb"[0-9a-f]{%d}" % DIGITS)
_BASIC = re.compile(rb"(basic +)([A-Za-z0-9+/]+)(={0,2})", re.IGNORECASE)
# RFC 9110, section 5.5, without what a careless reader may take for the end of a line.
_FIELD_TEXT = re.compile(rb"[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")
_MIN_SHAPE_BYTES = 8
"""A shorter token, or piece of an encoded one, turns up by chance; and who can have it looked for
can guess it."""

Headers = Iterable[tuple[bytes, bytes]]


def holds_placeholder(text: bytes) -> bool:
    return _PREFIX in text


class Leaving:
    """Looks for a placeholder in a stream; how the bytes are split makes no difference.

    What was fed before the chunk that completes one may be sent on: it is worth nothing alone.
    """

    def __init__(self) -> None:
        self._tail = b""
        self._found = False

    def feed(self, chunk: bytes) -> bool:
        """Whether a placeholder has been seen in the stream so far."""
        if not self._found:
            overlap = len(_PREFIX) - 1
            self._found = _PREFIX in chunk or _PREFIX in self._tail + chunk[:overlap]
            self._tail = (self._tail + chunk[-overlap:])[-overlap:]
        return self._found


def fill_headers(headers: Headers, secrets: Mapping[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The request headers with each placeholder's token in its place, also in Basic credentials.

    `secrets` has the token of each placeholder that is alive. Denied if a placeholder is not, if
    one stands in a name or in Host, and if a token holds what no header may hold.
    """
    filled = []
    for name, value in headers:
        if _PREFIX in name or (name.lower() == b"host" and _PREFIX in value):
            raise Denied("a placeholder outside the value of a header")
        if name.lower() == b"authorization":
            value = _fill_basic(value, secrets)
        filled.append((name, _fill(value, secrets)))
    return filled


def _fill(value: bytes, secrets: Mapping[bytes, bytes]) -> bytes:
    if _PREFIX not in value:
        return value
    if len(_PLACEHOLDER.findall(value)) != value.count(_PREFIX):
        raise Denied("a placeholder that was never given")
    return _PLACEHOLDER.sub(lambda match: _token_of(match.group(), secrets), value)


def _token_of(placeholder: bytes, secrets: Mapping[bytes, bytes]) -> bytes:
    token = secrets.get(placeholder)
    if token is None:
        raise Denied("a placeholder whose call has ended")
    if not _FIELD_TEXT.fullmatch(token):
        raise Denied("a secret that does not fit into a header")
    return token


def _fill_basic(value: bytes, secrets: Mapping[bytes, bytes]) -> bytes:
    """RFC 7617: the credentials are base64 of `user:password`, and either may be the token."""
    parts = _BASIC.fullmatch(value)
    if parts is None:
        return value
    scheme, encoded, _ = parts.groups()
    try:
        credentials = base64.b64decode(encoded + b"=" * (-len(encoded) % 4))
    except binascii.Error:
        return value
    if _PREFIX not in credentials:
        return value
    return scheme + base64.b64encode(_fill(credentials, secrets))


class Returning:
    """Lets an answer pass as long as it holds none of `tokens`; one object an answer.

    A token is known as it is and in the shapes that a host gives it when it tells what it was sent:
    percent-encoded, escaped for JSON or HTML, hexadecimal, and within base64. Not found is what the
    host changed in another way: reversed, cut into pieces, compressed, encrypted.
    """

    def __init__(self, tokens: Iterable[bytes]) -> None:
        long = [token for token in tokens if len(token) >= _MIN_SHAPE_BYTES]
        self._shapes = sorted({shape for token in long for shape in _shapes_of(token)})
        self._held = b""

    def check(self, text: bytes) -> None:
        """Denied if `text`, which stands alone, holds a token."""
        if any(shape in text for shape in self._shapes):
            raise Denied("the answer holds the token")

    def feed(self, chunk: bytes) -> bytes:
        """What of the body may go on. Denied once it holds a token, of which nothing went on."""
        body = self._held + chunk
        self.check(body)
        cut = min((_start_of_beginning(body, shape) for shape in self._shapes), default=len(body))
        self._held = body[cut:]
        return body[:cut]

    def finish(self) -> bytes:
        """What was held back because a token might have begun there; the body has ended."""
        rest, self._held = self._held, b""
        return rest


def _start_of_beginning(body: bytes, shape: bytes) -> int:
    """Where at the end of `body` the first bytes of `shape` begin; the end if they do not."""
    start = body.find(shape[:1], max(0, len(body) - len(shape) + 1))
    while start >= 0 and not shape.startswith(body[start:]):
        start = body.find(shape[:1], start + 1)
    return len(body) if start < 0 else start


def _shapes_of(token: bytes) -> set[bytes]:
    if not token:
        return set()
    text = token.decode("latin-1")
    in_json = json.dumps(text)[1:-1]
    encoded = {
        quote(token, safe="").encode(),
        quote_plus(token).encode(),
        in_json.encode(),
        in_json.replace("/", "\\/").encode(),
        html.escape(text).encode("latin-1"),
        token.hex().encode(),
        token.hex().upper().encode(),
    }
    for before in range(3):  # in base64 its letters depend on how many bytes stand before it
        # Without the letters at either end that are made of its neighbours' bits too.
        first, last = (before * 8 + 5) // 6, (before + len(token)) * 8 // 6
        letters = base64.b64encode(bytes(before) + token)[first:last]
        encoded |= {letters, letters.translate(bytes.maketrans(b"+/", b"-_"))}
    return {token} | {shape for shape in encoded if len(shape) >= _MIN_SHAPE_BYTES}
