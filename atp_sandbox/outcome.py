"""How a call can end: a closed vocabulary, and its form on the wire.

PURE. A call ends in `Success` or in one `Failure`, never in both and never in neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """Why a call failed. Limit kinds are given only on evidence from outside the worker."""

    UNKNOWN_TOOL = "unknown_tool"
    INVALID_PARAMS = "invalid_params"
    AUTH_REQUIRED = "auth_required"
    TOOL_ERROR = "tool_error"
    INVALID_RESULT = "invalid_result"
    TIMEOUT = "timeout"
    CPU_LIMIT = "cpu_limit"
    MEMORY_LIMIT = "memory_limit"
    OUTPUT_LIMIT = "output_limit"
    PROCESS_LIMIT = "process_limit"
    DISK_LIMIT = "disk_limit"
    CRASHED = "crashed"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    INTERRUPTED = "interrupted"
    INTERNAL_ERROR = "internal_error"


RETRYABLE = frozenset({Kind.OVERLOADED, Kind.UNAVAILABLE, Kind.INTERNAL_ERROR})
"""Kinds where the same call may well succeed later. A crash or a limit will most likely repeat, and
what was interrupted may have done its work already."""


@dataclass(frozen=True, slots=True)
class Limit:
    """The bound that was hit, as the answer names it."""

    name: str
    value: float
    unit: str


@dataclass(frozen=True, slots=True)
class Success:
    """`result_json` is one JSON value, checked, in the spelling that goes out."""

    result_json: str


@dataclass(frozen=True, slots=True)
class Failure:
    """`error` is one plain sentence; for an exception of the tool exactly its `str()`."""

    kind: Kind
    error: str
    limit: Limit | None = None
    retry_after_s: float | None = None
    details: Mapping[str, object] = field(default_factory=dict)
    """Further plain JSON members, for example the names of missing parameters."""
    never_ran: bool = False
    """For `interrupted`: trying again cannot do the same thing twice."""

    @property
    def retryable(self) -> bool:
        return self.kind in RETRYABLE or self.never_ran


Outcome = Success | Failure


def outcome_json(outcome: Outcome) -> str:
    """The JSON text of the answer's `result` member."""
    if isinstance(outcome, Success):
        return outcome.result_json
    answer: dict[str, object] = {"error": outcome.error, "error_type": outcome.kind.value}
    if outcome.limit is not None:
        limit = outcome.limit
        answer["limit"] = {"name": limit.name, "value": limit.value, "unit": limit.unit}
    if outcome.retry_after_s is not None:
        answer["retry_after_s"] = outcome.retry_after_s
    answer["retryable"] = outcome.retryable
    answer.update(outcome.details)
    return json.dumps(answer, allow_nan=False)
