"""When a pool grows and when it shrinks: figures and times in, a number of workers out.

What is wanted is the broker's word (`broker/demand.py`), the same that KEDA reads. Here it is made
steady: a pool grows at once, and shrinks only to the most that was wanted in all of the last
`cool_down_s`, as an HPA does in its stabilization window. The last worker stays for `idle_s` more,
for a new one takes seconds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from common.errors import SettingsError

SLACK = 0.1  # of a worker, for which none is started


@dataclass(frozen=True, slots=True)
class ScalingSettings:
    """Bounds of a pool, both included, and its patience. Raises SettingsError."""

    least: int = 1
    most: int = 8
    cool_down_s: float = 30.0
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most or self.most == 0:
            raise SettingsError(f"{self.least}..{self.most} workers: expected A..B, 0 <= A <= B")


class ScalingPolicy:
    """`now` is in monotonic seconds and never goes back."""

    def __init__(self, settings: ScalingSettings) -> None:
        self.settings = settings
        self._needs: deque[tuple[float, int]] = deque()  # when one was last needed; falling
        self._watched_since: float | None = None

    def decide(self, present: int, wanted: float, now: float) -> int:
        """How many workers there should be, where `present` are, those that start included."""
        settings = self.settings
        if self._watched_since is None:
            self._watched_since = now
        need = min(settings.most, max(settings.least, math.ceil(wanted - SLACK)))
        if wanted > 0:
            need = max(1, need)
        self._remember(need, now)
        if need >= present:
            return need
        highest = self._most_since(now - settings.cool_down_s)
        if highest == 0 and self._most_since(now - settings.idle_s) > 0:
            highest = 1
        return min(present, highest)

    def _remember(self, need: int, now: float) -> None:
        while self._needs and self._needs[-1][1] <= need:
            self._needs.pop()
        self._needs.append((now, need))
        oldest = now - max(self.settings.cool_down_s, self.settings.idle_s)
        while self._needs[0][0] < oldest:
            self._needs.popleft()

    def _most_since(self, since: float) -> int:
        """The most that was needed at any time since; all there may be if we were not there yet."""
        assert self._watched_since is not None
        if since < self._watched_since:
            return self.settings.most
        return next(need for at, need in self._needs if at >= since)
