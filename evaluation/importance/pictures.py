"""Plots of what an experiment has shown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.importance.sweep import CHANNELS, EXACT, Findings

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_sweep(findings: Findings) -> Figure:
    """Rise of perplexity against the share of coarse tokens: a panel a layer, a line a metric."""
    from matplotlib import pyplot as plt

    points = [point for point in findings.points if point.metric not in (EXACT, CHANNELS)]
    layers = sorted({point.layer for point in points})
    figure, panels = plt.subplots(
        1, len(layers), figsize=(1.5 + 4 * len(layers), 4.2), sharey=True, squeeze=False
    )
    for panel, layer in zip(panels[0], layers, strict=True):
        for metric in dict.fromkeys(point.metric for point in points):
            line = [p for p in points if (p.layer, p.metric) == (layer, metric)]
            panel.plot(
                [p.ratio for p in line], [p.loss_percent for p in line], ".-", label=metric,
                color="black" if metric == "random" else None, linewidth=1.2,
            )  # fmt: skip
        panel.set_title(f"behind layer {layer}")
        panel.set_xlabel(f"share of tokens in {points[0].bits} bits")
        panel.set_yscale("symlog", linthresh=0.1)
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("rise of perplexity, %")
    panels[0][-1].legend(fontsize=8)
    return figure


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


def save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
