"""The unsplit model, for making a drafter: it writes, says what it would have written, and its tail
judges rows that a drafter estimates, with gradients.

Letters: B batch, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from common.spans.cut import Cut
from common.weights.whole_model import find_decoder


class WholeModel:
    """All of its layers, as transformers loads them, in float32."""

    def __init__(self, directory: Path, cut: Cut) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        ).eval()
        self._model.requires_grad_(False)
        owner, name = find_decoder(self._model, self._model.config.num_hidden_layers)
        self._layers: nn.ModuleList = getattr(owner, name)
        self._cut = cut
        self._gives_tuples = False

    @torch.inference_mode()
    def write(
        self, prompts: Sequence[Sequence[int]], tokens: int, end_ids: Set[int]
    ) -> list[list[int]]:
        """Greedy answers of up to so many tokens to prompts of one length."""
        ids = torch.tensor(prompts)
        written = self._model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            pad_token_id=next(iter(end_ids), 0),
        )  # fmt: skip
        return [cut_at_end(row[ids.shape[1] :], end_ids) for row in written.tolist()]

    @torch.inference_mode()
    def say_next(self, token_ids: Sequence[int]) -> list[int]:
        """What it would have written after each token of a text."""
        logits = self._model(torch.tensor([token_ids]), use_cache=False).logits[0]
        best: list[int] = logits.argmax(-1).tolist()
        return best

    @torch.no_grad()
    def rows(self, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Rows that cross the cut, up and down, of texts padded at their ends: (B, T, D) each."""
        ids = pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
        crossing: dict[str, Tensor] = {}

        def catch_up(_: Any, arguments: tuple[Any, ...]) -> None:
            crossing["up"] = arguments[0]

        def catch_down(_: Any, arguments: tuple[Any, ...], output: Any) -> None:
            self._gives_tuples = isinstance(output, tuple)
            crossing["down"] = output[0] if self._gives_tuples else output

        hooks = [
            self._layers[self._cut.begin].register_forward_pre_hook(catch_up),
            self._layers[self._cut.end - 1].register_forward_hook(catch_down),
        ]
        self._model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        return crossing["up"], crossing["down"]

    def judge(self, rows: Tensor) -> Tensor:
        """Logits (B, T, V) after each of the tail's inputs (B, T, D), with gradients."""
        with self._entering(rows):
            ids = torch.zeros(rows.shape[:2], dtype=torch.long)
            logits: Tensor = self._model(ids, use_cache=False).logits
        return logits

    @contextmanager
    def _entering(self, rows: Tensor) -> Iterator[None]:
        """While the layers before the tail are hollow, and the last of them gives these rows."""
        before = self._layers[: self._cut.end]
        result = (rows,) if self._gives_tuples else rows
        try:
            for layer in before:
                layer.forward = lambda *_, **__: result
            yield
        finally:
            for layer in before:
                del layer.forward


def cut_at_end(token_ids: list[int], end_ids: Set[int]) -> list[int]:
    """A text with the mark that ends it, and nothing behind."""
    ends = [at for at, token in enumerate(token_ids) if token in end_ids]
    return token_ids[: ends[0] + 1] if ends else token_ids
