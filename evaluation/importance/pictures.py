"""Plots of what an experiment has shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evaluation.importance.metrics import RANDOM
from evaluation.importance.sweep import CHANNELS, CUT, DRAWN, EXACT, Findings, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OTHER_WAYS = (EXACT, CHANNELS, CUT, DRAWN)  # than to choose tokens


def draw_sweep(findings: Findings) -> Figure:
    """Rise of perplexity against the share of coarse tokens.

    A panel for each layer and width, a line for each metric.
    """
    from matplotlib import pyplot as plt

    points = list_sweep(findings)
    layers = list(dict.fromkeys(point.layer for point in points))
    widths = list(dict.fromkeys(point.bits for point in points))
    figure, panels = plt.subplots(
        len(widths), len(layers), figsize=(1.5 + 4 * len(layers), 0.7 + 3.5 * len(widths)),
        sharex=True, sharey="row", squeeze=False,
    )  # fmt: skip
    for row, bits in zip(panels, widths, strict=True):
        for panel, layer in zip(row, layers, strict=True):
            _draw_lines(panel, [p for p in points if (p.layer, p.bits) == (layer, bits)])
            panel.set_title(f"behind layer {layer}, {bits} bits")
        row[0].set_ylabel("rise of perplexity, %")
    for panel in panels[-1]:
        panel.set_xlabel("share of tokens, the least important first")
    panels[0][-1].legend(fontsize=8)
    return figure


def list_sweep(findings: Findings) -> list[Point]:
    """Points where some tokens were chosen by a metric."""
    return [point for point in findings.points if point.metric not in OTHER_WAYS]


def _draw_lines(panel: Any, points: Sequence[Point]) -> None:
    for metric in dict.fromkeys(point.metric for point in points):
        line = [point for point in points if point.metric == metric]
        panel.plot(
            [p.ratio for p in line], [p.loss_percent for p in line], ".-", label=metric,
            color="black" if metric == RANDOM else None, linewidth=1.2,
        )  # fmt: skip
    panel.grid(alpha=0.3)


def draw_correlation(findings: Findings) -> Figure:
    """Which layers agree on what is important."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.2))
    image = axes.imshow(findings.correlation, vmin=-1, vmax=1, cmap="RdBu")
    for row, values in enumerate(findings.correlation):
        for column, value in enumerate(values):
            axes.text(
                column, row, f"{value:.2f}", ha="center", va="center", fontsize=7,
                color="white" if abs(value) > 0.7 else "black",
            )  # fmt: skip
    axes.set_xlabel("layer")
    axes.set_ylabel("layer")
    figure.colorbar(image, label="rank correlation of attention received")
    return figure


def draw_relevance(findings: Findings) -> Figure:
    """How much of a layer's relevance each head has."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4.2))
    image = axes.imshow(findings.relevance, vmin=0, cmap="viridis", aspect="auto")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_xticks(range(len(findings.relevance[0])))
    figure.colorbar(image, label="share of |gradient x attention| in its layer")
    return figure
