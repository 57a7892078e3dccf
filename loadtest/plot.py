"""Draw a report: how latencies are distributed, and how the load went over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console.plots import save_figure
from loadtest.observed import SCALED

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

COLOURS = {"killed": "tab:red", "drained": "tab:orange"}
OTHER_COLOUR = "tab:purple"
PANELS = (("tokens_per_s",), ("in_flight", "queued"), ("workers",))
LABELS = {"tokens_per_s": "tokens/s", "in_flight": "steps in flight", "queued": "steps queued"}


def plot_report(
    report: Mapping[str, Any], latencies: Mapping[str, Sequence[float]], path: Path, title: str
) -> None:
    """Write `draw_report` as a picture."""
    save_figure(draw_report(report, latencies, title), path)


def draw_report(
    report: Mapping[str, Any], latencies: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """On the left latencies, seconds by name; on the right the course, with what was done."""
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 5.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    left, right = figure.subfigures(1, 2, squeeze=False)[0]  # laid out each by itself
    _draw_distribution(left.add_subplot(), latencies)
    _draw_course(right, report["series"], report["events"])
    return figure


def _draw_distribution(axes: Any, latencies: Mapping[str, Sequence[float]]) -> None:
    """The part of all values that are at most so large: medians and tails are read off alike."""
    for name, values in latencies.items():
        if not values:
            continue
        ordered = sorted(values)
        parts = [(index + 1) / len(ordered) for index in range(len(ordered))]
        milliseconds = [value * 1e3 for value in ordered]
        axes.step(milliseconds, parts, where="post", label=f"{name} (of {len(ordered):,})")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(make_formatter())
    axes.set_yticks([0, 0.25, 0.5, 0.75, 0.95, 1])
    axes.grid(alpha=0.3)
    axes.set_xlabel("ms")
    axes.set_ylabel("part of all that is at most that")
    axes.legend(loc="lower right")


def make_formatter() -> Any:
    """Numbers beside some of the lines between powers of ten."""
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda x, _: f"{x:g}" if f"{x:g}".lstrip("0.")[:1] in ("2", "5") else "")


def _draw_course(
    figure: SubFigure, series: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> None:
    """One below the other: tokens, and where the pool was seen its steps and its workers."""
    from matplotlib.ticker import MaxNLocator

    times = [piece["at_s"] + 0.5 for piece in series]  # the middle of each second
    panels = [panel for panel in PANELS if any(piece[panel[0]] is not None for piece in series)]
    first = None
    for row, names in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, row + 1, sharex=first)
        first = first or axes
        for name in names:
            label = LABELS.get(name, name)
            style = "steps-mid" if name == "workers" else "default"
            axes.plot(times, [piece[name] for piece in series], label=label, drawstyle=style)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        _mark_events(axes, events)
        axes.legend(loc="upper left", fontsize=8)
        axes.tick_params(labelbottom=row == len(panels) - 1)
    axes.set_xlabel("seconds")


def _mark_events(axes: Any, events: Sequence[Mapping[str, Any]]) -> None:
    """Lines for workers that went; that a pool grew or shrank is seen in their number."""
    gone = [event for event in events if not event["what"].startswith(SCALED)]
    kinds = [event["what"].partition(" ")[0] for event in gone]
    for colour in dict.fromkeys(COLOURS.get(kind, OTHER_COLOUR) for kind in kinds):
        at = [
            event["at_s"]
            for event, kind in zip(gone, kinds, strict=True)
            if COLOURS.get(kind, OTHER_COLOUR) == colour
        ]
        (kind,) = {k for k in kinds if COLOURS.get(k) == colour} or {""}
        label = f"worker {kind}" if kind else "ended by itself"
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), color=colour, linewidth=0.8,
                    label=label)  # fmt: skip
