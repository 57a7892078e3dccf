"""Which stored tensors each part of a model needs, and in which part's file each belongs.

The model is built without values and rehearsed, as it is when a part of it is loaded, so what
counts as its beginning and its end is the same here and there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.spans.parts import BEGIN_FILE, END_FILE, name_layer
from common.spans.passage import outside, weighted_modules
from common.weights.checkpoint import Checkpoint
from common.weights.manifest import REST
from common.weights.tensors import WeightMap
from common.weights.whole_model import build_whole_model


@dataclass(frozen=True, slots=True)
class PartTensors:
    """Of a model of `layers` layers: what each part needs, by the name of its file."""

    layers: int
    needed: dict[str, list[str]]

    def home(self, tensor_names: Iterable[str]) -> dict[str, str]:
        """The one file for each tensor: of the first part that needs it, `rest` if none does."""
        homes = dict.fromkeys(tensor_names, REST)
        for part in reversed(self.needed):
            homes.update(dict.fromkeys(self.needed[part], part))
        return homes

    def files_for(self, parts: Iterable[str], homes: dict[str, str]) -> list[str]:
        """The files that these parts read: the end of a tied model needs the beginning's too."""
        wanted = set(parts) | {homes[name] for part in parts for name in self.needed[part]}
        return [part for part in self.needed if part in wanted]


def find_part_tensors(checkpoint: Checkpoint) -> PartTensors:
    """Raises CheckpointError for a model that cannot be cut, or lacks a tensor."""
    whole = build_whole_model(checkpoint, torch.float32, checks_tensors=True)
    causal_lm, layers, weights = whole.causal_lm, whole.layers, whole.weights
    before, after = whole.rehearsal.before, whole.rehearsal.after
    common = _stored_of_all(weights, causal_lm, layers)
    needed = {BEGIN_FILE: common + _stored_outside(weights, causal_lm, layers, before)}
    for index, layer in enumerate(layers):
        own = _stored_within(weights, layer, f"{whole.prefix}.{index}.")
        needed[name_layer(index)] = common + own
    needed[END_FILE] = common + _stored_outside(weights, causal_lm, layers, after)
    return PartTensors(len(layers), {p: list(dict.fromkeys(n)) for p, n in needed.items()})


def _stored_within(weights: WeightMap, module: nn.Module, prefix: str) -> list[str]:
    """What a module with all that is in it is made of."""
    names = [prefix + name for name, _ in module.named_parameters(remove_duplicate=False)]
    stored = [tensor for name in names for tensor in weights.list_stored(name)]
    return stored + weights.list_stored_buffers(module, prefix)


def _stored_outside(
    weights: WeightMap, causal_lm: Any, layers: nn.ModuleList, kept: frozenset[str]
) -> list[str]:
    """What the modules of these names, outside the layers, are made of."""
    modules = [(n, m) for n, m in weighted_modules(causal_lm, layers) if n in kept]
    return [t for name, module in modules for t in _stored_within(weights, module, f"{name}.")]


def _stored_of_all(weights: WeightMap, causal_lm: Any, layers: nn.ModuleList) -> list[str]:
    """Stored buffers of modules outside the layers that have no weights: every part keeps those."""
    weighted = {name for name, _ in weighted_modules(causal_lm, layers)}
    return [
        tensor
        for name, module in outside(causal_lm, layers)
        if name not in weighted and not any(True for _ in module.children())
        for tensor in weights.list_stored_buffers(module, f"{name}." if name else "")
    ]
