"""Work of minutes: a bar or a spinner on a terminal, elsewhere a line before and one after it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import click

from common.console.waiting import Bar, is_watched, progress_bar, waiting


@contextlib.contextmanager
def counted_work(length: int, what: str, *, is_shown: bool = True) -> Iterator[Bar]:
    """For a `with`: `update(1)` after each of so many parts of the work."""
    with _said(what, is_shown), progress_bar(length, what, is_shown=is_shown) as bar:
        yield bar


@contextlib.contextmanager
def long_work(what: str, *, is_shown: bool = True) -> Iterator[None]:
    """For a `with`, where parts cannot be counted."""
    with _said(what, is_shown), waiting(what, is_shown=is_shown):
        yield


@contextlib.contextmanager
def _said(what: str, is_shown: bool) -> Iterator[None]:
    """On stderr, where nobody would see something move."""
    if not is_shown or is_watched():
        yield
        return
    click.echo(f"{what} …", err=True)
    began_at = time.monotonic()
    yield
    click.echo(f"{what}: done in {time.monotonic() - began_at:.0f} s", err=True)
