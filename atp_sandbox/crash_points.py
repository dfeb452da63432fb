"""Where a test can have the supervisor kill itself, to see what its successor makes of the rest.

`ATP_SANDBOX_CRASH_AT=POINT[:N]`: SIGKILL when POINT is passed for the N-th time.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping

from atp_sandbox.errors import UsageError

VARIABLE = "ATP_SANDBOX_CRASH_AT"
AFTER_ACCEPT = "after-accept"
"""A request is known to be new; nothing of it is written down."""
AFTER_JOURNAL = "after-journal"
"""What this turn of the loop brought is in the journal; nothing was done about it."""
AFTER_START = "after-start"
"""A worker has its call."""
AFTER_RESULT = "after-result"
"""A call has its outcome, which is not written down."""
BEFORE_SEND = "before-send"
"""Answers are in the journal, and none of them is on its way."""
AFTER_SEND = "after-send"
"""The kernel was given answers; the peer has confirmed none of them."""
POINTS = (AFTER_ACCEPT, AFTER_JOURNAL, AFTER_START, AFTER_RESULT, BEFORE_SEND, AFTER_SEND)

_armed = ""
_left = 0


def arm(environ: Mapping[str, str]) -> None:
    """Obey the variable. UsageError if it names no point."""
    global _armed, _left
    point, _, count = environ.get(VARIABLE, "").partition(":")
    if point not in ("", *POINTS) or not (count or "1").isdigit():
        raise UsageError(f"{VARIABLE} names no point", tip=f"one of {', '.join(POINTS)}")
    _armed, _left = point, int(count or "1")


def is_armed() -> bool:
    """Whether any point is one to end at."""
    return bool(_armed)


def reach(point: str) -> None:
    """The supervisor passes `point`."""
    global _left
    if point == _armed:
        _left -= 1
        if _left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
