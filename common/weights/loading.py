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

from typing import Any, Literal

import torch
from torch import nn

from common.errors import SettingsError
from common.neurons.span_neurons import put_neurons
from common.spans.cut import Span
from common.spans.layer_stream import LayerStream, choose_streamed
from common.spans.passage import forget_parameters, make_part, takes
from common.spans.span_model import SpanModel
from common.weights.buffers import fill_buffers, move_buffers
from common.weights.checkpoint import Checkpoint, allocate
from common.weights.direct_reader import DirectReader
from common.weights.int8 import pack_linears
from common.weights.layer_reader import LayerReader
from common.weights.tensors import WeightMap
from common.weights.whole_model import build_whole_model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Part = Literal["head", "middle", "tail"]


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
    if in_8_bits and (resident is not None or checkpoint.neurons is not None):
        raise SettingsError("--weights int8 cannot be combined with --stream-layers or --neurons")
    if resident is not None and checkpoint.neurons is not None:
        raise SettingsError("--stream-layers and --neurons cannot be combined")
    whole = build_whole_model(checkpoint, dtype, checks_tensors=False)
    causal_lm, layers, weights = whole.causal_lm, whole.layers, whole.weights
    if checkpoint.neurons is not None:
        checkpoint.neurons.check_layers(len(layers))
    gate = make_part(causal_lm, layers, span, part, whole.rehearsal, device)
    stream, neurons = None, None
    if checkpoint.neurons is not None:
        neurons = put_neurons(
            checkpoint.neurons, checkpoint, weights, layers, whole.prefix, span, dtype, device,
            allocate,
        )  # fmt: skip
    if resident is not None:
        stream = stream_layers(weights.apart(), layers, whole.prefix, span, resident, dtype, device)
    bytes_read = {}
    if in_8_bits:
        bytes_read = fill_in_8_bits(weights, layers, whole.prefix, span, dtype, device)
    bytes_read |= weights.fill(causal_lm, "", dtype, device)
    if neurons is not None:
        bytes_read |= neurons.bytes_read
    fill_buffers(causal_lm, causal_lm.named_modules(), device)
    move_buffers(causal_lm, device)
    return SpanModel(
        causal_lm if part == "tail" else _taker_of_tokens(causal_lm, whole.owner),
        causal_lm,
        gate,
        span,
        part,
        dtype=dtype,
        device=device,
        packs=packs,
        bytes_read=bytes_read,
        stream=stream,
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
) -> LayerStream | None:
    """Let those of a span's layers that `choose_streamed` names take turns in memory."""
    streamed = [span.first + index for index in choose_streamed(len(span), resident)]
    files = DirectReader()
    readers = {i: LayerReader(weights, files, layers[i], f"{prefix}.{i}.", dtype) for i in streamed}
    if not readers:
        return None
    stream = LayerStream(readers, device, allocate)
    for index in streamed:
        for module in layers[index].modules():
            forget_parameters(module, device)
        stream.put_around(index, layers[index])
    return stream


def _taker_of_tokens(causal_lm: Any, owner: nn.Module) -> nn.Module:
    """The innermost module around the layers that a model hands its tokens to."""
    found: nn.Module = causal_lm
    for module in causal_lm.modules():
        if any(m is owner for m in module.modules()) and takes(module, "input_ids"):
            found = module
    return found
