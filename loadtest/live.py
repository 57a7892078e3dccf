"""What is shown while a load runs: on stderr, and only where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.observed import Observed
from loadtest.pacing import Load
from loadtest.percentiles import percentile

LATELY_S = 2.0


@contextlib.contextmanager
def show_live(load: Load, observed: Observed) -> Iterator[None]:
    """Show how it goes until the end of the block."""
    if not sys.stderr.isatty():
        yield
        return
    with Live(
        get_renderable=lambda: draw_progress(load, observed), console=Console(stderr=True),
        refresh_per_second=2, transient=True,
    ):  # fmt: skip
        yield


def draw_progress(load: Load, observed: Observed) -> Table:
    """A line of figures, as things are now."""
    answers, now = list(load.answers), load.clock.now()
    over = sum(bool(answer.ended_s) for answer in answers)
    lately = sum(
        at_s > now - LATELY_S
        for answer in answers
        if not answer.ended_s or answer.ended_s > now - LATELY_S
        for at_s in tuple(answer.token_s)
    )
    firsts = sorted(a.first_token_s for a in answers if a.first_token_s is not None)
    pool = observed.samples[-1] if observed.samples else None
    table = Table(box=None, header_style="dim", pad_edge=False)
    figures = {
        "seconds": f"{now:.0f}",
        "running": f"{len(answers) - over:,}",
        "over": f"{over:,}",
        "failed": f"{sum(bool(answer.failure) for answer in answers):,}",
        "tokens/s": f"{lately / LATELY_S:,.0f}",
        "first token p50": f"{percentile(firsts, 50):.2f} s" if firsts else "-",
        "workers": str(pool.workers) if pool else "-",
        "queued": f"{pool.queued:,}" if pool else "-",
        "last": observed.events[-1].what if observed.events else "",
    }
    for name in figures:
        table.add_column(name, justify="right")
    table.add_row(*figures.values())
    return table
