"""Weights of linear layers in 8 bits: one scale for each output, products in bfloat16.

A fourth of the memory of float32, and with few rows, where reading weights is what takes the time,
less time. What the rounding does to a text is measured by `midspan eval codec` over such workers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common.errors import CheckpointError

LARGEST = 127
PIECE = 1 << 18  # values that are rounded at once: little memory that is freed at once, too
FEW_ROWS = 8  # up to here PyTorch's product with 8-bit weights is the faster one on CPUs


class Int8Linear(nn.Module):
    """What a linear layer computes, (…, in) to (…, out), with rounded weights."""

    def __init__(self, linear: nn.Linear) -> None:
        """Raises CheckpointError for weights that are not finite."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        source = linear.weight.detach()
        # plain attributes: filled already. Nothing of the memory that the layer was read into stays
        self.weight = torch.empty_like(source, dtype=torch.int8)  # (out, in)
        self.scale = source.new_empty(len(source), dtype=torch.bfloat16)  # (out,)
        self.bias = linear.bias.detach().clone() if linear.bias is not None else None
        at_once = max(1, PIECE // max(1, linear.in_features))
        pieces = (torch.split(tensor, at_once) for tensor in (source, self.weight, self.scale))
        for values, rounded, scale in zip(*pieces, strict=True):
            _round(values.float(), rounded, scale)

    def forward(self, rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, self.in_features).to(torch.bfloat16)
        if len(flat) <= FEW_ROWS and flat.device.type == "cpu":
            product = torch._weight_int8pack_mm(flat.contiguous(), self.weight, self.scale)
        else:
            product = nn.functional.linear(flat, self.weight.to(torch.bfloat16)) * self.scale
        product = product.to(rows.dtype).view(*rows.shape[:-1], self.out_features)
        return product if self.bias is None else product + self.bias


def _round(values: Tensor, rounded: Tensor, scale: Tensor) -> None:
    """Weights (n, in) to multiples of a scale for each row. Raises CheckpointError."""
    if not torch.isfinite(values).all():
        raise CheckpointError("a weight is NaN or infinite, which 8 bits cannot hold")
    largest = values.abs().amax(1).clamp_min(torch.finfo(torch.bfloat16).tiny * LARGEST)
    scale.copy_(largest / LARGEST)
    rounded.copy_((values / scale.float()[:, None]).round_().clamp_(-LARGEST, LARGEST))


def pack_linears(layer: nn.Module) -> int:
    """Put one in place of every linear layer; how many there were."""
    count = 0
    for module in list(layer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Int8Linear(child))
                count += 1
    for parameter in layer.parameters():  # else they keep the memory that all were read into
        parameter.data = parameter.data.clone()
    return count
