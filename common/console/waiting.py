"""What moves on stderr while a command works and has nothing to print yet.

Only on a terminal that can wipe out a line. A bar is for work whose parts are counted; a spinner,
for work that is not, comes after two seconds, and its line is wiped out before anything else is
written. It is never longer than the terminal is wide, or what is wiped out would be its end only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import click

PATIENCE_S = 2.0
FRAME_S = 0.1
FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
PLAIN_FRAMES = "|/-\\"  # for terminals without those characters
WIPE = "\r\033[K"
USUAL_WIDTH = 80


class Bar(Protocol):
    length: int | None

    def update(self, n_steps: int) -> None:
        """So many more parts are done."""


class Spinner:
    """A line that says what is being waited for, and for how long already."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._over = threading.Event()
        self._frames = itertools.cycle(FRAMES if _speaks_unicode() else PLAIN_FRAMES)
        self._thread = threading.Thread(target=self._turn, name="spinner", daemon=True)
        self._started_at = time.monotonic()
        self._thread.start()

    def _turn(self) -> None:
        if self._over.wait(PATIENCE_S):
            return
        while not self._over.wait(FRAME_S):
            seconds = int(time.monotonic() - self._started_at)
            line = f"{next(self._frames)} {self.what}, {seconds} s"
            self._write(WIPE + line[: _read_width() - 1])
        self._write(WIPE)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # stderr may be closed
            sys.stderr.write(text)
            sys.stderr.flush()

    def stop(self) -> None:
        """Returns when the line is gone; a second time does nothing."""
        self._over.set()
        self._thread.join()


@contextlib.contextmanager
def waiting(what: str, *, is_shown: bool = True) -> Iterator[Spinner | None]:
    """Show that something goes on until the end of the block, if somebody is there to see it."""
    if not (is_shown and is_watched()):
        yield None
        return
    spinner = Spinner(click.unstyle(what))
    try:
        yield spinner
    finally:
        spinner.stop()


def is_watched() -> bool:
    """Whether somebody sees what goes to stderr, and a line there can be wiped out."""
    if sys.stderr is None or os.environ.get("TERM") == "dumb":  # None: a shell's 2>&-
        return False
    return sys.stderr.isatty()


def progress_bar(length: int, label: str, *, is_shown: bool = True) -> AbstractContextManager[Bar]:
    """A bar on stderr, for a `with`: `update(1)` after each of so many parts of the work."""
    return click.progressbar(
        length=length, label=label, file=sys.stderr, hidden=not (is_shown and is_watched())
    )


def _read_width() -> int:
    """Columns of the terminal; 80 where it says none."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_WIDTH
    except (OSError, ValueError):
        return USUAL_WIDTH


def _speaks_unicode() -> bool:
    return (sys.stderr.encoding or "").lower().replace("-", "").startswith("utf")
