"""Types of command-line options that several commands share, each with its bounds.

Numbers from a user are bounded like numbers from a peer: what is out of range is named by click,
which says the range, and not by what breaks further in.
"""

from __future__ import annotations

import math
import os
from typing import Any

import click

MAX_COUNT = 1 << 31
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # with tens of thousands torch crashes

THREADS = click.IntRange(1, MAX_THREADS)
SEED = click.IntRange(-(1 << 63), (1 << 64) - 1)  # what torch's generators take
COUNT = click.IntRange(1, MAX_COUNT)


class FiniteRange(click.FloatRange):
    """A range of numbers that NaN is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number
