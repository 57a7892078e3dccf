"""How many workers a service could use: the one signal by which pools grow and shrink.

`midspan autoscale` and `midspan up --workers A..B` read it in the broker's status, KEDA reads it as
a metric. It is in workers, not in a share of those that are here, so it can be added up over
services and over brokers, and it makes sense when nobody is here.

Two things are watched: how many workers have something to do, and how long steps wait, in the
broker and at a worker, until they are computed. Waiting for the end of the batch before is
usual and no sign of want, so the time that a step is computed for is let pass. Never are more
workers wanted than there are steps at once: one session, whose tokens come one after another, is
no faster with two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_S = 5.0  # after which what was seen counts for a third
MOST_PRESSURE = 2.0  # waiting doubles what is wanted, at most: then it is looked at again
NOTHING = 0.05  # workers; below that nobody is wanted any more


@dataclass(frozen=True, slots=True)
class Goals:
    """What a pool should feel like."""

    occupancy: float = 0.7  # part of the time in which a worker has something to do
    wait_s: float = 0.1  # of a step, beyond the time for which it is computed


DEFAULT_GOALS = Goals()


@dataclass(frozen=True, slots=True)
class Sample:
    """A service as it is at one moment."""

    busy_workers: int
    steps: int  # that wait or are in flight
    queued_s: list[float]  # how long those that no worker has have been waiting
    has_workers: bool


class Demand:
    """Of one service. `now` is in monotonic seconds."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._seen_at: float | None = None
        self._busy = 0.0  # workers, a mean over the window
        self._steps = 0.0  # at once, a mean over the window
        self._wait_s = 0.0  # of a step, a mean over the window
        self._compute_s = 0.0  # of a step, lately
        self._answered: list[float] = []  # how long steps answered since the last sample waited
        self._is_stranded = False

    def observe(self, wait_s: float, compute_s: float) -> None:
        """A step was answered."""
        self._answered.append(wait_s)
        self._compute_s += (compute_s - self._compute_s) / 8

    def sample(self, seen: Sample, now: float) -> None:
        """Called several times a second."""
        weight = 1.0
        if self._seen_at is not None:
            weight = 1 - math.exp(-(now - self._seen_at) / WINDOW_S)
        self._seen_at = now
        waits = self._answered + seen.queued_s
        wait_s = sum(waits) / len(waits) if waits else 0.0
        self._busy += (seen.busy_workers - self._busy) * weight
        self._steps += (seen.steps - self._steps) * weight
        self._wait_s += (wait_s - self._wait_s) * weight
        self._answered = []
        self._is_stranded = bool(seen.queued_s) and not seen.has_workers

    @property
    def busy_workers(self) -> float:
        return self._busy

    @property
    def wait_s(self) -> float:
        return self._wait_s

    @property
    def wanted_workers(self) -> float:
        """Not rounded; one at least when steps wait and nobody is here."""
        usual_s = self._goals.wait_s + self._compute_s
        pressure = min(MOST_PRESSURE, max(1.0, self._wait_s / usual_s))
        wanted = min(self._busy / self._goals.occupancy * pressure, self._steps)
        if self._is_stranded:
            return max(1.0, wanted)
        return wanted if wanted >= NOTHING else 0.0
