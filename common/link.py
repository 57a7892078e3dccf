"""How long a thin link takes for what was measured: a model of it, nothing is slowed down.

A step goes up and its answer comes down, one after the other over the same bandwidth, and what is
sent arrives half a round trip later: round trip + bytes / bandwidth. Lost packets, a TCP that is
still growing its window, and other traffic are not in it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Link:
    """Between a device and the pool."""

    mbit: float  # 10^6 bits a second
    rtt_ms: float = 0.0

    def take_ms(self, both_ways_bytes: float) -> float:
        """Milliseconds for one exchange of so many bytes, up and down together."""
        return self.rtt_ms + both_ways_bytes * 8 / (self.mbit * 1e3)
