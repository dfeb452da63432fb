"""How long a quiet toolkit waits while its neighbour burns processors, fills memory or crashes."""

from __future__ import annotations

from benchmarks.loads import Load, cpu, echo
from benchmarks.sandbox_arm import sandbox
from benchmarks.settings import Settings, running
from benchmarks.statistics import Section

OUTSTANDING = 8


def storm_loads() -> dict[str, tuple[Load, ...]]:
    """What the neighbour is asked for at the same time."""
    return {
        "nothing else": (),
        "processors": (cpu(OUTSTANDING, 0.05, "cpu_1"),),
        "memory": (Load("memory_1", {}, holds=b'"memory', outstanding=OUTSTANDING),),
        "crashes": (Load("crash_1", {}, holds=b'"crashed"', outstanding=OUTSTANDING),),
    }


def measure(settings: Settings) -> Section:
    title = f"echo, one outstanding, beside {OUTSTANDING} calls of another toolkit; strict, `call`"
    section = Section("storms", title)
    peer = sandbox(settings.folder / "storms", "call", toolkits=2)
    with running(settings, peer, tools=["echo_0"]):
        for number in range(settings.rounds):
            for name, loads in storm_loads().items():
                found = peer.measure_all(settings.seconds * 2, echo(1, tool="echo_0"), *loads)
                row = section.row("bystander", name)
                row.add_measured(found[0])
                row.samples.pop("cpu_us_per_call", None)  # it is the storm's too
                if loads:
                    row.add(storm_calls_per_s=found[1].rate)
                settings.on_progress(
                    f"storms {number + 1}/{settings.rounds}: {name}: "
                    f"p99 {found[0].percentile_ms(0.99):.1f} ms"
                )
    return section
