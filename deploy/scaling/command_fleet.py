"""Workers that are started by a command of the user's, each a process of its own."""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common.errors import ProcessFailed
from deploy.child import Child, ChildGroup, stop_all
from deploy.departures import Departures
from deploy.endings import Endings

PLACE = "{id}"  # in the command, for the worker's name
ID = "MIDSPAN_WORKER_ID"  # the same for `midspan worker`, which reads it
LEAVE_LIMIT_S = 600.0
TOO_MANY_ENDINGS = 5


class CommandFleet:
    """A worker is a run of `command`; SIGTERM, which all get that it starts, must have it drain.

    Use as a context manager: what it has started is drained on exit.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._logs = tempfile.TemporaryDirectory(prefix="midspan-workers-")
        self._prefix = f"auto-{secrets.token_hex(2)}"
        self._started = 0
        self._workers: dict[str, Child] = {}
        self._departures = Departures(LEAVE_LIMIT_S)
        self._endings = Endings(TOO_MANY_ENDINGS)

    def names(self) -> list[str]:
        return list(self._workers)

    def start_worker(self) -> str:
        """Raises ProcessFailed if there is no such command."""
        self._started += 1
        name = f"{self._prefix}-{self._started}"
        command = [word.replace(PLACE, name) for word in self._command]
        try:
            child = ChildGroup(name, command, Path(self._logs.name), {ID: name})
        except OSError as error:
            raise ProcessFailed(f"{command[0]!r} cannot be run: {error.strerror}") from error
        self._workers[name] = child
        return name

    def begin_drain(self, name: str) -> None:
        self._departures.begin(self._workers.pop(name), time.monotonic())

    def look_after(self, now: float) -> list[str]:
        """What has ended, a line each. Raises ProcessFailed when workers end one after another."""
        lines = self._departures.see_off(now)
        for name in [name for name, child in self._workers.items() if not child.is_running()]:
            child = self._workers.pop(name)
            self._departures.begin(child, now)  # of those that it may have left behind
            words = child.last_words()
            lines.append(words)
            if self._endings.count(now):
                raise ProcessFailed(f"{words}; {TOO_MANY_ENDINGS} ended in a minute, giving up")
        return lines

    def __enter__(self) -> CommandFleet:
        return self

    def __exit__(self, *_: object) -> None:
        children = [*self._workers.values(), *self._departures.take_all()]
        stop_all(children)
        self._logs.cleanup()
