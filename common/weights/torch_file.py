"""A .bin or .pth file of weights, with the methods of an open safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, why_unreadable

DTYPE_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class TorchFile:
    """Mapped into memory where torch can. Raises CheckpointError if it holds more than tensors."""

    def __init__(self, path: Path) -> None:
        loaded = self._load(path)
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected named tensors")
        self._tensors = {k: v for k, v in loaded.items() if isinstance(v, Tensor)}

    @staticmethod
    def _load(path: Path) -> Any:
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        try:
            try:
                return torch.load(path, mmap=True, **options)
            except RuntimeError:  # the format from before zip files cannot be mapped
                return torch.load(path, **options)
        except Exception as error:  # of many classes, none of which is part of torch's interface
            raise CheckpointError(
                f"{path} cannot be read as weights only: {_why(error)}"
            ) from error

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> TorchSlice:
        return TorchSlice(self._tensors[name])


class TorchSlice:
    """What safetensors calls a slice: a tensor that is read in parts."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return DTYPE_NAMES.get(self._tensor.dtype, str(self._tensor.dtype))

    def __getitem__(self, key: Any) -> Tensor:
        return self._tensor[key]


def _why(error: Exception) -> str:
    """What is wrong with a file; not torch's advice to run what stands in it nevertheless."""
    if type(error).__name__ != "UnpicklingError":
        return why_unreadable(error)
    return "torch.save has not written it, or more into it than tensors"
