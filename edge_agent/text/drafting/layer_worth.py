"""Whether guesses by the layer bring more tokens in a second than guesses that cost nothing.

A round trip of R seconds gives one token and the guesses that are right; the layer's take G seconds
each before it can begin. So n of them pay where tokens(layer, n) / (R + n G) is more than
tokens(free) / R. R and G are measured, and how often guesses of each grade are right is learned
from what the text became; it begins with what was measured on the demo model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from edge_agent.text.drafting import grades
from edge_agent.text.drafting.drafter import MAX_GRADE, Draft

# by grade: copies behind an edit, of 2, 3, 5, 10 tokens; n-grams by their share; the layer's
FIRST_SHARES = (0.4, 0.25, 0.5, 0.6, 0.9, 0.15, 0.45, 0.8, 0.95, 0.99, *(0.9,) * 6)
WEIGHT, LAYER_WEIGHT = 6.0, 1.0  # of these, in guesses
RECENT = 0.2  # of a time, beside those before it
LOOK_AGAIN = 64  # proposals after which the layer's time is measured once more


class LayerWorth:
    """One session's."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen = [WEIGHT if g < grades.MODEL else LAYER_WEIGHT for g in range(MAX_GRADE + 1)]
        self._right = [w * share for w, share in zip(self._seen, FIRST_SHARES, strict=True)]
        self._watched: list[Draft] = []  # what was proposed last, not yet compared
        self._length = 0  # tokens of the text up to which it has been
        self._ended_at: float | None = None
        self._step_s: float | None = None
        self._guess_s: float | None = None
        self._proposals = 0

    def begin(self, token_ids: Sequence[int]) -> None:
        """A proposal is wanted, after these tokens."""
        if self._ended_at is not None:
            self._step_s = _mix(self._step_s, self._clock() - self._ended_at)
        for token in token_ids[self._length :]:
            self._compare(token)
        self._length = len(token_ids)
        self._proposals += 1

    def end(self, drafts: Sequence[Draft]) -> None:
        """This is what was proposed."""
        self._watched = self._watched or list(drafts)
        self._ended_at = self._clock()

    def cut_back(self, position: int) -> None:
        """The text goes on otherwise from there."""
        if position < self._length:
            self._watched, self._length, self._ended_at = [], position, None

    def on_guessed(self, seconds: float, count: int) -> None:
        """The layer has made so many guesses."""
        if count:
            self._guess_s = _mix(self._guess_s, seconds / count)

    @property
    def wants_a_try(self) -> bool:
        """Whether a guess of the layer should be timed."""
        return self._guess_s is None or self._proposals % LOOK_AGAIN == 0

    def count_guesses(self, free: Sequence[Draft], limit: int) -> int:
        """How many guesses the layer should make; none where the free ones bring more."""
        if self._step_s is None or self._guess_s is None:
            return 0
        share = sum(self._right[grades.MODEL :]) / sum(self._seen[grades.MODEL :])
        tokens = list(itertools.accumulate(share**count for count in range(limit + 1)))
        rates = [t / (self._step_s + n * self._guess_s) for n, t in enumerate(tokens)]
        best = max(range(limit + 1), key=rates.__getitem__)
        return best if rates[best] > self._expect(free) / self._step_s else 0

    def _expect(self, drafts: Sequence[Draft]) -> float:
        """Tokens of a round trip with these guesses."""
        chances = (self._right[draft.grade] / self._seen[draft.grade] for draft in drafts)
        return 1 + sum(itertools.accumulate(chances, lambda a, b: a * b))

    def _compare(self, token: int) -> None:
        if not self._watched:
            return
        draft = self._watched.pop(0)
        self._seen[draft.grade] += 1
        self._right[draft.grade] += draft.token_id == token
        if draft.token_id != token:
            self._watched = []


def _mix(before: float | None, now: float) -> float:
    return now if before is None else before + RECENT * (min(now, 4 * before) - before)
