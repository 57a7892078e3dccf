"""How many workers a service could use: the one signal by which pools grow and shrink.

`midspan autoscale` and `midspan up --workers A..B` read it in the broker's status, KEDA reads it as
a metric. It is in workers, not in a share of those that are here, so it can be added up over
services and over brokers, and it makes sense when nobody is here.

Three things are watched: how many workers have something to do, how many steps there are at once,
and how long they wait, in the broker and at a worker, until they are computed. A worker computes
many steps in a batch in little more time than one, so some that are all busy with few steps each
are too many: what is wanted is the lesser of what keeps workers busy and what fills their batches.
Where all that are here are busy all the time, only the latter says how many more there should be.
Waiting for the end of the batch before is usual and no sign of want, so the time that a step is
computed for is let pass. Never are more workers wanted than there are steps at once: one session,
whose tokens come one after another, is no faster with two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

WINDOW_S = 5.0  # after which what was seen counts for a third
MOST_PRESSURE = 2.0  # waiting doubles what is wanted, at most: then it is looked at again
LINGER_S = 5.0  # for which a worker is wanted after the last step
SATURATED = 0.9  # part of the time for which all workers have something to do
LITTLE = 0.01  # workers, that are wanted at least while there is anything


@dataclass(frozen=True, slots=True)
class Goals:
    """What a pool should feel like."""

    occupancy: float = 0.7  # part of the time in which a worker has something to do
    wait_s: float = 0.1  # of a step, beyond the time for which it is computed
    steps: int = 16  # at once, for which one worker is enough


DEFAULT_GOALS = Goals()


@dataclass(frozen=True, slots=True)
class Sample:
    """A service as it is at one moment."""

    busy_workers: int
    steps: int  # that wait or are in flight
    queued_s: list[float]  # how long those that no worker has have been waiting
    workers: int  # that are here


class Demand:
    """Of one service. `now` is in monotonic seconds."""

    def __init__(self, goals: Goals) -> None:
        self._goals = goals
        self._seen_at: float | None = None
        self._busy = 0.0  # workers, a mean over the window
        self._steps = 0.0  # at once, a mean over the window
        self._share = 0.0  # of the workers that are busy, a mean over the window
        self._active_at: float | None = None  # when there was last anything to do
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
        if seen.steps or self._answered:
            self._active_at = now
        waits = self._answered + seen.queued_s
        wait_s = sum(waits) / len(waits) if waits else 0.0
        self._busy += (seen.busy_workers - self._busy) * weight
        share = min(1.0, seen.busy_workers / seen.workers) if seen.workers else bool(seen.steps)
        self._share += (share - self._share) * weight
        self._steps += (seen.steps - self._steps) * weight
        self._wait_s += (wait_s - self._wait_s) * weight
        self._answered = []
        self._is_stranded = bool(seen.queued_s) and not seen.workers

    @property
    def busy_workers(self) -> float:
        return self._busy

    @property
    def wait_s(self) -> float:
        return self._wait_s

    @property
    def wanted_workers(self) -> float:
        """Not rounded; one at least when steps wait and nobody is here."""
        goals = self._goals
        pressure = min(MOST_PRESSURE, max(1.0, self._wait_s / (goals.wait_s + self._compute_s)))
        enough = self._steps / goals.steps
        if self._share < SATURATED:
            enough = min(enough, self._busy / goals.occupancy)
        wanted = min(enough * pressure, self._steps)
        if self._is_stranded:
            return max(1.0, wanted)
        return max(LITTLE, wanted) if self._is_active else 0.0

    @property
    def _is_active(self) -> bool:
        if self._active_at is None or self._seen_at is None:
            return False
        return self._seen_at - self._active_at <= LINGER_S
