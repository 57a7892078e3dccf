"""Keeps floods out of logs: what peers can cause at will is written so often and no more."""

from __future__ import annotations

import logging
import time

PER_SECOND = 5


class LogLimit:
    """Writes warnings, a few in any second; says how many were left out."""

    def __init__(self, log: logging.Logger, per_second: int = PER_SECOND) -> None:
        self._log = log
        self._per_second = per_second
        self._second = 0
        self._written = 0
        self._left_out = 0

    def warning(self, text: str, *values: object) -> None:
        """As Logger.warning, unless there were too many in this second."""
        second = int(time.monotonic())
        if second != self._second:
            if self._left_out:
                self._log.warning("%d more warnings like these were left out", self._left_out)
            self._second, self._written, self._left_out = second, 0, 0
        if self._written >= self._per_second:
            self._left_out += 1
            return
        self._written += 1
        self._log.warning(text, *values)
