"""Read a checkpoint's configuration, and refuse by name what cannot be cut."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from common.errors import CheckpointError, in_one_line
from common.spans.span_model import FORGETFUL_LAYERS, STATE_LAYERS
from common.weights.checkpoint import Checkpoint
from common.weights.packed import METHODS, method_of

LAYER_COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}
# models of texts and pictures whose text, without any picture, is that of their language model
WITH_TEXT_PARTS = {
    "aria", "deepseek_vl", "fuyu", "gemma3", "gemma4", "gemma4_unified", "got_ocr2", "idefics3",
    "internvl", "lighton_ocr", "llama4", "llava", "llava_next", "llava_next_video",
    "llava_onevision", "mistral3", "ovis2", "smolvlm", "vipllava",
}  # fmt: skip
KNOWN_LAYERS = {
    "full_attention", "sliding_attention", "chunked_attention", *STATE_LAYERS, *FORGETFUL_LAYERS
}  # fmt: skip
CHANGING_ROPES = ("longrope", "dynamic")
MAX_LAYERS = 1024  # eight times what the deepest models have


def read_config(checkpoint: Checkpoint) -> Any:
    """The model's transformers configuration. Raises CheckpointError for what cannot be cut."""
    _check_layer_counts(checkpoint, checkpoint.config_json)
    try:
        config = AutoConfig.from_pretrained(
            checkpoint.directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever a foreign class raises for values of wrong types
        kind = str(checkpoint.config_json.get("model_type"))[:100]
        raise CheckpointError(
            f"{checkpoint.directory}: transformers cannot read model type {kind!r}: "
            f"{in_one_line(error)}"
        ) from error
    _refuse_quantized(checkpoint, config)
    config = _find_text_part(config)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_hidden_layers"):
        raise CheckpointError(
            f"{checkpoint.directory} holds a {config.model_type} model; "
            "midspan cuts decoder-only language models"
        )
    _refuse_unknown_layers(checkpoint, config)
    if getattr(config, "hidden_size_per_layer_input", None):
        raise CheckpointError(
            f"{checkpoint.directory}: {config.model_type} models that give each layer embeddings "
            "of the tokens cannot be cut, for the workers have no tokens"
        )
    return config


def _refuse_quantized(checkpoint: Checkpoint, config: Any) -> None:
    """By the name of the method: who reads it knows which other release of a model to take."""
    if not getattr(config, "quantization_config", None):
        return
    method = method_of(checkpoint.config_json) or "unnamed"
    if method not in METHODS:
        raise CheckpointError(
            f"{checkpoint.directory} holds quantized weights (quant_method {method!r}); midspan "
            f"reads plain ones, {' and '.join(METHODS)}"
        )
    del config.quantization_config  # the model is of plain layers: weights come as numbers


def _find_text_part(config: Any) -> Any:
    """Of a model of texts and pictures its language model, where that is one by itself."""
    if config.model_type not in WITH_TEXT_PARTS:
        return config
    text = config.get_text_config()
    text.tie_word_embeddings = bool(
        getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False)
    )
    return text


def _check_layer_counts(checkpoint: Checkpoint, values: dict[str, Any]) -> None:
    """Raise CheckpointError for a number of layers that a configuration would spend hours on."""
    for name, value in values.items():
        if isinstance(value, dict):
            _check_layer_counts(checkpoint, value)
        elif name in LAYER_COUNTS and (type(value) is not int or not 0 < value <= MAX_LAYERS):
            raise CheckpointError(
                f"{checkpoint.directory}: config.json gives {name} as {str(value)[:40]}; "
                f"expected 1 to {MAX_LAYERS}"
            )


def _refuse_unknown_layers(checkpoint: Checkpoint, config: Any) -> None:
    """Raise CheckpointError for layers that keep something else of a text than we know."""
    foreign = _layer_types(config) - KNOWN_LAYERS
    if foreign:
        raise CheckpointError(
            f"{checkpoint.directory}: {config.model_type} models with {', '.join(sorted(foreign))} "
            "layers cannot be cut yet"
        )


def _layer_types(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def context_length(config: Any) -> int | None:
    """How many tokens the model may be given, or None if its configuration does not say.

    Frequencies of the rope types `longrope` and `dynamic` change when a text becomes longer than a
    length that they name, and with them what was computed before: such texts end there.
    """
    lengths = [getattr(config, "max_position_embeddings", None)]
    for rope in _ropes(config):
        if rope.get("rope_type") in CHANGING_ROPES:
            lengths.append(rope.get("original_max_position_embeddings"))
    return min((length for length in lengths if isinstance(length, int)), default=None)


def _ropes(config: Any) -> list[dict[str, Any]]:
    """Rope parameters: of all layers, or by their type."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [r for r in (rope, *rope.values()) if isinstance(r, dict)]
