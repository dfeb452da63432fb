"""What the journal costs: calls through one `serve` with it and without, in turn.

    python -m benchmarks.journal [--rounds 7] [--seconds 3] [--json FILE]

A real websocket, `strict` isolation, echo with 300 bytes, 1 and 64 calls outstanding, lifetimes
`call` and `calls:1000`. Both supervisors run at the same time; only one of them has work. Printed
are medians over the rounds with their spread, and the ratio of each round with the journal to the
one without beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.system import System
from benchmarks.wire import Backend, Link, request_text

MODES = ("on", "off")
LIFETIMES = ("call", "calls:1000")
OUTSTANDING = (1, 64)
START_S = 30.0
TOOLKIT = """
from atp_sdk.clients import ToolKitClient

client = ToolKitClient(api_key="x", app_name="journal")


@client.register_tool("echo", ["value"], [], "d", None, None, None)
def echo(value=None, **_):
    return value


client.start()
"""
VALUE = "x" * 300


class Arm:
    """One `serve` and the load on it."""

    def __init__(self, folder: Path, mode: str, lifetime: str) -> None:
        folder.mkdir()
        (folder / "kit.py").write_text(TOOLKIT)
        self.mode, self.lifetime = mode, lifetime
        self._folder = folder
        self._backend = Backend(self)
        self._system: System | None = None
        self._answered = 0
        self._left = 0
        self._sent = 0
        self._done = asyncio.Event()

    async def start(self) -> None:
        await self._backend.start()
        command = [sys.executable, "-m", "atp_sandbox", "serve", "kit.py"]
        command += ["--base-url", self._backend.url, "--lifetime", self.lifetime]
        command += ["--journal", self.mode, "--state-dir", str(self._folder / "state")]
        self._system = System(command, self._folder, {"ATP_API_KEY": "benchmark"})
        self._system.start()
        await asyncio.wait_for(self._backend.connected.wait(), START_S)
        await self.measure(16, 1.0)  # warm

    async def measure(self, outstanding: int, seconds: float) -> float:
        """Calls per second with so many outstanding."""
        self._answered, self._done = 0, asyncio.Event()
        self._left = outstanding
        began = time.perf_counter()
        self._until = began + seconds
        for _ in range(outstanding):
            self._send()
        await self._done.wait()
        return self._answered / (time.perf_counter() - began)

    async def stop(self) -> None:
        if self._system is not None:
            self._system.signal(15)
            await self._system.wait(START_S)
            self._system.kill()
        self._backend.close()

    def _send(self) -> None:
        self._sent += 1
        link = self._backend.link
        assert link is not None, "the supervisor is gone"
        link.send_text(request_text(self._sent, "echo", {"value": VALUE}))

    def text_received(self, link: Link, data: bytes) -> None:
        if json.loads(data)["result"] != VALUE:
            raise AssertionError(f"a wrong answer: {data[:300]!r}")
        self._answered += 1
        if time.perf_counter() < self._until:
            self._send()
            return
        self._left -= 1
        if not self._left:
            self._done.set()

    def link_opened(self, link: Link) -> None: ...
    def link_closed(self, link: Link) -> None: ...
    def pong_received(self, link: Link, payload: bytes) -> None: ...


async def compare(folder: Path, lifetime: str, rounds: int, seconds: float) -> list[dict[str, Any]]:
    arms = [Arm(folder / f"{lifetime.replace(':', '-')}-{m}", m, lifetime) for m in MODES]
    rows = []
    try:
        for arm in arms:
            await arm.start()
        for outstanding in OUTSTANDING:
            found: dict[str, list[float]] = {mode: [] for mode in MODES}
            for number in range(rounds):
                for arm in arms if number % 2 else reversed(arms):
                    found[arm.mode].append(await arm.measure(outstanding, seconds))
                print(".", end="", file=sys.stderr, flush=True)
            ratios = [on / off for on, off in zip(found["on"], found["off"], strict=True)]
            rows.append(
                {
                    "lifetime": lifetime,
                    "outstanding": outstanding,
                    **{mode: [round(rate, 1) for rate in found[mode]] for mode in MODES},
                    "ratio": [round(ratio, 3) for ratio in ratios],
                }
            )
    finally:
        for arm in arms:
            with contextlib.suppress(Exception):
                await arm.stop()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print("\n| lifetime | outstanding | without, calls/s | with | ratio (lowest to highest) |")
    print("|---|---|---|---|---|")
    for row in rows:
        on, off, ratio = (statistics.median(row[name]) for name in ("on", "off", "ratio"))
        print(
            f"| `{row['lifetime']}` | {row['outstanding']} | {off:,.0f} | {on:,.0f} "
            f"| {ratio:.2f} ({min(row['ratio']):.2f} to {max(row['ratio']):.2f}) |"
        )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="atp-journal-") as folder:
        for lifetime in LIFETIMES:
            rows += await compare(Path(folder), lifetime, given.rounds, given.seconds)
    show(rows)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    asyncio.run(main())
