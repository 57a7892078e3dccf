"""Which neurons of a model are active: what goes into the last matrix of each MLP, text by text.

A neuron's activity in a text is the mean, over its tokens, of the absolute value that the neuron
gives to that matrix; over several texts it is the mean of theirs, however long each is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from common.console.inputs import read_text
from common.errors import SettingsError
from common.neurons.lists import NeuronLists
from common.neurons.matrices import find_mlp
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.whole_model import find_decoder
from evaluation.texts import cut_windows

if TYPE_CHECKING:
    from edge_agent.text.tokenizer import TextTokenizer


class Activity:
    """Adds up what the neurons of each layer give, while texts go through a model."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Raises CheckpointError for layers whose neurons are not known."""
        self._layers = layers
        self._mlps = [find_mlp(layer, index) for index, layer in enumerate(layers)]
        self._means = [torch.zeros(mlp.width, dtype=torch.float64) for mlp in self._mlps]
        self.texts = 0

    @contextmanager
    def of_text(self) -> Iterator[None]:
        """What goes through the model meanwhile is one text."""
        sums = [torch.zeros_like(mean) for mean in self._means]
        tokens = [0] * len(sums)

        def note(index: int, given: Tensor) -> None:
            rows = given.detach().reshape(-1, given.shape[-1])
            sums[index] += rows.abs().sum(0, dtype=torch.float64).cpu()
            tokens[index] += len(rows)

        hooks = [
            mlp.out(layer).register_forward_pre_hook(
                lambda _, arguments, index=index: note(index, arguments[0])
            )
            for index, (mlp, layer) in enumerate(zip(self._mlps, self._layers, strict=True))
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.texts += 1
        for mean, total, count in zip(self._means, sums, tokens, strict=True):
            mean += (total / count - mean) / self.texts

    def lists(self, name: str, about: str) -> NeuronLists:
        """The most active neurons of each layer first; of equal ones that of the lower number."""
        orders = [torch.argsort(mean, descending=True, stable=True) for mean in self._means]
        mass = [mean[order].tolist() for mean, order in zip(self._means, orders, strict=True)]
        return NeuronLists(name, [order.numpy() for order in orders], mass, about)


def load_whole(directory: Path) -> tuple[Any, Sequence[nn.Module]]:
    """A whole model in float32, and its layers. Raises CheckpointError for what cannot be cut."""
    from transformers import AutoModelForCausalLM

    read_config(Checkpoint(directory))
    model: Any = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, trust_remote_code=False
    ).eval()
    decoder, name = find_decoder(model, model.config.num_hidden_layers)
    return model, list(getattr(decoder, name))


@torch.inference_mode()
def profile_texts(
    model: Any, activity: Activity, texts: Iterable[Sequence[int]], new_tokens: int
) -> None:
    """Run texts, and let the model go on with each by the likeliest tokens, which count too."""
    for ids in texts:
        prompt = torch.tensor([list(ids)])
        with activity.of_text():
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens,
                do_sample=False,
            )  # fmt: skip


def draw_lists(layers: Sequence[nn.Module], seed: int, name: str) -> NeuronLists:
    """All neurons of each layer in a random order. Raises CheckpointError."""
    generator = np.random.default_rng(seed)
    widths = [find_mlp(layer, index).width for index, layer in enumerate(layers)]
    return NeuronLists(
        name, [generator.permutation(width) for width in widths], about=f"random, seed {seed}"
    )


def split_texts(
    path: Path, tokenizer: TextTokenizer, documents: bool, window: int, most_tokens: int
) -> list[list[int]]:
    """Token ids of the documents of a file, or of pieces of it; none is longer than `window`.

    Raises SettingsError for a file that has none.
    """
    text = read_text(path, "--text")
    parts = text.split("\n\n") if documents else [text]
    texts, left = [], most_tokens
    for part in filter(str.strip, parts):
        ids = tokenizer.encode(part.strip())[:left]
        left -= len(ids)
        texts += cut_windows(ids, window)
    if not texts:
        raise SettingsError(f"--text {path} has no tokens")
    return texts
