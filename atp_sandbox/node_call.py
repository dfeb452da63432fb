"""One call as the supervisor hands it to a node."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from atp_sandbox.discovery import Tool

_SECRET_CHARS = 6
"""Shorter strings of a token, such as its kind, are no secret and stand in many texts."""


@dataclass(slots=True)
class NodeCall:
    """One call on its way through a node. `context` is the submitter's and comes back untouched."""

    toolkit: str
    tool: Tool
    params: bytes = field(repr=False)
    token: bytes | None = field(repr=False)
    received_at: float
    context: object = None
    is_sample: bool = False
    call_id: bytes = b""
    """Random, given when the call is handed to a worker; its answer must carry it."""
    stands_for: dict[str, bytes] = field(default_factory=dict, repr=False)
    """If its token is put in outside the jail: what the placeholders in `token` stand for."""
    is_handed: bool = False
    """Whether its worker was given it since it was assigned the last time."""

    def secrets(self) -> list[str]:
        """What of its token may not be logged, whoever prints it: each of its longer strings.

        Also of one that never entered the jail: it may have come among the parameters as well.
        """
        found: list[str] = []
        todo: list[object] = [] if self.token is None else [json.loads(self.token)]
        todo += [secret.decode("utf-8", "replace") for secret in self.stands_for.values()]
        while todo:
            value = todo.pop()
            if isinstance(value, dict):
                todo += value.values()
            elif isinstance(value, list):
                todo += value
            elif isinstance(value, str) and len(value) >= _SECRET_CHARS:
                found.append(value)
        return found
