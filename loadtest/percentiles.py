"""Percentiles, with linear interpolation: what numpy calls "linear", and Hyndman and Fan type 7.

The p-th percentile of n sorted values x[0..n-1] lies at index (n - 1) p / 100, between its two
neighbours in proportion. With fewer than 100 values the 99th is nearly the largest, so reports
say the largest beside it, and how many values there were.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = (50, 95, 99)


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values that are sorted; at least one."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def summarize(values: Sequence[float], digits: int = 5) -> dict[str, float] | None:
    """p50, p95, p99, max and the number of values; None if there are none."""
    if not values:
        return None
    ordered = sorted(values)
    shown = {f"p{percent}": round(percentile(ordered, percent), digits) for percent in SHOWN}
    return {**shown, "max": round(ordered[-1], digits), "count": len(ordered)}
