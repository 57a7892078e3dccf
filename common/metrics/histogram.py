"""Counts of values by size, cheap enough for every step. Pure; Prometheus reads them elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
STEPS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


class Histogram:
    """How many values were at most each of `bounds`, which rise, or more than all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.total = 0.0  # of all values
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[float, int]]:
        """Each bound, infinity at the end, and how many values were at most that."""
        counted, rows = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            counted += count
            rows.append((bound, counted))
        return rows
