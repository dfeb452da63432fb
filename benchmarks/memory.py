"""Memory of the supervisor, of an idle toolkit and of each further worker, in MB."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.loads import echo
from benchmarks.machine import roles
from benchmarks.peer import Peer
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Settings, running
from benchmarks.statistics import Section

MANY = 8
SETTLE_S = 0.5
IDLE_TOOLKIT = "idle toolkit"


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process, in MB."""

    pss: float = 0.0
    private: float = 0.0
    beyond: float = 0.0
    """Of `pss`, what is not a file's pages that others map too: not interpreter, not libraries."""

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.pss + other.pss, self.private + other.private, self.beyond + other.beyond
        )


def measure(settings: Settings) -> Section:
    section = Section("memory", "MB while idle, strict, lifetime `call`")
    few = sandbox(settings.folder / "few", "call", "--concurrency", "1")
    many = sandbox(settings.folder / "many", "call", "--concurrency", str(MANY))
    with running(settings, few, many):
        for number in range(settings.rounds):
            for peer, arm in ((few, "1 at once"), (many, f"{MANY} at once")):
                peer.measure(0.05, echo(1))
                time.sleep(SETTLE_S)  # for those who end, and those forked ahead
                _add(section, peer, arm)
            settings.on_progress(f"memory {number + 1}/{settings.rounds}")
    section.notes.append(
        "Beyond: PSS without pages of files that others map too (interpreter, libraries). What a "
        "toolkit shares with its waiting workers is counted to the toolkit; a worker is what it "
        "has to itself."
    )
    return section


def _add(section: Section, peer: Peer, arm: str) -> None:
    by_role = roles(peer.pid)
    workers = [_memory(pid) for pid in by_role["worker"]]
    jail = sum((_memory(pid) for pid in by_role["warden"] + by_role["zygote"]), Memory())
    for worker in workers:
        shared = Memory(worker.pss - worker.private, 0.0, worker.beyond - worker.private)
        jail += shared
    _put(section, "supervisor", arm, _memory(peer.pid))
    if by_role["egress"]:
        _put(section, "egress process", arm, _memory(by_role["egress"][0]))
    _put(section, IDLE_TOOLKIT, arm, jail)
    for worker in workers[:1]:
        own = Memory(worker.private, worker.private, worker.private)
        _put(section, "waiting worker", arm, own)


def _put(section: Section, name: str, arm: str, memory: Memory) -> None:
    section.row(name, arm).add(
        pss_mb=memory.pss, private_mb=memory.private, beyond_mb=memory.beyond
    )


def _memory(pid: int) -> Memory:
    """All zero of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return Memory()
    mb = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.endswith("kB")}
    anonymous = mb["Pss_Anon"] + mb["Pss_Shmem"]
    private = mb["Private_Clean"] + mb["Private_Dirty"]
    return Memory(mb["Pss"], private, max(anonymous + mb["Private_Clean"], private))
