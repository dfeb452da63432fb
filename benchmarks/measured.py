"""What a measurement gives, whatever was measured. PURE."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Measured:
    """What one measurement gave."""

    calls: int
    seconds: float
    latencies_s: list[float] = field(default_factory=list)
    """Ascending; empty where not taken."""
    cpu_s: float = 0.0
    """Of the system under test (supervisor alone for the sandbox)."""
    generator_cpu_s: float = 0.0
    """Of the load generator."""

    @property
    def rate(self) -> float:
        """Calls per second."""
        return self.calls / self.seconds if self.seconds else 0.0

    def percentile_ms(self, share: float) -> float:
        """The latency that this share of the calls did not exceed; 0 where none was taken."""
        if not self.latencies_s:
            return 0.0
        last = len(self.latencies_s) - 1
        return self.latencies_s[min(last, int(share * len(self.latencies_s)))] * 1e3
