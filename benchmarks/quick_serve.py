"""`atp-sandbox` with a link that loses no time: `python -m benchmarks.quick_serve serve …`.

A link usually waits for seconds before it connects again and half a minute before it takes a
silent peer for dead. Here it does not, or a thousand reconnects would take hours. The wall clock is
off by what the file of $FAULTS_CLOCK says, if there is one: eight bytes, a double.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from atp_sandbox import link_unit
from atp_sandbox.__main__ import main
from atp_sandbox.atp.connection import LinkTimings

TIMINGS = LinkTimings(
    first_ping_s=0.5,
    ping_interval_s=0.5,
    pong_deadline_s=2.0,
    close_wait_s=0.2,
    backoff_first_s=0.02,
    backoff_cap_s=0.2,
    stable_after_s=0.1,
)


def _bend_wall_clock(path: str) -> None:
    with open(path, "r+b") as file:
        offset = mmap.mmap(file.fileno(), 8)
    real = time.time
    time.time = lambda: real() + float(struct.unpack("d", offset[:8])[0])


if __name__ == "__main__":
    link_unit.LINK_TIMINGS = TIMINGS
    if "FAULTS_CLOCK" in os.environ:
        _bend_wall_clock(os.environ.pop("FAULTS_CLOCK"))
    main()
