"""Boundary codecs: what a row of hidden states becomes on the wire.

Every codec works row by row with a fixed number of bytes per row, so a row's bytes never depend
on its neighbours, a log of encoded rows can be cut anywhere, and a body's size can be checked
before it is decoded. Values that a codec cannot hold (NaN, infinities, float16 overflow) are
refused by name, never sent.

Letters: T tokens (rows), D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import NonFiniteError, ProtocolError, SettingsError

DEFAULT_CODEC = "int8"
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Codec:
    """A named pair of functions between rows (T, D) of any float dtype and uint8 (T, row bytes)."""

    name: str
    row_bytes: Callable[[int], int]  # hidden -> bytes of one row
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]  # (bytes (T, row bytes), hidden) -> (T, D)

    def encode(self, rows: Tensor) -> bytes:
        """Encode rows, shape (T, D). Raises NonFiniteError if a value has no code."""
        if rows.device.type != "cpu":
            rows = rows.cpu()
        packed = self.pack(rows)
        return packed.numpy().tobytes()

    def decode(self, body: bytes, rows: int, hidden: int, dtype: torch.dtype) -> Tensor:
        """Decode a body into (rows, hidden). Raises ProtocolError if its size is not that."""
        want = rows * self.row_bytes(hidden)
        if len(body) != want:
            raise ProtocolError(
                f"body has {len(body)} bytes; {self.name} ({rows}, {hidden}) needs {want}"
            )
        if rows == 0:
            return torch.empty(0, hidden, dtype=dtype)
        packed = torch.frombuffer(bytearray(body), dtype=torch.uint8).view(rows, -1)
        return self.unpack(packed, hidden).to(dtype)


def find_codec(name: str) -> Codec:
    """The codec of that name. Raises SettingsError, which lists the known ones."""
    codec = CODECS.get(name)
    if codec is None:
        raise SettingsError(f"codec {name!r} is unknown; known are {', '.join(CODECS)}")
    return codec


def _require_finite(rows: Tensor, name: str, original: Tensor) -> None:
    if not _is_finite(rows):
        if _is_finite(original):
            largest = original.abs().max().item()
            raise NonFiniteError(f"{name} cannot hold {largest:.4g}, the largest boundary value")
        raise NonFiniteError(f"boundary rows to be sent as {name} hold NaN or infinity")


def _require_finite_body(values: Tensor, name: str) -> None:
    if not _is_finite(values):
        raise NonFiniteError(f"a {name} body decodes to NaN or infinity")


def _is_finite(values: Tensor) -> bool:
    """In one pass: a float64 sum of finite float32 values is finite, and only of those."""
    return math.isfinite(values.sum(dtype=torch.float64).item())


def _cast_codec(name: str, dtype: torch.dtype) -> Codec:
    """The rows themselves, rounded to `dtype`: exact when they have that dtype already."""

    def pack(rows: Tensor) -> Tensor:
        cast = rows.to(dtype).contiguous()
        _require_finite(cast, name, rows)
        return cast.view(torch.uint8)

    def unpack(packed: Tensor, hidden: int) -> Tensor:
        rows = packed.view(dtype)
        _require_finite_body(rows, name)
        return rows

    return Codec(name, lambda hidden: hidden * dtype.itemsize, pack, unpack)


def _pack_int8(rows: Tensor) -> Tensor:
    """Symmetric, one float32 scale per token: scale = max|row| / 127, code = round(row / scale).

    The error of a value is at most half a scale. A row of zeros has scale 0 and codes 0. Each row
    on the wire: 4 bytes of scale (little-endian), then D bytes of codes.
    """
    values = rows.float()
    scales = torch.linalg.vector_norm(values, torch.inf, dim=1, keepdim=True).div_(127)  # (T, 1)
    _require_finite(scales, "int8", rows)
    codes = (values / scales.clamp_min(SMALLEST_SCALE)).round_().to(torch.int8)  # (T, D)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=1)


def _unpack_int8(packed: Tensor, hidden: int) -> Tensor:
    scale_bytes = packed[:, :4].clone(memory_format=torch.contiguous_format)
    scales = scale_bytes.view(torch.float32)  # (T, 1)
    _require_finite_body(scales, "int8")
    return packed[:, 4:].view(torch.int8).float().mul_(scales)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        _cast_codec("fp32", torch.float32),
        _cast_codec("fp16", torch.float16),
        _cast_codec("bf16", torch.bfloat16),
        Codec("int8", lambda hidden: hidden + 4, _pack_int8, _unpack_int8),
    )
}
