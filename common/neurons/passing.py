"""What the neurons of a span's layers need to know of a batch: whose rows are whose, and how far.

The library's forward has no argument that would carry it from the span to an MLP, so it lies where
both look, in each thread's own pass.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from common.spans.states import NEURONS, StatePass, States


class Rows(Protocol):
    """The rows of one session in a batch; common/spans/attention.py has them as Segment."""

    @property
    def rows(self) -> int: ...

    @property
    def marks(self) -> Sequence[tuple[int, bool]]: ...


@dataclass(frozen=True, slots=True)
class Run:
    """Some rows of a batch that belong together: of one session, and all of a prompt or none."""

    session: int
    first: int
    rows: int
    of_prompt: bool

    @property
    def place(self) -> slice:
        return slice(self.first, self.first + self.rows)


class NeuronPass:
    """One batch on its way through a span."""

    def __init__(
        self, segments: Sequence[Rows], states: Sequence[States | None], passes: Sequence[StatePass]
    ) -> None:
        self.sessions = len(segments)
        self.has_prompt = any(mark for segment in segments for _, mark in segment.marks)
        self._segments = segments
        self._states = states
        self._passes = passes
        self._runs: list[Run] = []
        self.cores: dict[int, Any] = {}  # by layer, for its matrices one after another

    def states(self, session: int) -> States:
        states = self._states[session]
        assert states is not None, "a span whose sessions have cores keeps their votes"
        return states

    def votes(self, session: int, layer: int) -> Tensor | None:
        """For a session's core in one layer, by now; None before its first token."""
        return self._passes[session].find((layer, NEURONS, 0))

    def put_votes(self, session: int, layer: int, votes: Tensor) -> None:
        self._passes[session].values[(layer, NEURONS, 0)] = votes

    def runs(self) -> list[Run]:
        """All rows, in their order; every layer asks for them."""
        first = 0
        for session, segment in enumerate(() if self._runs else self._segments):
            for rows, of_prompt in segment.marks or ((segment.rows, False),):
                self._runs.append(Run(session, first, rows, of_prompt))
                first += rows
        return self._runs


class Passing(threading.local):
    """The batch that is on its way in this thread; None while a span is tried out."""

    batch: NeuronPass | None = None
