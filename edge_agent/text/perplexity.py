"""Perplexity over sliding windows, as Hugging Face's guide to fixed-length models describes it.

Each window of a text is one prompt. Only the tokens that no earlier window has scored count, so
with a stride below the window every token but the first few has context.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """Tokens begin..end of a text, of which the last `scored` are targets."""

    begin: int
    end: int
    scored: int


def sliding_windows(num_tokens: int, length: int, stride: int) -> Iterator[Window]:
    """Windows of up to `length` tokens, `stride` apart, until the text is covered."""
    scored_up_to = 1  # nothing comes before the first token that could predict it
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        if end > scored_up_to:
            yield Window(begin, end, end - max(scored_up_to, begin + 1))
        scored_up_to = end
        if end == num_tokens:
            return


def negative_log_likelihood(logits: Tensor, token_ids: Sequence[int], scored: int) -> float:
    """Of the last `scored` tokens, in nats; logits (T, vocabulary) after each of T tokens."""
    targets = torch.tensor(token_ids[-scored:])
    predictions = logits[-scored - 1 : -1].float()
    return float(torch.nn.functional.cross_entropy(predictions, targets, reduction="sum"))


@dataclass(slots=True)
class PerplexityMeter:
    """Adds up windows."""

    nats: float = 0.0
    tokens: int = 0

    def add(self, logits: Tensor, token_ids: Sequence[int], scored: int) -> None:
        self.nats += negative_log_likelihood(logits, token_ids, scored)
        self.tokens += scored

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)
