"""Read the weights of one layer, again and again, into memory that is there for them.

Tensors that are stored as the layer has them are read straight from the file. Those that
the library puts together of several, or an adapter changes, are made anew each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.weights.checkpoint import round_up
from common.weights.direct_reader import DirectReader
from common.weights.safetensors_places import Place
from common.weights.tensors import WeightMap


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter of a layer, in the memory of a layer."""

    name: str  # in the layer
    shape: tuple[int, ...]
    at: int
    size: int
    place: Place | None  # None: it is made


class LayerReader:
    """Knows where a layer's parameters come from. Made while they are on the meta device."""

    def __init__(
        self,
        weights: WeightMap,
        files: DirectReader,
        layer: nn.Module,
        prefix: str,
        dtype: torch.dtype,
    ) -> None:
        """`prefix` is the layer's name in the model. Raises CheckpointError."""
        self._weights = weights
        self._dtype = dtype
        self._prefix = prefix
        self._pieces: list[Piece] = []
        self._files = files
        at = 0
        for name, parameter in layer.named_parameters(remove_duplicate=False):
            size = parameter.numel() * dtype.itemsize
            place = weights.place(prefix + name, tuple(parameter.shape))
            self._pieces.append(Piece(name, tuple(parameter.shape), at, size, place))
            at += round_up(size)
        self.size = at  # bytes

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The layer's parameters within `memory`, at least `size` bytes, by name."""
        return {
            piece.name: memory[piece.at : piece.at + piece.size].view(self._dtype).view(piece.shape)
            for piece in self._pieces
        }

    def read_into(self, memory: Tensor) -> None:
        """Fill `memory` on the CPU with the layer's parameters. Raises CheckpointError."""
        parts = [
            (memory[piece.at : piece.at + piece.size], piece.place)
            for piece in self._pieces
            if piece.place is not None
        ]
        self._files.read_into((part, p) for part, p in parts if p.dtype == self._dtype)
        for part, place in parts:
            if place.dtype != self._dtype:
                self._convert_into(part, place)
        made = [piece for piece in self._pieces if piece.place is None]
        if made:
            views = self.views(memory)
            tensors = self._weights.make(
                {self._prefix + p.name: p.shape for p in made}, self._dtype
            )
            for piece in made:
                views[piece.name].copy_(tensors[self._prefix + piece.name])

    def _convert_into(self, memory: Tensor, place: Place) -> None:
        stored = torch.empty(place.size, dtype=torch.uint8)
        self._files.read_into([(stored, place)])
        memory.view(self._dtype).copy_(stored.view(place.dtype))
