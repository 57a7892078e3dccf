"""Build a checkpoint's whole model without values, and find out what runs around its layers.

Whatever asks what a part of a model is made of, to load it, to measure it or to name its tensors,
begins here, so the beginning and the end of a model are the same for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.errors import CheckpointError
from common.spans.passage import Rehearsal, outside, rehearse
from common.weights.buffers import fill_buffers
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.shapes import build_without_values
from common.weights.tensors import WeightMap


@dataclass(frozen=True, slots=True)
class WholeModel:
    """A causal language model on the meta device; its buffers outside the layers have values."""

    causal_lm: Any
    owner: nn.Module  # of the list of layers
    layers: nn.ModuleList
    prefix: str  # the list's name within the model
    weights: WeightMap
    rehearsal: Rehearsal


def build_whole_model(
    checkpoint: Checkpoint, dtype: torch.dtype, *, checks_tensors: bool
) -> WholeModel:
    """Build and rehearse it; no tensor is read.

    Raises CheckpointError for a model that cannot be cut, and, where `checks_tensors`, for one that
    lacks a tensor of any part.
    """
    config = read_config(checkpoint)
    causal_lm = build_on_meta(checkpoint, config, dtype)
    owner, name = find_decoder(causal_lm, config.num_hidden_layers)
    layers = getattr(owner, name)
    if causal_lm.get_input_embeddings() is None:
        raise CheckpointError(f"{config.model_type} models have no input embedding to keep")
    causal_lm.eval()
    weights = WeightMap(checkpoint, causal_lm)
    if checks_tensors:
        weights.check(causal_lm)
    fill_buffers(causal_lm, outside(causal_lm, layers), "cpu", leave_unknown=True)
    prefix = next(name for name, module in causal_lm.named_modules() if module is layers)
    return WholeModel(causal_lm, owner, layers, prefix, weights, rehearse(causal_lm, layers))


def build_on_meta(checkpoint: Checkpoint, config: Any, dtype: torch.dtype) -> Any:
    """The whole model without values. Raises CheckpointError where the library has none."""
    try:
        return build_without_values(
            lambda: AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        )
    except (ValueError, KeyError, ImportError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: no causal language model can be built for model type "
            f"{config.model_type!r}: {str(error).splitlines()[0]}"
        ) from error


def find_decoder(causal_lm: Any, num_layers: int) -> tuple[nn.Module, str]:
    """The module that owns the list of decoder layers, and the list's name in it."""
    for module in causal_lm.base_model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == num_layers:
                return module, name
    raise CheckpointError(f"{type(causal_lm).__name__} has no list of {num_layers} decoder layers")
