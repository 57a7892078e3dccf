"""Rows of a text with fewer bits: for the least important tokens, or for all of them by channel.

These are the formats that such measurements are published with, as values and not as bytes; what
the product sends is in common/codecs. Letters: T tokens, D channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.errors import SettingsError

SMALLEST = torch.finfo(torch.float32).tiny
BY_SIZE = ("mean", "maximum")  # of a channel's one bit


def round_to(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Whole steps of `scale`, as many as fit into so many bits with a sign."""
    top = 2 ** (bits - 1) - 1
    return (values / scale).round().clamp(-top, top) * scale


def round_least_important(rows: Tensor, importance: Tensor, ratio: float, bits: int = 4) -> Tensor:
    """The int(ratio x T) least important rows in so many bits, one scale over them; others exact.

    rows (T, D), importance (T,).
    """
    least = importance.argsort(stable=True)[: int(ratio * len(rows))]
    if not len(least):
        return rows
    chosen = rows[least]
    scale = (chosen.abs().max() / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST)
    rounded = rows.clone()
    rounded[least] = round_to(chosen, scale, bits)
    return rounded


def round_channels(rows: Tensor, bits: int, by: str = "maximum") -> Tensor:
    """All rows (T, D) in so many bits, a scale for each channel.

    With one bit a value becomes plus or minus the channel's `mean` or `maximum` of |x|.
    Raises SettingsError for a width or a size that there is not.
    """
    if bits not in range(1, 9):
        raise SettingsError(f"{bits} bits for a channel; expected 1 to 8")
    if by not in BY_SIZE:
        raise SettingsError(f"a channel has no {by!r}; expected {' or '.join(BY_SIZE)}")
    sizes = rows.abs()
    if bits == 1:
        scale = sizes.mean(dim=0) if by == "mean" else sizes.amax(dim=0)
        return torch.where(rows >= 0, scale, -scale)
    scale = (sizes.amax(dim=0) / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST)
    return round_to(rows, scale, bits)


def round_rows(rows: Tensor, bits: int) -> Tensor:
    """All rows (T, D) in so many bits, a scale for each row."""
    scale = (rows.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)).clamp_min(SMALLEST)
    return round_to(rows, scale, bits)


def round_two_widths(rows: Tensor, importance: Tensor, share: float, high: int, low: int) -> Tensor:
    """The ceil(share x T) most important rows in `high` bits, others in `low`; a scale for a row.

    As the codec intN/M@F does, but for who chooses. Of `share` 1 all have `high` bits.
    """
    count = math.ceil(share * len(rows))
    best = torch.zeros(len(rows), dtype=torch.bool)
    best[importance.argsort(stable=True, descending=True)[:count]] = True
    return torch.where(best[:, None], round_rows(rows, high), round_rows(rows, low))
