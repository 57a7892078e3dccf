"""Weights that are published as codes beside their scales, and read as the numbers they stand for.

Two forms, those that transformers itself turns into numbers where no kernels for them are:

- `fp8`: float8 values and a float32 scale for each block of rows and columns, or one for all
  (DeepSeek V3, Qwen3 FP8). X.weight beside X.weight_scale_inv.
- `mxfp4`: four-bit floats, two to a byte, and a power of two for each 32 of them (gpt-oss).
  X_blocks beside X_scales, the experts of a layer together.

What activations are rounded to, which such models do on some GPUs, is left out: products are those
of the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from common.errors import CheckpointError

FP8_SCALE = "_scale_inv"
MXFP4_BLOCKS, MXFP4_SCALES = "_blocks", "_scales"
# what the four bits mean, the last bit of the exponent's field lowest
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS = 127
METHODS = ("fp8", "mxfp4")
Shapes = Callable[[str], tuple[int, ...]]
Read = Callable[[str], Tensor]


class Packed(Protocol):
    """One weight that is made of several stored tensors."""

    @property
    def stored(self) -> list[str]: ...

    def shape(self, shapes: Shapes) -> tuple[int, ...]: ...

    def unpack(self, read: Read) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Fp8:
    """Values times the scale of their block; `block` is None where one scale is for all."""

    weight: str
    block: tuple[int, int] | None

    @property
    def stored(self) -> list[str]:
        return [self.weight, self.weight + FP8_SCALE]

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        return shapes(self.weight)

    def unpack(self, read: Read) -> Tensor:
        """Float32 (out, in). Raises CheckpointError for scales of another shape."""
        values, scales = (read(name).float() for name in self.stored)
        if self.block is None or scales.numel() == 1:
            self._check(scales, (), scales.numel() == 1)
            return values * scales.reshape(())
        rows, columns = self.block
        wanted = (-(-values.shape[0] // rows), -(-values.shape[1] // columns))
        self._check(scales, wanted, tuple(scales.shape) == wanted)
        wide = scales.repeat_interleave(rows, 0)[: values.shape[0]]
        return values * wide.repeat_interleave(columns, 1)[:, : values.shape[1]]

    def _check(self, scales: Tensor, wanted: tuple[int, ...], fits: bool) -> None:
        if not fits:
            raise CheckpointError(
                f"tensor {self.weight}{FP8_SCALE} has shape {tuple(scales.shape)}; its blocks of "
                f"{self.block} need {wanted}"
            )


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """The experts' weights of a layer: (E, in, out) from codes (E, out, in / 32, 16)."""

    name: str

    @property
    def stored(self) -> list[str]:
        return [self.name + MXFP4_BLOCKS, self.name + MXFP4_SCALES]

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        experts, out, groups, half = shapes(self.stored[0])
        return experts, groups * half * 2, out

    def unpack(self, read: Read) -> Tensor:
        """Float32 (E, in, out). Raises CheckpointError for scales of another shape."""
        blocks, scales = map(read, self.stored)
        if blocks.dtype != torch.uint8 or scales.shape != blocks.shape[:3]:
            raise CheckpointError(
                f"tensor {self.stored[1]} has shape {tuple(scales.shape)}; "
                f"{self.stored[0]} {tuple(blocks.shape)} needs {tuple(blocks.shape[:3])} bytes"
            )
        table = torch.tensor(FP4)
        pairs = torch.stack([table[(blocks & 15).long()], table[(blocks >> 4).long()]], dim=-1)
        values = torch.ldexp(pairs.flatten(3), scales[..., None].int() - SCALE_BIAS)
        return values.flatten(2).transpose(1, 2).contiguous()


def method_of(config_json: Mapping[str, Any]) -> str:
    """What a configuration says its weights are quantized by; empty if they are not."""
    said = config_json.get("quantization_config")
    return str(said.get("quant_method", "unnamed"))[:60] if isinstance(said, dict) else ""


def find_packed(config_json: Mapping[str, Any], stored: Iterable[str]) -> dict[str, Packed]:
    """The weights that `stored` tensors are the parts of, by name. Raises CheckpointError."""
    method, names = method_of(config_json), set(stored)
    if method == "fp8":
        block = _read_block(config_json["quantization_config"])
        weights = (name.removesuffix(FP8_SCALE) for name in names if name.endswith(FP8_SCALE))
        return {name: Fp8(name, block) for name in weights if name in names}
    if method == "mxfp4":
        weights = (name.removesuffix(MXFP4_BLOCKS) for name in names if name.endswith(MXFP4_BLOCKS))
        return {name: Mxfp4(name) for name in weights if name + MXFP4_SCALES in names}
    return {}


def _read_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    block = settings.get("weight_block_size")
    if block is None:
        return None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(isinstance(size, int) and 0 < size < 1 << 20 for size in block)
    ):
        raise CheckpointError(
            f"config.json gives weight_block_size as {str(block)[:40]}; expected two numbers, as "
            "[128, 128]"
        )
    return block[0], block[1]
