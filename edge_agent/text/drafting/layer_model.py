"""A trained layer that stands in for the middle of a model: what will come back for the tail.

    x[t] = Linear([norm(boundary[t]), norm(tail input[t - 1])])      a row that the head gives, and
    h[t] = x[t] + attention(norm(x))[t],  h[t] += mlp(norm(h[t]))    what the pool gave before it
    tail input[t] ≈ skip * boundary[t] + Linear(norm(h[t]))

That is EAGLE's input (Li et al. 2024) put where a model is cut: the estimate goes through the tail
that the device has, so there is no LM head to train. Attention is causal, over the last WINDOW
tokens, with rotary positions. As there is one layer, keys and values of a token hang on its own two
rows only: those of a prompt are two products, and nothing of it needs attention.

Letters: B batch, T tokens, D hidden size, H heads, E head size, M of the MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

WINDOW = 512
ROPE_BASE = 10_000.0


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of a layer; all numbers are positive, `head_size` is even."""

    hidden: int
    heads: int
    head_size: int
    intermediate: int


def shape_for(hidden: int) -> LayerShape:
    """Heads of 64 or so, and an MLP of 8/3 of the hidden size, as Llama's."""
    head_size = min(64, max(2, hidden // 4 // 2 * 2))
    return LayerShape(
        hidden, max(1, hidden // head_size), head_size, math.ceil(hidden * 8 / 3 / 16) * 16
    )


class LayerModel(nn.Module):
    """Without any memory of its own: who calls it keeps keys and values."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        hidden, inner = shape.hidden, shape.heads * shape.head_size
        self.shape = shape
        self.boundary_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.tail_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.join = nn.Linear(2 * hidden, hidden, bias=False)
        self.attention_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.query = nn.Linear(hidden, inner, bias=False)
        self.key_value = nn.Linear(hidden, 2 * inner, bias=False)
        self.attention_out = nn.Linear(inner, hidden, bias=False)
        self.mlp_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.gate_up = nn.Linear(hidden, 2 * shape.intermediate, bias=False)
        self.down = nn.Linear(shape.intermediate, hidden, bias=False)
        self.out_norm = nn.RMSNorm(hidden, eps=1e-6)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.skip = nn.Parameter(torch.ones(hidden))

    def enter(self, boundary: Tensor, tail_inputs_before: Tensor) -> Tensor:
        """Rows (..., D) and those of the tokens before them: x, (..., D)."""
        rows = [self.boundary_norm(boundary), self.tail_norm(tail_inputs_before)]
        joined: Tensor = self.join(torch.cat(rows, dim=-1))
        return joined

    def keys_values(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """x (..., T, D) at positions (T,): keys, rotated, and values, (..., T, H, E)."""
        keys, values = self.key_value(self.attention_norm(x)).chunk(2, dim=-1)
        return rotate(self._split(keys), positions), self._split(values)

    def queries(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (..., T, D) at positions (T,): (..., T, H, E), rotated."""
        return rotate(self._split(self.query(self.attention_norm(x))), positions)

    def leave(self, x: Tensor, attended: Tensor, boundary: Tensor) -> Tensor:
        """What attention gave, (..., H, E), x and rows (..., D): the tail's inputs, (..., D)."""
        h = x + self.attention_out(attended.flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(h)).chunk(2, dim=-1)
        h = h + self.down(nn.functional.silu(gate) * up)
        estimate: Tensor = self.skip * boundary + self.out(self.out_norm(h))
        return estimate

    def _split(self, flat: Tensor) -> Tensor:
        return flat.view(*flat.shape[:-1], self.shape.heads, self.shape.head_size)


def rotate(heads: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (T,) of heads (..., T, H, E), by halves as Llama's code does."""
    half = heads.shape[-1] // 2
    rates = ROPE_BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = (positions[:, None].float() * rates)[:, None]  # (T, 1, E/2)
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
