"""Train a layer that drafts: on texts of the model's own, to estimate what its tail will be given.

Estimates are judged twice: by their distance from the tail's true inputs, and by what the tail
makes of them beside what it makes of those. Each pass unrolls DEPTH guesses from every token, of
which each has the last one's estimate in place of a row from the pool, as when drafts follow on
each other (HASS, Zhang et al. 2024).

Letters: B batch, T tokens, D hidden size, V vocabulary, H heads, E head size.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, smooth_l1_loss

from edge_agent.text.drafting.layer_model import WINDOW, LayerModel
from evaluation.drafting.whole_model import WholeModel

WEIGHT_OF_DEPTH = 0.8  # of a guess beside the one before it
WEIGHT_OF_DISTANCE = 0.5
WARM_UP = 20  # steps


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How long, and how fast."""

    steps: int = 600
    batch: int = 8  # texts
    window: int = 160  # tokens of a text at most
    depth: int = 3
    peak: float = 3e-3  # learning rate
    seed: int = 0


def train_layer(
    layer: LayerModel,
    model: WholeModel,
    texts: Sequence[Sequence[int]],
    settings: TrainingSettings,
    on_step: Callable[[float], None],
) -> None:
    """Train on texts of the model's own; `on_step` is given the loss of each step."""
    optimizer = torch.optim.AdamW(
        layer.parameters(), lr=settings.peak, betas=(0.9, 0.95), weight_decay=0.01
    )
    rng = random.Random(settings.seed)
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.peak * learning_rate(step, settings.steps)
        batch = [cut_window(rng.choice(texts), settings.window, rng) for _ in range(settings.batch)]
        loss = measure_loss(layer, model, batch, settings.depth)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        on_step(float(loss.detach()))


def learning_rate(step: int, steps: int) -> float:
    """A share of the peak: up in WARM_UP steps, then down a cosine to 2%."""
    rise = min(1.0, (step + 1) / WARM_UP)
    return rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def cut_window(text: Sequence[int], window: int, rng: random.Random) -> Sequence[int]:
    """Of a text that is longer a part; its beginning half of the time, where sessions begin."""
    if len(text) <= window or rng.random() < 0.5:
        return text[:window]
    begin = rng.randrange(len(text) - window + 1)
    return text[begin : begin + window]


def measure_loss(
    layer: LayerModel, model: WholeModel, texts: Sequence[Sequence[int]], depth: int
) -> Tensor:
    boundary, tail_inputs = model.rows(texts)
    with torch.no_grad():
        wanted = model.judge(tail_inputs).softmax(-1)
    lengths = torch.tensor([len(text) for text in texts])
    estimates = unroll(layer, boundary, tail_inputs, depth)
    judged = model.judge(torch.cat(estimates)).chunk(depth)
    scale = tail_inputs.square().mean().sqrt()
    loss, weights = torch.zeros(()), 0.0
    for index, (estimate, logits) in enumerate(zip(estimates, judged, strict=True)):
        counts = _counts(lengths, boundary.shape[1], index)
        distance = smooth_l1_loss(estimate / scale, tail_inputs / scale, reduction="none").mean(-1)
        nats = -(wanted * logits.log_softmax(-1)).sum(-1)
        weight = WEIGHT_OF_DEPTH**index
        both = nats + WEIGHT_OF_DISTANCE * distance
        loss = loss + weight * both[counts].mean()
        weights += weight
    return loss / weights


def _counts(lengths: Tensor, tokens: int, depth: int) -> Tensor:
    """Which tokens (B, T) are of a text, and have as many before them as guesses were made."""
    places = torch.arange(tokens)
    return (places < lengths[:, None]) & (places >= depth)


def unroll(layer: LayerModel, boundary: Tensor, tail_inputs: Tensor, depth: int) -> list[Tensor]:
    """Estimates (B, T, D) of the tail's inputs, as the first to the last guess of a proposal.

    That at t as guess n has the true rows up to t - n, and estimates from there on.
    """
    positions = torch.arange(boundary.shape[1])
    before = tail_inputs
    kept: list[tuple[Tensor, Tensor]] = []
    estimates: list[Tensor] = []
    for _ in range(depth):
        x = layer.enter(boundary, shift(before, 1))
        kept.append(layer.keys_values(x, positions))
        attended = attend(layer.queries(x, positions), kept)
        estimates.append(layer.leave(x, attended, boundary))
        before = estimates[-1]
    return estimates


def attend(queries: Tensor, kept: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Of the last guess: it sees itself, guesses before it, and before those what is true.

    `kept` are keys and values of each guess for all tokens, (B, T, H, E).
    """
    (keys, values), last = kept[0], len(kept) - 1
    places = torch.arange(queries.shape[1])
    behind = places[:, None] - places  # of a query the distance to each key
    seen = (behind >= last) & (behind < WINDOW)
    scores = torch.einsum("bqhe,bkhe->bhqk", queries, keys).masked_fill(~seen, float("-inf"))
    own = [(shift(k, last - n), shift(v, last - n)) for n, (k, v) in enumerate(kept) if n]
    near = [torch.einsum("bqhe,bqhe->bhq", queries, k)[..., None] for k, _ in own]
    weights = (torch.cat([scores, *near], dim=-1) / math.sqrt(queries.shape[-1])).softmax(-1)
    length = keys.shape[1]
    attended = torch.einsum("bhqk,bkhe->bqhe", weights[..., :length], values)
    for n, (_, v) in enumerate(own):
        attended = attended + weights[..., length + n].transpose(1, 2)[..., None] * v
    return attended


def shift(rows: Tensor, by: int) -> Tensor:
    """Rows (B, T, ...) each in the place of the one `by` tokens later; zeros come first."""
    if by == 0:
        return rows
    return pad(rows, (0, 0) * (rows.dim() - 2) + (by, 0))[:, : rows.shape[1]]
