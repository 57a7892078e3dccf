"""Who computes next, by the time that steps take: text and images have equal shares of a worker.

A worker's batches run one after another, an image's may take twenty times as long as text's. So
not batches are counted but seconds, and whoever is behind is next. A text session needs a moment
between two of its steps, for its tail, sampler and head, and a worker that filled every such
moment with an image's step would leave text with almost nothing: whoever has just been served and
is owed time is waited for, `RETURN_S` at most, and the waiting counts as its own time. Who comes
back after a while begins level with the others: idle time is no credit. Pure: the clock is an
argument.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

RETURN_S = 0.05


class TimeShares:
    """Seconds used by each kind of work, in a worker that has several."""

    def __init__(self, kinds: Iterable[str]) -> None:
        self._used_s = dict.fromkeys(kinds, 0.0)
        self._last_s = dict.fromkeys(self._used_s, 0.0)  # of the last batch
        self._here_until = dict.fromkeys(self._used_s, float("-inf"))
        self._waiting: tuple[str, float] | None = None  # for whom, since when

    def pick(self, ready: Collection[str], now: float) -> str | None:
        """The kind whose batch is next; None if nothing is ready or somebody is waited for."""
        if self._waiting is not None:
            kind, since = self._waiting
            self._used_s[kind] += now - since
            self._waiting = None
        if not ready:
            return None
        here = [kind for kind, until in self._here_until.items() if now < until]
        for kind in ready:
            if kind not in here:
                self._begin_level(kind, here)
        first = min(
            {*here, *ready},
            key=lambda kind: (self._used_s[kind], kind not in ready, self._last_s[kind]),
        )
        if first in ready:
            self._here_until[first] = float("inf")  # while it computes
            return first
        self._waiting = (first, now)
        return None

    def charge(self, kind: str, seconds: float, now: float) -> None:
        """A batch of that kind took so long, and ended now."""
        self._used_s[kind] += seconds
        self._last_s[kind] = seconds
        self._here_until[kind] = now + RETURN_S
        for other, until in self._here_until.items():
            if until > now - seconds:  # it could not be served meanwhile, and has not left
                self._here_until[other] = now + RETURN_S

    def _begin_level(self, kind: str, here: list[str]) -> None:
        if here:
            self._used_s[kind] = max(self._used_s[kind], min(self._used_s[k] for k in here))
