"""Where the time goes between the start of a worker's process and its first announcement."""

from __future__ import annotations

import os
import time
from pathlib import Path

CLOCK_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class StartTimes:
    """Stages in a row, each from the end of the one before; the first from the process's start."""

    def __init__(self) -> None:
        self._marked_at = self._began_at = read_process_start()
        self._stages: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        """A stage is over."""
        now = time.monotonic()
        self._stages[stage] = now - self._marked_at
        self._marked_at = now

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self._stages.items())
        return f"{self._marked_at - self._began_at:.2f} s ({stages})"


def read_process_start() -> float:
    """When this process was started, in monotonic seconds; now, where the system does not say."""
    now = time.monotonic()
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, uptime_s - int(fields[19]) / CLOCK_TICKS)
