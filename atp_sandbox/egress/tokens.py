"""What a tool gets in place of a token that is put in outside its jail."""

from __future__ import annotations

import json
import secrets

from atp_sandbox.egress.placeholders import DIGITS, PREFIX

MAX_TOKEN_BYTES = 64 * 1024
"""Of JSON; servers take headers of 8 to 64 KiB."""
MAX_PLACEHOLDERS = 32
"""Of one token."""
MIN_SECRET_CHARS = 8
"""Of a string among others: a shorter one is a kind (`Bearer`) or a flag."""


def substitute(token_json: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The token with placeholders for its secrets, and what each of them stands for.

    `token_json` is one JSON value. A string that is all of it is a secret; so is each longer string
    in a structure. Names of members, numbers and short strings are kept. ValueError if it is larger
    than a header could be.
    """
    if len(token_json) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token of more than {MAX_TOKEN_BYTES // 1024} KiB")
    stands_for: dict[str, bytes] = {}

    def replaced(value: object) -> object:
        if isinstance(value, str) and (len(value) >= MIN_SECRET_CHARS or value is whole):
            placeholder = PREFIX + secrets.token_hex(DIGITS // 2)
            stands_for[placeholder] = value.encode("utf-8", "surrogatepass")
            return placeholder
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if isinstance(value, dict):
            return {name: replaced(one) for name, one in value.items()}
        return value

    whole: object = json.loads(token_json)
    held = json.dumps(replaced(whole)).encode()
    if len(stands_for) > MAX_PLACEHOLDERS:
        raise ValueError(f"a token of more than {MAX_PLACEHOLDERS} strings")
    return held, stands_for
