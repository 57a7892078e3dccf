"""How far and how thin the link to a broker is, as the messages on it show.

Times are in seconds. The least that small messages take is the round trip, for whatever else there
was to wait for only adds to it; what larger ones take beyond it is the time of their bytes. A TCP
connection that is still widening its window counts as the thin link that it is until then.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from common.link import Link

SLOWEST_LINK = 4000.0  # bytes per second that a link must carry
LARGE_BYTES = 4096  # smaller messages say nothing about the rate
KEPT = 16  # messages of either size
LEAST_TRAVEL_S = 1e-5  # of a large message's bytes: what clocks and wake-ups leave to be known


class LinkMeter:
    """Learns from every answer. Not thread-safe, but for `link`."""

    def __init__(self) -> None:
        self._bytes_per_s: float | None = None  # at least, whatever the pool took for a step
        self._round_trips: deque[float] = deque(maxlen=KEPT)
        self._rates: deque[float] = deque(maxlen=KEPT)

    def travel_s(self, message_bytes: int) -> float:
        """How long a message may be on its way; a fourth of the rate that was seen is allowed."""
        return message_bytes / max(SLOWEST_LINK, (self._bytes_per_s or 0.0) / 4)

    def learn(self, both_ways_bytes: int, seconds: float) -> None:
        """So much went through, up and down, whatever else it waited for in this time."""
        if both_ways_bytes < LARGE_BYTES:
            return
        rate, before = both_ways_bytes / max(1e-6, seconds), self._bytes_per_s
        self._bytes_per_s = rate if before is None else (before + rate) / 2

    def note(self, both_ways_bytes: int, travel_s: float) -> None:
        """The same, in the time that it spent on the way and nowhere else."""
        if both_ways_bytes < LARGE_BYTES:
            self._round_trips.append(max(0.0, travel_s))
        elif self._round_trips:
            of_bytes_s = max(LEAST_TRAVEL_S, travel_s - min(self._round_trips))
            self._rates.append(both_ways_bytes / of_bytes_s)

    def note_stall(self, both_ways_bytes: int, travel_s: float) -> None:
        """They did not come in this time: as thin it is, whatever went through before."""
        self._rates.clear()
        self.note(both_ways_bytes, travel_s)

    @property
    def link(self) -> Link | None:
        """What is known of it, if messages of both sizes have come and gone."""
        round_trips, rates = list(self._round_trips), list(self._rates)
        if not round_trips or not rates:
            return None
        return Link(median(rates) * 8 / 1e6, min(round_trips) * 1e3)
