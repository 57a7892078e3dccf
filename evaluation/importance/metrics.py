"""Importance of tokens by the attention that they receive.

Letters: H heads, T tokens, L layers; attention[h, i, j] is what row i pays to token j, so each of
its rows adds up to 1 over j, and nothing is paid to tokens that come later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Attention:
    """What a model paid where, of one text."""

    layers: Sequence[Tensor]  # L of (H, T, T)
    relevance: Tensor  # (L, H), not negative: of the heads; of ones where nobody measured it
    first: int  # layers that `first` looks at


def mean(attention: Attention, layer: int) -> Tensor:
    """The mean over rows and heads."""
    return attention.layers[layer].mean(dim=(0, 1))


def relevant(attention: Attention, layer: int) -> Tensor:
    """The mean over rows, heads weighted by their relevance."""
    weights = attention.relevance[layer]
    total = weights.sum()
    weights = weights / total if total > 0 else torch.full_like(weights, 1 / len(weights))
    return torch.einsum("h,hij->j", weights, attention.layers[layer]) / len(
        attention.layers[layer][0]
    )


def last_row(attention: Attention, layer: int) -> Tensor:
    """What the last row pays, the mean over heads."""
    return attention.layers[layer][:, -1].mean(dim=0)


def maximum(attention: Attention, layer: int) -> Tensor:
    """The most that any row of any head pays."""
    return attention.layers[layer].amax(dim=(0, 1))


def up_to(attention: Attention, layer: int) -> Tensor:
    """The mean over rows, heads and all layers up to this one."""
    return _mean_of(attention.layers[: layer + 1])


def first(attention: Attention, layer: int) -> Tensor:
    """The mean over rows, heads and the first layers: what a device with a head can compute."""
    return _mean_of(attention.layers[: attention.first])


def _mean_of(layers: Sequence[Tensor]) -> Tensor:
    return torch.stack([layer.mean(dim=(0, 1)) for layer in layers]).mean(dim=0)


METRICS = {
    "mean": mean,
    "relevant": relevant,
    "last_row": last_row,
    "maximum": maximum,
    "up_to": up_to,
    "first": first,
}
RANDOM = "random"  # the baseline: importance drawn by lot


def score_tokens(metric: str, attention: Attention, layer: int, seed: int = 0) -> Tensor:
    """Importance of each token, (T,), after a layer. Raises SettingsError for an unknown metric."""
    if metric == RANDOM:
        tokens = attention.layers[0].shape[-1]
        return torch.rand(tokens, generator=torch.Generator().manual_seed(seed))
    if metric not in METRICS:
        raise SettingsError(f"there is no metric {metric!r}; expected one of {list_metrics()}")
    return METRICS[metric](attention, layer)


def list_metrics() -> str:
    return ", ".join([*METRICS, RANDOM])


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, of two importances of the same tokens; ties in the order of the text."""
    ranks = torch.stack([each.argsort().argsort().double() for each in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])
