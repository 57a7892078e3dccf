"""N-grams: what mostly follows on the last few tokens, by tables and by the session's own text.

The longest context that anyone knows speaks: the model's own outputs kept on the device before the
table that lies with the model, and the session's own text where its match is longer than both.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from edge_agent.text.drafting import grades
from edge_agent.text.drafting.drafter import Draft
from edge_agent.text.drafting.lookup import grade_of
from edge_agent.text.drafting.ngram_table import ORDER, Guess, NgramTable
from edge_agent.text.drafting.text_index import TextIndex

SHARES = (0.3, 0.6, 0.85, 0.95)  # smoothed ones, from which on guesses are of the next grade


class NgramDrafter:
    """Guesses by tables, of which the first speaks where contexts are as long."""

    name = "ngram"
    is_free = True

    def __init__(self, tables: Sequence[NgramTable]) -> None:
        self._tables = tables
        self._text = TextIndex()

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        self._text.extend(token_ids)
        ending, drafts = list(token_ids[-ORDER:]), list[Draft]()
        for _ in range(limit):
            draft = self._guess(ending[-ORDER:], ending[len(ending) - len(drafts) :])
            if draft is None:
                break
            drafts.append(draft)
            ending.append(draft.token_id)
        return drafts

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        """Rows say nothing about words."""

    def cut_back(self, position: int) -> None:
        self._text.cut_back(position)

    def _guess(self, ending: Sequence[int], guessed: Sequence[int]) -> Draft | None:
        best = self._ask_tables(ending)
        place, length = self._text.find(guessed)
        if length > (best.length if best else 0):
            return Draft(self._text.ids[place], grade_of(length))
        return Draft(best.token_id, share_grade(best.share)) if best else None

    def _ask_tables(self, ending: Sequence[int]) -> Guess | None:
        best: Guess | None = None
        for table in self._tables:
            guess = table.guess(ending)
            if guess is not None and (best is None or guess.length > best.length):
                best = guess
        return best


def share_grade(share: float) -> int:
    """Of a guess that followed in such a share of the cases."""
    return grades.NGRAM + sum(share >= bound for bound in SHARES)
