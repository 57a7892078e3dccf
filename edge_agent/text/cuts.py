"""Where a session's model is cut, when there are several places: one is drawn for each."""

from __future__ import annotations

import random
from collections.abc import Sequence

from edge_agent.text.ends import ModelEnds


class CutChoice:
    """Draws from some cuts of one model."""

    def __init__(self, cuts: Sequence[ModelEnds], seed: int | None = None) -> None:
        self._cuts = list(cuts)
        self._random = open_random(seed)

    def __call__(self) -> ModelEnds:
        return self._random.choice(self._cuts)

    def __str__(self) -> str:
        return ",".join(str(ends.cut.middle) for ends in self._cuts)


def open_random(seed: int | None) -> random.Random:
    """From a seed or, without one, such as nobody can foresee."""
    return random.SystemRandom() if seed is None else random.Random(seed)


def draw_span(spans: str | None, seed: int | None) -> str | None:
    """One of `a-b,c-d`."""
    return None if spans is None else open_random(seed).choice(spans.split(","))
