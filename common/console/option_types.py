"""Types of command-line options that several commands share, each with its bounds.

Numbers from a user are bounded like numbers from a peer: what is out of range is named by click,
which says the range, and not by what breaks further in.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import click

MAX_COUNT = 1 << 31
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))  # with tens of thousands torch crashes

if TYPE_CHECKING:
    _Bounds = click.ParamType[tuple[int, int]]
else:
    _Bounds = click.ParamType  # not generic in every version of click


class NamedRange(click.IntRange):
    """A range that is called by a name, where its bounds would be long numbers."""

    def __init__(self, least: int, most: int, words: str) -> None:
        super().__init__(least, most)
        self._words = words

    def _describe_range(self) -> str:
        return self._words


THREADS = click.IntRange(1, MAX_THREADS)
SEED = NamedRange(-(1 << 63), (1 << 64) - 1, "of 64 bits")  # what torch's generators take
COUNT = NamedRange(1, MAX_COUNT, "1 to 2^31")
COUNT_OR_ALL = NamedRange(0, MAX_COUNT, "0 to 2^31")


class WorkerRange(_Bounds):
    """How many workers: `N`, or `A..B` for a pool that grows and shrinks. Gives (A, B)."""

    name = "N|A..B"

    def __init__(self, least: int = 1, most: int = 1000) -> None:
        self._least, self._most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, dots, high = str(value).partition("..")
        try:
            bounds = int(low), int(high if dots else low)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor two, as in 1..8.", param, ctx)
        if not self._least <= bounds[0] <= bounds[1] <= self._most or bounds[1] < 1:
            self.fail(
                f"{value}: expected {self._least} <= A <= B <= {self._most}, and B at least 1.",
                param, ctx,
            )  # fmt: skip
        return bounds


class FiniteRange(click.FloatRange):
    """A range of numbers that NaN is not in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number
