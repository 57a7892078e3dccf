"""Tokens per round trip of drafters on texts that a model writes, without a pool.

The rows that cross the cut are computed beforehand, and sent through no codec; what a drafter sees,
and the caches it works on, are a session's.

Letters: T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from edge_agent.text.drafting.drafter import Draft, Drafter
from edge_agent.text.drafting.measure import KnownText, tokens_per_round_trip
from edge_agent.text.ends import EndCaches, ModelEnds
from evaluation.drafting.whole_model import WholeModel

Open = Callable[[ModelEnds, EndCaches], Drafter | None]


def know_texts(model: WholeModel, texts: Sequence[Sequence[int]], prompt: int) -> list[KnownText]:
    """Texts that begin with a prompt of so many tokens, with their rows."""
    known = []
    for text in texts:
        boundary, tail_inputs = model.rows([text])
        known.append(KnownText(text, prompt, boundary[0], tail_inputs[0]))
    return known


def measure_drafter(
    open_drafter: Open, ends: ModelEnds, texts: Sequence[KnownText], limit: int
) -> float:
    """Tokens per round trip; 1 where the sessions have no drafter."""

    def begin(text: KnownText) -> Drafter:
        caches = ends.new_caches()
        return _InStep(open_drafter(ends, caches) or _Silent(), text, ends, caches)

    return tokens_per_round_trip(begin, texts, limit)


class _Silent:
    """Guesses nothing."""

    name = "off"
    is_free = True

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        return []

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        pass

    def cut_back(self, position: int) -> None:
        pass


class _InStep:
    """A drafter whose session's caches go along with the text."""

    def __init__(
        self, drafter: Drafter, text: KnownText, ends: ModelEnds, caches: EndCaches
    ) -> None:
        self.name, self.is_free = drafter.name, drafter.is_free
        self.propose = drafter.propose
        self.cut_back = drafter.cut_back
        self._drafter = drafter
        self._text = text
        self._ends = ends
        self._caches = caches

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        begin = self._caches.head.length
        ids = self._text.token_ids[begin : begin + len(boundary)]
        self._ends.run_heads([(ids, self._caches)])
        self._ends.run_tails([(tail_inputs, self._caches)])
        self._drafter.observe(boundary, tail_inputs)
