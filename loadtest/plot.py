"""Draw a report: how latencies are distributed, and how the load went over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import SettingsError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"killed": "tab:red", "drained": "tab:orange"}
OTHER_COLOUR = "tab:purple"


def require_matplotlib() -> None:
    """Raises SettingsError."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SettingsError("--plot needs matplotlib: pip install 'midspan[plot]'") from error
    mpl.use("Agg")


def plot_report(
    report: Mapping[str, Any], latencies: Mapping[str, Sequence[float]], path: Path, title: str
) -> None:
    """Write `draw_report` as a picture."""
    from matplotlib import pyplot as plt

    figure = draw_report(report, latencies, title)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def draw_report(
    report: Mapping[str, Any], latencies: Mapping[str, Sequence[float]], title: str
) -> Figure:
    """On the left latencies, seconds by name; on the right the series, with what was done."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5))
    figure.suptitle(title, fontsize=10)
    _draw_distribution(left, latencies)
    _draw_series(right, report["series"], report["events"])
    figure.tight_layout()
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


def _draw_series(
    axes: Any, series: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]]
) -> None:
    times = [piece["at_s"] + 0.5 for piece in series]  # the middle of each second
    axes.plot(times, [piece["tokens_per_s"] for piece in series], label="tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds")
    axes.set_ylabel("tokens/s")
    if any(piece["workers"] is not None for piece in series):
        counts = axes.twinx()
        for name, style in (("workers", "-"), ("queued", ":"), ("in_flight", "--")):
            values = [piece[name] for piece in series]
            words = {"in_flight": "steps in flight", "queued": "steps queued"}.get(name, name)
            counts.plot(times, values, style, color="tab:green", label=words, linewidth=1)
        counts.set_ylim(bottom=0)
        counts.set_ylabel("workers, steps")
        counts.legend(loc="lower right")
    for what in dict.fromkeys(event["what"].partition(" ")[0] for event in events):
        at = [event["at_s"] for event in events if event["what"].startswith(what)]
        colour = COLOURS.get(what, OTHER_COLOUR)
        label = f"worker {what}" if what in COLOURS else "ended by itself"
        axes.vlines(at, 0, 1, transform=axes.get_xaxis_transform(), color=colour, linewidth=0.8,
                    label=label)  # fmt: skip
    axes.legend(loc="lower left")
