"""What a step takes by the rows that all exact sessions of one engine have in the pool with it.

Workers, head and tail compute the rows of several sessions together, so a row of one is waited for
by all of them. Who counts its own rows only, and its own tokens, sends guesses that cost the others
more than they bring: eight sessions that are exact share a pass with a row each, and with a guess
each they need two.
"""

from __future__ import annotations

from dataclasses import dataclass

DECAY = 0.94  # of what was measured, with each round of steps
FIRST_ROW_SHARE = 0.05  # of a step's time, until a row's was measured
FIRST_WEIGHT = 2.0  # of these guesses, in measurements
LEAST_GAIN = 1.15  # of drafts: what brings less costs as much, where times are not alike
OUTLIER = 1.6  # times what was expected; more is somebody else's


class StepCost:
    """Seconds of a step by its rows: a line through what was measured, newer steps first."""

    def __init__(self, first_share: float = FIRST_ROW_SHARE) -> None:
        """A row takes `first_share` of a step, until it was measured."""
        self._first_share = first_share
        self._weight = self._rows = self._seconds = self._squares = self._products = 0.0

    def add(self, rows: float, seconds: float, decay: float = DECAY) -> None:
        """A step of `rows` rows took `seconds`."""
        seconds = max(seconds, 1e-6)  # a clock may be coarse
        if self._weight >= 1:
            seconds = min(seconds, OUTLIER * self.of(rows))
        for name, value in (
            ("_weight", 1.0), ("_rows", rows), ("_seconds", seconds),
            ("_squares", rows * rows), ("_products", rows * seconds),
        ):  # fmt: skip
            setattr(self, name, getattr(self, name) * decay + value)

    def of(self, rows: float) -> float:
        """Expected of a step of `rows` rows; in no unit as long as nothing was measured."""
        if not self._weight:
            return 1.0 + self._first_share * rows
        mean_rows, mean_s = self._rows / self._weight, self._seconds / self._weight
        spread = max(0.0, self._squares - self._weight * mean_rows**2)
        together = self._products - self._weight * mean_rows * mean_s
        first = self._first_share * mean_s
        per_row = max(0.0, (together + first * FIRST_WEIGHT) / (spread + FIRST_WEIGHT))
        per_row = min(per_row, mean_s / max(1.0, mean_rows))  # a step without rows takes no less
        return mean_s + per_row * (rows - mean_rows)


@dataclass(slots=True)
class UnderWay:
    """A session's last step, which counts until its next one begins."""

    rows: int = 0
    tokens: float = 0.0  # that are expected of it
    all_rows: int = 0  # of all sessions, when it began


class Company:
    """The sessions of one engine, while they write. Not thread-safe."""

    def __init__(self, rows_per_pass: int = 1) -> None:
        """So many rows take as long as one: those of exact sessions go in groups."""
        self._rows_per_pass = rows_per_pass
        self._cost = StepCost(FIRST_ROW_SHARE * rows_per_pass)  # by passes
        self.rounds = 0.0  # of steps: one for each session that writes
        self.drafted_at = 0.0  # the last round with drafts
        self._sessions = 0
        self._rows = 0
        self._tokens = 0.0

    def begin(self, step: UnderWay, rows: int, tokens: float) -> None:
        """A session has its next step computed, of which `tokens` are expected."""
        if not step.rows:
            self._sessions += 1
        self._rows += rows - step.rows
        self._tokens += tokens - step.tokens
        step.rows, step.tokens, step.all_rows = rows, tokens, self._rows
        self.rounds += 1 / self._sessions
        if rows > 1:
            self.drafted_at = self.rounds

    def end(self, step: UnderWay, seconds: float) -> None:
        """A step took so long."""
        if step.rows:  # others may have begun their next ones by then, or not yet when it began
            passes = (self._passes(step.all_rows) + self._passes(self._rows)) / 2
            self._cost.add(passes, seconds, DECAY ** (1 / self._sessions))

    def leave(self, step: UnderWay) -> None:
        """A session writes no more."""
        if step.rows:
            self._sessions -= 1
            self._rows -= step.rows
            self._tokens = self._tokens - step.tokens if self._sessions else 0.0
            step.rows, step.tokens = 0, 0.0

    def rate(self, step: UnderWay, rows: int, tokens: float, guess_s: float = 0.0) -> float:
        """Tokens of all sessions in a second if this one had such a step, guessed in `guess_s`."""
        others_rows, others_tokens = self._rows - step.rows, self._tokens - step.tokens
        seconds = self._cost.of(self._passes(others_rows + rows)) + guess_s
        return (others_tokens + tokens) / seconds

    def rate_of_none(self, step: UnderWay) -> float:
        """The same if no session had drafts, and what they must bring to be worth their noise."""
        sessions = self._sessions + (not step.rows)
        gain = LEAST_GAIN if sessions > 1 else 1.0
        return gain * sessions / self._cost.of(self._passes(sessions))

    def _passes(self, rows: int) -> int:
        return -(-rows // self._rows_per_pass)
