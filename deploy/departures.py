"""Workers that were told to leave, and are seen off without anybody waiting for them."""

from __future__ import annotations

import signal

from deploy.child import Child


class Departures:
    """`now` is in monotonic seconds. A worker that drains for longer than `limit_s` is killed."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._leaving: list[tuple[Child, float]] = []

    def begin(self, child: Child, now: float) -> None:
        """Tell one to finish what it has and leave."""
        child.signal(signal.SIGTERM)
        self._leaving.append((child, now + self._limit_s))

    def see_off(self, now: float) -> list[str]:
        """Forget those that have left; returns what was wrong with some, a line each."""
        lines = []
        for child, until in self._leaving:
            if now >= until and child.is_running():
                child.kill()
                lines.append(f"{child.name} did not leave within {self._limit_s:g} s; killed it")
        self._leaving = [one for one in self._leaving if one[0].is_running()]
        return lines

    def take_all(self) -> list[Child]:
        """Those that have not left yet, to be waited for elsewhere."""
        children = [child for child, _ in self._leaving]
        self._leaving = []
        return children
