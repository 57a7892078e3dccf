"""Cut a Hugging Face decoder-only model: load one span of it and run rows through.

A span is the model's own class with its layer list cut short. The head keeps the input embeddings
(and what is added to them), the tail keeps the final norm and the LM head; elsewhere these are
replaced by modules that change nothing. The arithmetic of the layers, rotary embeddings included,
is the library's own code.

The model is built on the meta device and only the tensors of the span are read. Because a model
may do something to its hidden states outside its layers that we do not know of, every part but
the head is checked once: with no layers at all it must return its input unchanged.

Letters: T tokens (rows), D hidden.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common.errors import CheckpointError, SettingsError, in_one_line
from common.neurons.span_neurons import put_neurons
from common.spans.cut import Span
from common.spans.layer_stream import LayerStream, choose_streamed
from common.spans.passage import forget_parameters, make_part, outside, rehearse, takes
from common.spans.span_model import FORGETFUL_LAYERS, STATE_LAYERS, SpanModel
from common.weights.buffers import fill_buffers, move_buffers
from common.weights.checkpoint import Checkpoint, allocate
from common.weights.direct_reader import DirectReader
from common.weights.int8 import pack_linears
from common.weights.layer_reader import LayerReader
from common.weights.packed import METHODS, method_of
from common.weights.shapes import build_without_values
from common.weights.tensors import WeightMap

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Part = Literal["head", "middle", "tail"]
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


def parse_dtype(name: str) -> torch.dtype:
    """float32, float16 or bfloat16. Raises SettingsError."""
    if name not in DTYPES:
        raise SettingsError(f"dtype {name!r} is unknown; known are {', '.join(DTYPES)}")
    return DTYPES[name]


def check_device(name: str) -> torch.device:
    """A torch device that is there. Raises SettingsError."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device {name!r} cannot be used: {reason}") from error
    return device


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


def load_span(
    checkpoint: Checkpoint,
    span: Span,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    part: Part = "middle",
    packs: bool = True,
    resident: int | None = None,
    in_8_bits: bool = False,
) -> SpanModel:
    """Build the layers of `span`, as the head with the embeddings, as the tail with the LM head.

    Sessions go through it together if its attention is one that we know and `packs` allows it. With
    `resident` that many of its layers are in memory at once, and the others are read when their
    turn comes; such a span is run by one thread. The weights of its linear layers are kept as they
    are, in `dtype`, or `in_8_bits`.

    Raises CheckpointError when the model's kind cannot be cut or a tensor is missing, SettingsError
    for too few resident layers.
    """
    config = copy.deepcopy(read_config(checkpoint))
    causal_lm = build_on_meta(checkpoint, config, dtype)
    owner, layers_name = find_decoder(causal_lm, config.num_hidden_layers)
    layers = getattr(owner, layers_name)
    if causal_lm.get_input_embeddings() is None:
        raise CheckpointError(f"{config.model_type} models have no input embedding to keep")
    causal_lm.eval()
    if in_8_bits and (resident is not None or checkpoint.neurons is not None):
        raise SettingsError("--weights int8 cannot be combined with --stream-layers or --neurons")
    weights = WeightMap(checkpoint, causal_lm)
    fill_buffers(causal_lm, outside(causal_lm, layers), "cpu", leave_unknown=True)
    rehearsal = rehearse(causal_lm, layers)
    gate = make_part(causal_lm, layers, span, part, rehearsal, device)
    streamed, neurons = 0, None
    prefix = next(name for name, module in causal_lm.named_modules() if module is layers)
    if checkpoint.neurons is not None:
        checkpoint.neurons.check_layers(config.num_hidden_layers)
        if resident is not None:
            raise SettingsError("--stream-layers and --neurons cannot be combined")
        neurons = put_neurons(
            checkpoint.neurons, checkpoint, weights, layers, prefix, span, dtype, device, allocate
        )
    if resident is not None:
        streamed = stream_layers(weights.apart(), layers, prefix, span, resident, dtype, device)
    bytes_read = {}
    if in_8_bits:
        bytes_read = fill_in_8_bits(weights, layers, prefix, span, dtype, device)
    bytes_read |= weights.fill(causal_lm, "", dtype, device)
    if neurons is not None:
        bytes_read |= neurons.bytes_read
    fill_buffers(causal_lm, causal_lm.named_modules(), device)
    move_buffers(causal_lm, device)
    return SpanModel(
        causal_lm if part == "tail" else _taker_of_tokens(causal_lm, owner),
        causal_lm,
        gate,
        span,
        part,
        dtype=dtype,
        device=device,
        packs=packs,
        bytes_read=bytes_read,
        streamed=streamed,
        neurons=neurons,
    )


def fill_in_8_bits(
    weights: WeightMap,
    layers: nn.ModuleList,
    prefix: str,
    span: Span,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, int]:
    """Fill the layers of a span, one at a time in `dtype`; bytes that were read, by tensor.

    Raises SettingsError for a model without linear layers.
    """
    bytes_read: dict[str, int] = {}
    packed = 0
    for index in range(span.first, span.last):
        bytes_read |= weights.fill(layers[index], f"{prefix}.{index}.", dtype, device)
        packed += pack_linears(layers[index])
        weights.forget()
    if not packed:
        raise SettingsError("the model has no linear layers for --weights int8")
    return bytes_read


def stream_layers(
    weights: WeightMap,
    layers: nn.ModuleList,
    prefix: str,
    span: Span,
    resident: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> int:
    """Let those of a span's layers that `choose_streamed` names take turns in memory: how many."""
    streamed = [span.first + index for index in choose_streamed(len(span), resident)]
    files = DirectReader()
    readers = {i: LayerReader(weights, files, layers[i], f"{prefix}.{i}.", dtype) for i in streamed}
    if not readers:
        return 0
    stream = LayerStream(readers, device, allocate)
    for index in streamed:
        for module in layers[index].modules():
            forget_parameters(module, device)
        stream.put_around(index, layers[index])
    return len(streamed)


def _taker_of_tokens(causal_lm: Any, owner: nn.Module) -> nn.Module:
    """The innermost module around the layers that a model hands its tokens to."""
    found: nn.Module = causal_lm
    for module in causal_lm.modules():
        if any(m is owner for m in module.modules()) and takes(module, "input_ids"):
            found = module
    return found


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
