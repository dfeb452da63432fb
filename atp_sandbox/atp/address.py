"""Where a backend is and as whom to connect, and what of that may be shown. PURE.

The API key is part of the websocket's URL: whatever is to be logged goes through `redact`.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
import unicodedata
import urllib.parse
from dataclasses import dataclass, field

from atp_sandbox.errors import UsageError

MAX_RETRY_AFTER_S = 300.0
"""A `Retry-After` of more is not waited for in full."""

_PATHS = {"0.1": "/ws/v1/atp/", "0.2": "/ws/v1/atp/toolkit-client/"}


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where the backend is and as whom to connect; UsageError if that cannot be.

    `generation` is the SDK's: `0.1` (0.1.0 and 0.1.1) or `0.2` (all later ones).
    """

    base_url: str
    api_key: str = field(repr=False)
    generation: str = "0.2"

    def __post_init__(self) -> None:
        if not self.api_key:
            raise UsageError("the API key is empty", tip="set the key of this toolkit")
        if _has_control(self.api_key):
            raise UsageError(
                "the API key holds control characters", tip="copy the key again, without line ends"
            )
        example = "write for example https://api.chat-atp.com"
        if _has_control(self.base_url) or re.search(r"[\s?#]", self.base_url):
            raise UsageError(
                "the base URL holds white space, control characters, '?' or '#'", tip=example
            )
        try:
            parts = urllib.parse.urlsplit(self.base_url)
            is_usable = parts.scheme in ("http", "https") and bool(parts.hostname)
            _ = parts.port  # ValueError where it is no number
        except ValueError as error:
            raise UsageError("the base URL is not valid", cause=str(error), tip=example) from None
        if not is_usable:
            raise UsageError("the base URL needs http:// or https:// and a host", tip=example)
        if self.generation not in _PATHS:
            raise UsageError("no such generation of the websocket path", tip="write 0.1 or 0.2")

    def url(self) -> str:
        """The websocket's URL, with the key in it as it is."""
        return self._url_with(self.api_key)

    @property
    def redacted(self) -> str:
        """The URL for logs."""
        shown = re.sub(r"//[^/]*@", "//***@", self._url_with("***"))
        return shown.replace(self.api_key, "***")

    def _url_with(self, key: str) -> str:
        scheme, rest = self.base_url.rstrip("/").split(":", 1)
        ws_scheme = "wss" if scheme.lower() == "https" else "ws"
        return f"{ws_scheme}:{rest}{_PATHS[self.generation]}{key}/"


def _has_control(text: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def redact(text: str, api_key: str) -> str:
    """`text` without the key, in each of the spellings that libraries give it."""
    quoted = {urllib.parse.quote(api_key, safe=safe) for safe in ("", "/")}
    spellings = {api_key, *quoted, urllib.parse.quote_plus(api_key), json.dumps(api_key)[1:-1]}
    spellings |= {repr(api_key)[1:-1]}
    for spelling in sorted(spellings, key=len, reverse=True):
        text = text.replace(spelling, "***")
    return text


def parse_retry_after(value: str | None, *, wall_now: float | None = None) -> float | None:
    """Seconds of a `Retry-After` header (RFC 9110, 10.2.3), at most `MAX_RETRY_AFTER_S`."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        return min(float(value), MAX_RETRY_AFTER_S)
    try:
        moment = email.utils.parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError):
        return None
    left = moment - (time.time() if wall_now is None else wall_now)
    return min(max(left, 0.0), MAX_RETRY_AFTER_S)
