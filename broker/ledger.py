"""What each edge holds in the broker: sessions, steps and bytes of bodies, against its limits."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from common.settings import (
    MAX_BYTES_PER_EDGE,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
    MAX_STEPS_PER_EDGE,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker takes in all, and from one edge."""

    steps: int = MAX_QUEUED_STEPS
    body_bytes: int = MAX_QUEUED_BYTES
    sessions_per_edge: int = MAX_SESSIONS_PER_EDGE
    steps_per_edge: int = MAX_STEPS_PER_EDGE
    bytes_per_edge: int = MAX_BYTES_PER_EDGE


class Ledger:
    """Counts by account: the edge's key, or its connection where keys are not used."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._sessions: Counter[bytes] = Counter()
        self._steps: Counter[bytes] = Counter()
        self._bytes: Counter[bytes] = Counter()
        self._steps_in_all = self._bytes_in_all = 0

    def add_session(self, account: bytes) -> None:
        self._sessions[account] += 1

    def drop_session(self, account: bytes) -> None:
        _subtract(self._sessions, account, 1)

    def has_all_sessions(self, account: bytes) -> bool:
        """Whether an edge may open no more."""
        return self._sessions[account] >= self.limits.sessions_per_edge

    def is_alone(self, account: bytes) -> bool:
        """Whether nobody else has a session here."""
        return len(self._sessions) <= (account in self._sessions)

    def add_step(self, account: bytes, body_bytes: int) -> None:
        self._steps[account] += 1
        self._bytes[account] += body_bytes
        self._steps_in_all += 1
        self._bytes_in_all += body_bytes

    def drop_step(self, account: bytes, body_bytes: int) -> None:
        _subtract(self._steps, account, 1)
        _subtract(self._bytes, account, body_bytes)
        self._steps_in_all -= 1
        self._bytes_in_all -= body_bytes

    def has_room(self, account: bytes, body_bytes: int) -> bool:
        """Whether one more step of an edge is taken. The first always is, however large."""
        limits = self.limits
        if self._steps_in_all >= limits.steps or self._steps[account] >= limits.steps_per_edge:
            return False
        fits = self._bytes_in_all + body_bytes <= limits.body_bytes or not self._steps_in_all
        own_fits = self._bytes[account] + body_bytes <= limits.bytes_per_edge
        return fits and (own_fits or not self._steps[account])


def _subtract(counter: Counter[bytes], account: bytes, amount: int) -> None:
    counter[account] -= amount
    if counter[account] <= 0:
        del counter[account]
