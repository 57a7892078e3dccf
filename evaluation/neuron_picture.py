"""Pictures of lists of neurons: the activity that they hold, by rank and layer, and overlaps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.console.plots import require_matplotlib
from common.neurons.lists import NeuronLists

FIRST = 0.3  # of a layer's neurons, which the mask shows
BANDS = 200  # columns of the mask


def draw_lists_picture(lists: Sequence[NeuronLists], path: Path) -> None:
    """Write a PNG: masks, shares of the activity, overlap. Raises SettingsError."""
    plt = open_pyplot()
    with_mass = [each for each in lists if each.mass]
    rows = len(lists) + bool(with_mass) + (len(lists) > 1)
    figure, axes = plt.subplots(rows, 1, figsize=(10, 3 * rows), squeeze=False)
    panels = iter(axes[:, 0])
    for each in lists:
        _draw_mask(next(panels), each)
    if with_mass:
        _draw_mass(next(panels), with_mass)
    if len(lists) > 1:
        _draw_overlap(next(panels), lists)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def open_pyplot() -> Any:
    """Raises SettingsError where it is not installed."""
    require_matplotlib()
    from matplotlib import pyplot as plt

    return plt


def mask_bands(lists: NeuronLists, share: float = FIRST, most_bands: int = BANDS) -> Any:
    """For each layer, and each of some bands of its neurons by number: how many are listed first.

    As a part of the band, (layers, bands).
    """
    bands = min(most_bands, *map(len, lists.layers))
    rows = []
    for ids in lists.layers:
        edges = np.linspace(0, len(ids), bands + 1)
        counts, _ = np.histogram(ids[: round(share * len(ids))], edges)
        sizes, _ = np.histogram(ids, edges)
        rows.append(counts / np.maximum(sizes, 1))
    return np.stack(rows)


def _draw_mask(axes: Any, lists: NeuronLists) -> None:
    axes.imshow(mask_bands(lists), aspect="auto", origin="lower", cmap="magma", vmin=0, vmax=1)
    axes.set_title(f"{lists.name}: where the first {FIRST:.0%} are")
    axes.set_ylabel("layer")
    axes.set_xlabel("neurons by number, in bands")


def _draw_mass(axes: Any, lists: Sequence[NeuronLists]) -> None:
    """One line for each layer of the first list, dark to light; of others the mean."""
    first, *others = lists
    colors = np.linspace(0.1, 0.9, len(first.mass))
    for layer, masses in enumerate(first.mass):
        axes.plot(*_curve(masses), color=(colors[layer], 0.3, 1 - colors[layer]), linewidth=0.8)
    for each in others:
        curves = np.mean([_curve(masses)[1] for masses in each.mass], axis=0)
        axes.plot(np.linspace(0, 1, len(curves)), curves, "k--", label=f"mean of {each.name}")
    axes.set_title(f"{first.name}: share of the activity, layer 0 blue to the last red")
    axes.set_xlabel("first neurons of the list, as a part of the layer")
    axes.grid(alpha=0.3)
    if others:
        axes.legend()


def _curve(masses: Sequence[float]) -> tuple[Any, Any]:
    total = np.concatenate([[0.0], np.cumsum(masses)])
    return np.linspace(0, 1, len(total)), total / max(total[-1], 1e-30)


def _draw_overlap(axes: Any, lists: Sequence[NeuronLists]) -> None:
    """What the first neurons of the first list and of each other one have in common, by layer."""
    from evaluation.neurons import overlap

    for other in lists[1:]:
        shared = [
            overlap(one, two, FIRST) for one, two in zip(lists[0].layers, other.layers, strict=True)
        ]
        axes.plot(range(len(shared)), shared, "o-", label=f"{lists[0].name} and {other.name}")
    axes.axhline(FIRST, color="gray", linestyle=":", label="random lists")
    axes.set_ylim(0, 1)
    axes.set_title(f"shared by the first {FIRST:.0%}")
    axes.set_xlabel("layer")
    axes.legend()
