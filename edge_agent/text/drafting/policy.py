"""How many drafts a step takes along: as many as bring more than they cost, as measured.

Guesses are watched whether they were sent or not, so a session knows how often they are right
before it pays for any. What a row costs, on the link and in the layers, is told by the times of
steps with few and with many rows.
"""

from __future__ import annotations

import functools
import itertools
import operator
import time
from collections.abc import Sequence

from edge_agent.text.drafting.company import Company, UnderWay
from edge_agent.text.drafting.drafter import Draft, Drafter

MOST_TRIALS = 64.0  # per grade: older ones count less
VARY_EVERY = 16  # steps; otherwise a session that always sends as many learns nothing of a row
PROBE_EVERY = 24  # rounds without drafts, after which it is looked at again what they cost
WORTH_PROBING = 0.5  # of such guesses are right
PROBED = 2  # dear guesses, then


class DraftPolicy:
    """One session's. Times are in seconds."""

    def __init__(self, most: int, company: Company | None = None) -> None:
        """At most so many drafts in a step; `company` are the sessions that it shares a pool with.

        Without it the session is alone.
        """
        self._most = most
        self._company = company or Company()
        self._step = UnderWay()
        self._grades: dict[tuple[str, int], _Share] = {}
        self._watched: list[tuple[_Share, int]] = []  # guesses that tokens have not reached yet
        self._all = _Share()  # of guesses of any grade
        self._guess_s = 0.0
        self._steps = 0

    def propose(self, drafter: Drafter, token_ids: Sequence[int], room: int) -> list[Draft]:
        """Guesses for the next step, `room` at most; those that pay."""
        self._steps += 1
        limit = min(self._most if drafter.is_free else self._limit(), room)
        begun_at = time.monotonic()
        guesses = drafter.propose(token_ids, limit)[:limit] if limit > 0 else []
        if guesses:
            self._guess_s += ((time.monotonic() - begun_at) / len(guesses) - self._guess_s) / 8
        shares = [self._share(drafter.name, guess.grade) for guess in guesses]
        if not self._watched:
            self._watched = [
                (share, guess.token_id) for share, guess in zip(shares, guesses, strict=True)
            ]
        count = self._count_worth([share.value for share in shares])
        if count and self._steps % VARY_EVERY == 0:
            count //= 2
        company = self._company
        if guesses and not count and company.rounds - company.drafted_at >= PROBE_EVERY:
            count = int(shares[0].value >= WORTH_PROBING)
        tokens = sum(itertools.accumulate((s.value for s in shares[:count]), operator.mul))
        company.begin(self._step, 1 + count, 1 + tokens)
        return guesses[:count]

    def on_token(self, token_id: int) -> None:
        """What the next token really was."""
        if not self._watched:
            return
        share, guess = self._watched.pop(0)
        share.add(guess == token_id)
        self._all.add(guess == token_id)
        if guess != token_id:
            self._watched.clear()

    def on_step(self, seconds: float) -> None:
        """The step took so long, after its guesses."""
        self._company.end(self._step, seconds)

    def rest(self) -> None:
        """The session writes no more for now."""
        self._company.leave(self._step)

    def _limit(self) -> int:
        """How many guesses to ask for, where they cost time: those that may pay."""
        limit = self._count_worth([self._all.value] * self._most, self._guess_s)
        return limit or PROBED * (self._steps % PROBE_EVERY == 0)

    def _count_worth(self, shares: Sequence[float], guess_s: float = 0.0) -> int:
        """After how many guesses a step brings the most tokens in its time, and `guess_s` each."""
        rate_of = functools.partial(self._company.rate, self._step)
        best, best_rate = 0, max(rate_of(1, 1.0), self._company.rate_of_none(self._step))
        tokens, reached = 1.0, 1.0
        for count, share in enumerate(shares, start=1):
            reached *= share
            tokens += reached
            rate = rate_of(1 + count, tokens, guess_s * count)
            if rate > best_rate:
                best, best_rate = count, rate
        return best

    def _share(self, name: str, grade: int) -> _Share:
        return self._grades.setdefault((name, grade), _Share())


class _Share:
    """How often guesses of one grade were right, once they were reached; lately."""

    def __init__(self) -> None:
        self._right, self._trials = 0.5, 1.0

    @property
    def value(self) -> float:
        return self._right / self._trials

    def add(self, was_right: bool) -> None:
        if self._trials >= MOST_TRIALS:
            self._right, self._trials = self._right / 2, self._trials / 2
        self._right += was_right
        self._trials += 1
