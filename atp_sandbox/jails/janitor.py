"""A process that clears up after its supervisor, should that be killed.

`python -I -S -B janitor.py`, with the reading end of a pipe as standard input and nothing else: one
line says what to clear up, then there is silence as long as the supervisor lives, and `END` where
it ends in order. Its death is the end of the pipe, or of its process if somebody inherited the
other end. Processes end by themselves then (PR_SET_PDEATHSIG, and the end of their channels), and
mounts go with them; what is left are frozen processes, control groups and the scratch directories
of jails without namespaces. Trusted side; the standard library alone, no secret, no path that a
jail can write.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import select
import signal
import sys
import time
from typing import Any

END = b"."
"""The supervisor's last word: there is nothing to clear up."""
MAX_LINE_BYTES = 32 * 1024
"""Less than a pipe holds, so that whoever writes it never waits: pipe(7)."""
_ORDERLY_S = 0.4
"""For processes that end by themselves before those that are left are killed."""
_TIDY_S = 4.0
"""The same, if there are wardens that first empty their scratch; usually milliseconds."""
_LONGEST_S = 6.0
"""Of clearing up; what is left then is left to the next start."""
_LOOK_S = 0.02
_SETTLE_S = 0.2
"""For a process that was making a scratch directory just then."""


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Who stops a whole group or service stops the supervisor as well, which tells us.
        signal.signal(number, signal.SIG_IGN)
    line, rest = _read_line()
    duty = json.loads(line)
    sys.path.append(duty["path"])
    from workers.confinement import privileges

    with contextlib.suppress(OSError):
        privileges.wake_with_parent()
    # Now, not when it is needed: an upgrade may have replaced the files by then.
    from atp_sandbox.jails import cgroups

    if END in rest or not _outlives(duty["supervisor"]):
        return
    died_at = time.monotonic()
    deadline = died_at + _LONGEST_S
    if duty["groups"]:
        # Wardens without namespaces are still at work then: they empty their scratch.
        orderly_s = _TIDY_S if _left(duty["scratch"]) else _ORDERLY_S
        support = cgroups.CgroupSupport(duty["version"], duty["groups"])
        while not cgroups.remove_dead(support, duty["tree"], orderly_s):
            if time.monotonic() >= deadline:
                break
            orderly_s = _LOOK_S
    # Nothing tells that a directory of others became empty, or that one is still being made.
    while _left(duty["scratch"]) or time.monotonic() < died_at + _SETTLE_S:
        if time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_S)


def _read_line() -> tuple[bytes, bytes]:
    """What to do, and what came after it."""
    read = b""
    while b"\n" not in read:
        piece = os.read(0, MAX_LINE_BYTES)
        if not piece:
            sys.exit()  # there is nothing yet
        read += piece
    line, _, rest = read.partition(b"\n")
    return line, rest


def _outlives(supervisor: int) -> bool:
    """Wait for the supervisor's end; whether it came without a last word."""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(supervisor)
        if os.getppid() == supervisor:  # else the number may be somebody else's by now
            poll.register(process, select.POLLIN)
    poll.poll()
    os.set_blocking(0, False)
    with contextlib.suppress(BlockingIOError):
        return END not in os.read(0, 16)
    return True


def _left(prefix: str) -> bool:
    """Remove the scratch directories that their wardens have emptied; whether others are left."""
    found: list[Any] = glob.glob(f"{glob.escape(prefix)}*")
    for path in found:
        with contextlib.suppress(OSError):
            os.rmdir(path)
    return any(map(os.path.lexists, found))


if __name__ == "__main__":
    main()
