"""Processes that end by themselves, counted, so that nobody starts them again for ever."""

from __future__ import annotations

MEMORY_S = 60.0


class Endings:
    """Those of the last minute. `now` is in monotonic seconds."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._at: list[float] = []

    def count(self, now: float) -> bool:
        """One more; whether there are now so many that starting again does not help."""
        self._at = [at for at in self._at if now - at < MEMORY_S] + [now]
        return len(self._at) >= self._limit
