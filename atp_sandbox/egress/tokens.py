"""What a tool gets in place of a token that is put in outside its jail."""

from __future__ import annotations

import json
import secrets

from atp_sandbox.egress.placeholders import DIGITS, PREFIX


def substitute(token_json: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The token with a placeholder for each string in it, and what each placeholder stands for.

    `token_json` is one JSON value; names of members are kept, as they are no secret.
    """
    stands_for: dict[str, bytes] = {}

    def replaced(value: object) -> object:
        if isinstance(value, str):
            placeholder = PREFIX + secrets.token_hex(DIGITS // 2)
            stands_for[placeholder] = value.encode("utf-8", "surrogatepass")
            return placeholder
        if isinstance(value, list):
            return [replaced(one) for one in value]
        if isinstance(value, dict):
            return {name: replaced(one) for name, one in value.items()}
        return value if isinstance(value, bool) or value is None else replaced(str(value))

    return json.dumps(replaced(json.loads(token_json))).encode(), stands_for
