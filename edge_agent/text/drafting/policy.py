"""How many drafts a step takes along: as many as bring more than they cost, as measured.

Guesses are watched whether they were sent or not, so a session knows how often they are right
before it pays for any. What a row costs, on the link and in the layers, is told by the times of
steps with few and with many rows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from edge_agent.text.drafting.drafter import Draft, Drafter

DECAY = 0.94  # of what was measured, with each step
FIRST_ROW_SHARE = 0.05  # of a step's time, until a row's was measured
FIRST_WEIGHT = 2.0  # of these guesses, in measurements
MOST_TRIALS = 64.0  # per grade: older ones count less
VARY_EVERY = 16  # steps; otherwise a session that always sends as many learns nothing of a row
OUTLIER = 1.6  # times what was expected; more is somebody else's
PROBE_EVERY = 24  # steps without drafts, after which it is looked at again what they cost
WORTH_PROBING = 0.5  # of such guesses are right
PROBED = 2  # dear guesses, then


class DraftPolicy:
    """One session's. Times are in seconds."""

    def __init__(self, most: int) -> None:
        """At most so many drafts in a step."""
        self._most = most
        self._cost = StepCost()
        self._grades: dict[tuple[str, int], _Share] = {}
        self._watched: list[tuple[_Share, int]] = []  # guesses that tokens have not reached yet
        self._all = _Share()  # of guesses of any grade
        self._guess_s = 0.0
        self._steps = 0
        self._sent_at = 0  # the last step with drafts

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
        if guesses and not count and self._steps - self._sent_at >= PROBE_EVERY:
            count = int(shares[0].value >= WORTH_PROBING)
        if count:
            self._sent_at = self._steps
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

    def on_step(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long, after its guesses."""
        self._cost.add(rows, seconds)

    def _limit(self) -> int:
        """How many guesses to ask for, where they cost time: those that may pay."""
        limit = self._count_worth([self._all.value] * self._most, self._guess_s)
        return limit or PROBED * (self._steps % PROBE_EVERY == 0)

    def _count_worth(self, shares: Sequence[float], guess_s: float = 0.0) -> int:
        """After how many guesses a step brings the most tokens in its time, and `guess_s` each."""
        best, best_rate = 0, 1.0 / self._cost.of(1)
        tokens, reached = 1.0, 1.0
        for count, share in enumerate(shares, start=1):
            reached *= share
            tokens += reached
            rate = tokens / (self._cost.of(1 + count) + guess_s * count)
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


class StepCost:
    """Seconds of a step by its rows: a line through what was measured, newer steps first."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def add(self, rows: int, seconds: float) -> None:
        """A step of `rows` rows took `seconds`."""
        if self._weight >= 1:
            seconds = min(seconds, OUTLIER * self.of(rows))
        for name, value in (
            ("_weight", 1.0), ("_rows", rows), ("_seconds", seconds),
            ("_squares", rows * rows), ("_products", rows * seconds),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * DECAY + value)

    def of(self, rows: int) -> float:
        """Expected of a step of `rows` rows; in no unit as long as nothing was measured."""
        if not self._weight:
            return 1.0 + FIRST_ROW_SHARE * rows
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        spread = max(0.0, self._squares - self._weight * mean_rows**2)
        together = self._products - self._weight * mean_rows * mean_s
        first = FIRST_ROW_SHARE * mean_s
        per_row = max(0.0, (together + first * FIRST_WEIGHT) / (spread + FIRST_WEIGHT))
        per_row = min(per_row, mean_s / max(1.0, mean_rows))  # a step without rows takes no less
        return mean_s + per_row * (rows - mean_rows)
