"""What is added to a checkpoint's tensors while they are read: W + scale B A, or another W.

Merged so, an adapter costs nothing in a step, and a part holds the changes of its own tensors only.
An adapter is part of what a model is, so its digest goes into the model's fingerprint: edge and
workers have the same ones or do not meet.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LowRank:
    """A change of rank r: `up` (out, r) times `down` (r, in), or convolutions' four dimensions."""

    down: Tensor
    up: Tensor
    scale: float
    is_transposed: bool = False  # the weight is stored as (in, out)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it changes."""
        out, inner = self.up.shape[0], tuple(self.down.shape[1:])
        return (*inner, out) if self.is_transposed else (out, *inner)

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight, float32."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        if self.is_transposed:
            product = product.T
        return weight.float() + self.scale * product.view(weight.shape)

    def digest(self) -> bytes:
        kind = f"low rank {self.is_transposed}".encode() + struct.pack("<d", self.scale)
        return _digest(kind, self.down, self.up)


@dataclass(frozen=True, slots=True)
class Replacement:
    """Another tensor in a stored one's place: trained as a whole."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def apply(self, weight: Tensor) -> Tensor:
        """The tensor, float32."""
        return self.tensor.float()

    def digest(self) -> bytes:
        return _digest(b"replacement", self.tensor)


Change = LowRank | Replacement


class Adapter:
    """Changes by the names of stored tensors, applied in their order."""

    def __init__(self, changes: Mapping[str, Sequence[Change]]) -> None:
        self._changes = {name: list(changes[name]) for name in sorted(changes)}

    @property
    def names(self) -> list[str]:
        return list(self._changes)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise CheckpointError unless the changes of a tensor have its shape."""
        for change in self._changes[name]:
            if _without_ones(change.shape) != _without_ones(shape):
                raise CheckpointError(
                    f"the adapter changes a {name} of shape {list(change.shape)}; the checkpoint "
                    f"has one of {list(shape)}"
                )

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """A stored tensor as it shall be: float32 if it is changed, else as it is."""
        for change in self._changes.get(name, ()):
            tensor = change.apply(tensor)
        return tensor

    def digest(self) -> str:
        """Differs when what is changed does, and not with names or kinds of files."""
        digest = hashlib.sha256()
        for name, changes in self._changes.items():
            digest.update(name.encode())
            for change in changes:
                digest.update(change.digest())
        return digest.hexdigest()

    def join(self, other: Adapter) -> Adapter:
        """Both, one after the other."""
        both = {name: list(changes) for name, changes in self._changes.items()}
        for name, changes in other._changes.items():
            both.setdefault(name, []).extend(changes)
        return Adapter(both)


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A convolution of one pixel is a matrix."""
    while shape[-1:] == (1,):
        shape = shape[:-1]
    return shape


def _digest(kind: bytes, *tensors: Tensor) -> bytes:
    digest = hashlib.sha256(kind)
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()
