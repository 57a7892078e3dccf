"""A whole model in this process, watched: attention, rows between layers, relevance of heads.

The relevance of a head is |gradient x attention|: how much the text's likelihood hangs on what the
head pays, summed over a text. Layer-wise relevance propagation says it more finely; the library
that has it (lxt 2.1) brings bitsandbytes, open_clip and accelerate along and knows no GPT-NeoX, so
it is not used here.

Letters: L layers, H heads, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.errors import SettingsError
from common.weights.whole_model import find_decoder
from evaluation.importance.metrics import Attention

Change = Callable[[Tensor], Tensor]  # of rows (T, D)
NO_CHANGE: Mapping[int, Change] = {}


class WatchedModel:
    """Raises SettingsError for a model without attention that can be looked at."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        ).eval()
        config = self.model.config.get_text_config()
        self.layers: int = config.num_hidden_layers
        owner, name = find_decoder(self.model, self.layers)
        self._layers = getattr(owner, name)
        with torch.inference_mode():
            seen = self.model(torch.tensor([[0, 0]]), output_attentions=True).attentions
        if not seen or len(seen) != self.layers or any(each is None for each in seen):
            raise SettingsError(
                f"{directory}: {config.model_type} models do not show the attention of each layer"
            )
        self.heads: int = seen[0].shape[1]

    @torch.inference_mode()
    def look(
        self, ids: Sequence[int], relevance: Tensor | None = None, first: int = 1
    ) -> Attention:
        """What the model pays where in a text."""
        seen = self.model(torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
        if relevance is None:
            relevance = torch.ones(self.layers, self.heads)
        return Attention([layer[0] for layer in seen], relevance, first)

    def measure_relevance(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """|gradient x attention| of each head over all texts, (L, H); a layer's add up to 1."""
        total = torch.zeros(self.layers, self.heads)
        for ids in texts:
            tokens = torch.tensor([ids])
            output = self.model(tokens, labels=tokens, output_attentions=True, use_cache=False)
            slopes = torch.autograd.grad(output.loss, output.attentions)
            for index, (paid, slope) in enumerate(zip(output.attentions, slopes, strict=True)):
                total[index] += (paid * slope)[0].detach().abs().sum(dim=(1, 2))
        return total / total.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    @torch.inference_mode()
    def rows_after(self, ids: Sequence[int]) -> list[Tensor]:
        """The rows that leave each layer, L of (T, D)."""
        rows: list[Tensor] = []

        def keep(_module: Any, _args: Any, output: Any) -> None:
            rows.append(_rows_of(output)[0].clone())

        with contextlib.ExitStack() as hooks:
            for layer in self._layers:
                hooks.callback(layer.register_forward_hook(keep).remove)
            self.model(torch.tensor([ids]), use_cache=False)
        return rows

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], changes: Mapping[int, Change] = NO_CHANGE) -> Tensor:
        """After each token, (T, V); `changes` are done to the rows that leave those layers."""
        with contextlib.ExitStack() as changed:
            for layer, change in changes.items():
                changed.enter_context(self._changed(layer, change))
            logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0]
        return logits

    @torch.inference_mode()
    def continue_greedily(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The likeliest next tokens, even beyond the end of a text."""
        written: Tensor = self.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens,
        )  # fmt: skip
        return [int(token) for token in written[0, len(ids) :]]

    @contextlib.contextmanager
    def _changed(self, layer: int, change: Change) -> Iterator[None]:
        def replace(_module: Any, _args: Any, output: Any) -> Any:
            rows = change(_rows_of(output)[0])[None]
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        hook = self._layers[layer].register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()


def _rows_of(output: Any) -> Tensor:
    rows: Tensor = output[0] if isinstance(output, tuple) else output
    return rows
