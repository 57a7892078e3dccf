"""Small models of random weights of any family, saved as Hugging Face directories.

A model of texts alone is written by the guard's own code. One of texts and pictures is made of the
library's example: its parts are narrowed one by one, and the whole model is what its language model
is compared with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from common.errors import CheckpointError
from common.spans.twin_check import save_random, write_twin
from common.spans.twin_config import keep_layers, layers_name, narrow
from common.weights.configuration import WITH_TEXT_PARTS

LAYERS = 4  # at least
# what examples of the library leave to the checkpoint
LEFT_OUT = {
    "head_dim": 16, "num_key_value_heads": 2, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2,
}  # fmt: skip
# where the library's example lacks a kind of layer that its models have
WITH_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": LAYERS}
WITH_STATES = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "num_hidden_layers": LAYERS,
}
PLAIN_LAYERS = {"hidden_size_per_layer_input": 0}  # as the larger Gemma 4 have
EXAMPLES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3], "num_hidden_layers": LAYERS},
    "gemma4": {"text_config": PLAIN_LAYERS},
    "gemma4_text": PLAIN_LAYERS,
    "granitemoehybrid": WITH_STATES,
    "lfm2": WITH_CONVOLUTIONS,
    "lfm2_moe": WITH_CONVOLUTIONS,
}
NOTES = dict.fromkeys(("gemma4", "gemma4_text"), "those with embeddings in each layer are refused")
# of no text, for a model may put something else in their place
PICTURE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def write_small(family: str, directory: Path) -> Any:
    """Save a small model of a family, and return it.

    Raises CheckpointError, or whatever the library does, where none can be made.
    """
    config = AutoConfig.for_model(family, **EXAMPLES.get(family, {}))
    if getattr(config, "is_encoder_decoder", False):
        raise CheckpointError("it has an encoder that its decoder needs")
    text = config.get_text_config()
    _complete(text)
    if family in WITH_TEXT_PARTS and family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return _write_with_pictures(config, directory)
    if getattr(text, "num_hidden_layers", LAYERS) < LAYERS:
        text = AutoConfig.for_model(family, num_hidden_layers=LAYERS).get_text_config()
        _complete(text)
    return write_twin(text, directory)


def _complete(text: Any) -> None:
    if hasattr(text, "is_decoder"):
        text.is_decoder = True  # encoders that may be decoders
    for name, value in LEFT_OUT.items():
        if name in text.__dict__ and text.__dict__[name] is None:
            setattr(text, name, value)


def _write_with_pictures(config: Any, directory: Path) -> Any:
    values = {k: v for k, v in config.to_dict().items() if k not in ("dtype", "architectures")}
    for name, part in vars(config).items():
        if hasattr(part, "to_dict") and hasattr(part, "num_hidden_layers"):
            values[name] = _narrow_part(part)
    values |= {name: 0 for name in PICTURE_TOKENS if name in values}
    (directory / "config.json").write_text(json.dumps(values))
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    return save_random(model, directory)


def _narrow_part(part: Any) -> dict[str, Any]:
    values, name = narrow(part), layers_name(part)
    few = list(range(min(LAYERS, values[name])))
    return keep_layers(values, name, few) | {"model_type": part.model_type}
