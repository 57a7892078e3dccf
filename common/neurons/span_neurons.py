"""Put matrices of some neurons in the place of whole ones, layer by layer, while a part is loaded.

What is left out is not read, or dropped as it is read, so neither a part's memory nor the most that
loading takes has room for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.neurons.choice import LayerChoice, NeuronChoice
from common.neurons.matrices import Mlp, find_mlp
from common.neurons.passing import NeuronPass, Passing, Rows
from common.neurons.sparse_mlp import LayerNeurons, LoadedInto, LoadedOut
from common.spans.cut import Span
from common.spans.states import NEURONS, StateName, StatePass, States
from common.weights.checkpoint import Checkpoint, round_up
from common.weights.matrix_reader import MatrixReader
from common.weights.tensors import WeightMap


class SpanNeurons:
    """The layers of a span that have some of their neurons."""

    def __init__(self) -> None:
        self.layers: list[LayerNeurons] = []
        self.bytes_read: dict[str, int] = {}
        self.bytes_left_out = 0
        self.passing = Passing()

    def begin(
        self, segments: Sequence[Rows], states: Sequence[States | None], passes: Sequence[StatePass]
    ) -> None:
        """A batch is on its way in this thread."""
        self.passing.batch = NeuronPass(segments, states, passes)

    def end(self) -> None:
        """It has gone through: nothing of it is held."""
        self.passing.batch = None

    def no_votes(self) -> dict[StateName, Tensor]:
        """What a session has at its beginning, where sessions have cores."""
        return {(layer.layer, NEURONS, 0): layer.no_votes() for layer in self.layers if layer.core}


def put_neurons(
    choice: NeuronChoice,
    checkpoint: Checkpoint,
    weights: WeightMap,
    layers: nn.ModuleList,
    prefix: str,
    span: Span,
    dtype: torch.dtype,
    device: torch.device | str,
    allocate: Callable[[int], Tensor],
) -> SpanNeurons | None:
    """Replace the matrices of a span's layers that a choice covers; None if it covers none.

    `prefix` is what the layers are called in the model. Raises CheckpointError, SettingsError.
    """
    covered = [index for index in range(span.first, span.last) if choice.covers(index)]
    if not covered:
        return None
    planned = []
    for index in covered:
        mlp = find_mlp(layers[index], index)
        planned.append((index, mlp, choice.of_layer(index, mlp.width)))
    placed = SpanNeurons()
    size = sum(_size(layers[index], mlp, part, dtype) for index, mlp, part in planned)
    reader = _PartReader(checkpoint, weights, dtype, device, allocate(size), placed)
    for index, mlp, part in planned:
        neurons = LayerNeurons(index, part, choice.settings.token_sparsity, placed.passing)
        reader.replace(neurons, part, layers[index], mlp, f"{prefix}.{index}.")
        neurons.to(device)
        placed.layers.append(neurons)
    reader.close()
    return placed


def _size(layer: nn.Module, mlp: Mlp, choice: LayerChoice, dtype: torch.dtype) -> int:
    """Bytes that the loaded neurons of a layer take, each tensor at a round address."""
    matrices = [*mlp.into(layer), mlp.out(layer)]
    tensors = [tensor for matrix in matrices for tensor in (matrix.weight, matrix.bias)]
    return sum(
        round_up(tensor.numel() // mlp.width * len(choice.ranks) * dtype.itemsize)
        for tensor in tensors
        if tensor is not None
    )


class _PartReader:
    """Reads the matrices of one layer after another into one block of memory.

    Each in a block of its own would end within a page of 2 MB.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        weights: WeightMap,
        dtype: torch.dtype,
        device: torch.device | str,
        memory: Tensor,
        placed: SpanNeurons,
    ) -> None:
        self._reader = MatrixReader(checkpoint)
        self._weights = weights
        self._dtype, self._device = dtype, device
        self._memory, self._at = memory, 0
        self._placed = placed

    def close(self) -> None:
        self._reader.close()

    def replace(
        self, neurons: LayerNeurons, choice: LayerChoice, layer: nn.Module, mlp: Mlp, prefix: str
    ) -> None:
        """Raises CheckpointError."""
        for name, matrix in zip(mlp.into_names, mlp.into(layer), strict=True):
            weight = self._read(f"{prefix}{mlp.name(name)}.weight", matrix.weight, choice, 0)
            bias = None
            if matrix.bias is not None:
                bias = self._read(f"{prefix}{mlp.name(name)}.bias", matrix.bias, choice, 0)
            _put(layer, mlp.name(name), LoadedInto(neurons, weight, bias))
        name, out = mlp.name(mlp.out_name), mlp.out(layer)
        weight = self._read(f"{prefix}{name}.weight", out.weight, choice, 1)
        bias = self._read_whole(f"{prefix}{name}.bias", out.bias) if out.bias is not None else None
        _put(layer, name, LoadedOut(neurons, weight, bias))

    def _read(self, name: str, like: Tensor, choice: LayerChoice, axis: int) -> Tensor:
        """The loaded neurons of one tensor, first of its axes; `axis` has them in the file."""
        stored = self._weights.find_plain(name, tuple(like.shape))
        others = [size for at, size in enumerate(like.shape) if at != axis]
        tensor = self._make((len(choice.ranks), *others))
        read = self._reader.read_columns if axis else self._reader.read_rows
        read(stored, choice.loaded, tensor)
        self._placed.bytes_read[stored] = tensor.nbytes
        self._placed.bytes_left_out += like.numel() * self._dtype.itemsize - tensor.nbytes
        return tensor.to(self._device)

    def _read_whole(self, name: str, like: Tensor) -> Tensor:
        stored = self._weights.find_plain(name, tuple(like.shape))
        tensor: Tensor = self._reader.read_whole(stored, self._dtype)
        self._placed.bytes_read[stored] = tensor.nbytes
        return tensor.to(self._device)

    def _make(self, shape: tuple[int, ...]) -> Tensor:
        start, size = self._at, math.prod(shape) * self._dtype.itemsize
        self._at += round_up(size)
        return self._memory[start : start + size].view(self._dtype).view(shape)


def _put(layer: nn.Module, name: str, module: Any) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(layer.get_submodule(owner), leaf, module)
