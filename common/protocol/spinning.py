"""Wait for messages awake at first, and asleep if none has come by then.

Who sleeps is woken by the system: that takes tens of microseconds at each process on a token's way,
and what it needs may have left the core's caches. A loop that looks again and again takes a message
at once, and a core for as long.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import zmq


class SpinningPoller(zmq.Poller):
    """A poller that looks for `spin_s` seconds before it sleeps, when told that something may come.

    What comes by itself, such as signs of life, is slept for, so a process that has no steps takes
    no core. Between two looks whoever else is ready may have the core.
    """

    def __init__(self, spin_s: float) -> None:
        super().__init__()
        self._spin_s = spin_s
        self._is_expecting = False
        self._awake_until = 0.0

    def expect(self) -> None:
        """A step or an answer has passed: from the next wait on another one may come soon."""
        self._is_expecting = True

    def poll(self, timeout: int | None = None) -> list[tuple[Any, int]]:
        """As zmq.Poller does: what is ready within `timeout` milliseconds, None for ever."""
        if not self._spin_s or timeout == 0:
            return super().poll(timeout)
        now = time.monotonic()
        if self._is_expecting:
            self._is_expecting = False
            self._awake_until = now + self._spin_s
        if now >= self._awake_until:
            return super().poll(timeout)
        end_at = float("inf") if timeout is None else now + timeout / 1000
        while not (ready := super().poll(0)) and now < min(self._awake_until, end_at):
            os.sched_yield()
            now = time.monotonic()
        if ready or now >= end_at:
            return ready
        return super().poll(None if timeout is None else math.ceil(1000 * (end_at - now)))
