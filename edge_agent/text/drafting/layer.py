"""Drafts by the model's own ends, with a trained layer in place of the middle.

For each guess the head runs the token before it, the layer estimates what the pool would give the
tail, and the tail says what is likeliest. Head and tail go through the session's own caches, which
are cut back to what is true when a proposal is made: the rows of the guesses are run once more
when they are sent, which spares the caches a second way of growing.

Letters: T tokens, D hidden size, V vocabulary, H heads, E head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edge_agent.text.drafting import grades
from edge_agent.text.drafting.drafter import Draft
from edge_agent.text.drafting.layer_model import WINDOW, LayerModel
from edge_agent.text.ends import EndCaches, ModelEnds

PROBABILITIES = (0.4, 0.6, 0.8, 0.9, 0.97)  # of the likeliest, from which on the next grade begins


class LayerDrafter:
    """One session's, whose ends keep rows only: states cannot be cut back token by token."""

    name = "model"
    is_free = False

    def __init__(self, layer: LayerModel, ends: ModelEnds, caches: EndCaches) -> None:
        self._layer = layer
        self._ends = ends
        self._caches = caches
        self._seen = SeenRows(layer)

    @torch.inference_mode()
    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        self._seen.append(boundary.float(), tail_inputs.float())

    def cut_back(self, position: int) -> None:
        self._seen.cut_back(position)

    @torch.inference_mode()
    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        """None where rows of the text have not been seen, as after an error."""
        position = len(token_ids) - 1
        caches = self._caches
        if not caches.head.length == caches.tail.length == self._seen.length == position >= 0:
            return []
        if self._ends.context is not None:
            limit = min(limit, self._ends.context - position)
        drafts: list[Draft] = []
        try:
            while len(drafts) < limit:
                logits = self._run(drafts[-1].token_id if drafts else token_ids[-1])
                token, probability = find_likeliest(logits)
                if not math.isfinite(probability):
                    break
                drafts.append(Draft(token, grade_of(probability)))
        finally:
            caches.cut_back(position)
            self._seen.cut_back(position)
        return drafts

    def _run(self, token: int) -> Tensor:
        """Logits (V,) after a token of which there is no row from the pool."""
        (boundary,) = self._ends.run_heads([([token], self._caches)])
        estimate = self._seen.estimate(boundary.float())
        return self._ends.score_tail(estimate, self._caches)[0]


def find_likeliest(logits: Tensor) -> tuple[int, float]:
    """Of logits (V,) the best token, and its probability, which may be no number."""
    best = int(logits.argmax())
    return best, math.exp(float(logits[best] - logits.logsumexp(-1)))


def grade_of(probability: float) -> int:
    """Of the likeliest token."""
    return grades.MODEL + sum(probability >= bound for bound in PROBABILITIES)


class SeenRows:
    """What the layer keeps of a session's last tokens: keys, values, and what the tail was given.

    Of WINDOW tokens at least, where there are so many.
    """

    def __init__(self, layer: LayerModel) -> None:
        shape = layer.shape
        self._layer = layer
        self._first = 0  # position of what is kept
        self.length = 0  # position of the next token
        heads = (2 * WINDOW, shape.heads, shape.head_size)
        self._keys, self._values = torch.zeros(heads), torch.zeros(heads)
        self._tail_inputs = torch.zeros(2 * WINDOW, shape.hidden)

    def append(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        """Rows (T, D) of the next tokens."""
        before = torch.cat([self._last(), tail_inputs])[:-1]
        left_out = max(0, len(boundary) - WINDOW)
        if left_out:
            self._first = self.length = self.length + left_out
        x = self._layer.enter(boundary[left_out:], before[left_out:])
        self._put(x, tail_inputs[left_out:])

    def estimate(self, boundary: Tensor) -> Tensor:
        """The next token's row (1, D) to what the tail would be given, (1, D); both are kept."""
        x = self._layer.enter(boundary, self._last())
        place = self._put(x, torch.zeros_like(boundary))
        begin, position = max(0, place + 1 - WINDOW), torch.tensor([self.length - 1])
        query = self._layer.queries(x, position).transpose(0, 1)  # (H, 1, E)
        keys, values = (
            part[begin : place + 1].transpose(0, 1) for part in (self._keys, self._values)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        estimate = self._layer.leave(x, attended.transpose(0, 1), boundary)
        self._tail_inputs[place] = estimate[0]
        return estimate

    def cut_back(self, position: int) -> None:
        self.length = min(self.length, max(0, position))
        self._first = min(self._first, self.length)

    def _last(self) -> Tensor:
        """What the tail was given last, (1, D); zeros where nothing is known of it."""
        if self.length == self._first:
            return torch.zeros(1, self._layer.shape.hidden)
        return self._tail_inputs[self.length - self._first - 1][None]

    def _put(self, x: Tensor, tail_inputs: Tensor) -> int:
        """Keep the next tokens, of which there are WINDOW at most; the place of the last."""
        count = len(x)
        kept = self.length - self._first
        if kept + count > 2 * WINDOW:
            self._move(kept)
            kept = WINDOW
        end = self.length + count
        keys, values = self._layer.keys_values(x, torch.arange(self.length, end))
        at = slice(kept, kept + count)
        self._keys[at], self._values[at], self._tail_inputs[at] = keys, values, tail_inputs
        self.length = end
        return kept + count - 1

    def _move(self, kept: int) -> None:
        """Forget all but the last WINDOW tokens."""
        for memory in (self._keys, self._values, self._tail_inputs):
            memory[:WINDOW] = memory[kept - WINDOW : kept].clone()
        self._first = self.length - WINDOW
