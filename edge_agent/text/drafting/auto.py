"""The best drafter there is for each proposal: copies, n-grams, or the trained layer where it pays.

A long match in the session's own text is hardest to beat and costs nothing. N-grams cost nothing
either, and where each guess of a proposal is sure they are right as often as the layer, which costs
a pass through both ends for each guess: it is asked where the link is slow enough for that, or
n-grams know little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from edge_agent.text.drafting import grades
from edge_agent.text.drafting.drafter import Draft, Drafter
from edge_agent.text.drafting.layer_worth import LayerWorth
from edge_agent.text.drafting.lookup import EDITED_GRADE, LONG_GRADE, LookupDrafter

SURE_SHARE = grades.NGRAM + 2  # 0.6 and more


def is_long(draft: Draft) -> bool:
    """Of a copy: it follows on five tokens or more that are the same, or goes on behind an edit."""
    return draft.grade >= LONG_GRADE or draft.grade == EDITED_GRADE


def is_sure(draft: Draft) -> bool:
    """Of n-grams, which copy as well: from the session's own text, where that knows more."""
    return draft.grade >= SURE_SHARE or draft.grade < grades.NGRAM


class AutoDrafter:
    """Of one session; `ngrams` and `layer` where there are such. `name` is of who guessed last."""

    is_free = True

    def __init__(
        self,
        ngrams: Drafter | None,
        layer: Drafter | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = LookupDrafter.name
        self._lookup = LookupDrafter()
        self._ngrams = ngrams
        self._layer = layer
        self._clock = clock
        self._worth = LayerWorth(clock)
        known: list[Drafter | None] = [self._lookup, ngrams, layer]
        self._all = [drafter for drafter in known if drafter is not None]

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        self._worth.begin(token_ids)
        drafts = self._choose(token_ids, limit)
        self._worth.end(drafts)
        return drafts

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        for drafter in self._all:
            drafter.observe(boundary, tail_inputs)

    def cut_back(self, position: int) -> None:
        self._worth.cut_back(position)
        for drafter in self._all:
            drafter.cut_back(position)

    def _choose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        copied = self._ask(self._lookup, token_ids, limit)
        if copied and is_long(copied[0]):
            return copied
        free = self._ask(self._ngrams, token_ids, limit) or copied
        if self._layer is None or (len(free) == limit and all(map(is_sure, free))):
            return free
        if self._worth.wants_a_try:
            self._ask_layer(self._layer, token_ids, 1)
        count = self._worth.count_guesses(free, limit)
        estimated = self._ask_layer(self._layer, token_ids, count) if count else []
        if estimated:
            self.name = self._layer.name
        return estimated or free

    def _ask_layer(self, layer: Drafter, token_ids: Sequence[int], limit: int) -> list[Draft]:
        begun_at = self._clock()
        drafts = layer.propose(token_ids, limit)
        self._worth.on_guessed(self._clock() - begun_at, len(drafts))
        return drafts

    def _ask(self, drafter: Drafter | None, token_ids: Sequence[int], limit: int) -> list[Draft]:
        drafts = drafter.propose(token_ids, limit) if drafter is not None else []
        if drafter is not None and drafts:
            self.name = drafter.name
        return drafts
