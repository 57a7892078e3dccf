"""Scaled quantizers: rows of numbers to unsigned codes of up to eight bits, and back.

A scale belongs to a token (a row), to the whole tensor, to a channel (a column) or to a group of G
neighbours in a row. Scales travel as bfloat16, which has the range of float32, rounded up, so that
no value falls beyond the last level; an affine zero point is a whole number of steps.

What is lost, with s the scale that travels and max, min taken over its values:

    intN sym      s = max|x| / (2^(N-1) - 1), at most s/2 per value; N = 1: see `bool`
    intN affine   s = (max - min) / (2^N - 2), or max|x| / 30000 if that is more, so that the zero
                  point fits into 16 bits; at most s/2 per value
    bool          x becomes s or -s with s = mean|x|
    fpE.M         s brings max|x| to the largest number of the format; at most 2^-(M+1) of
                  |x| for numbers that are normal in the format, half a subnormal step below

bfloat16 rounds s up by at most 1/128.

Letters: T tokens (rows), D hidden, R scale groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from common.codecs.bits import pack_bits, packed_bytes, unpack_bits
from common.codecs.spec import CodecSpec
from common.errors import NonFiniteError

SMALLEST = torch.finfo(torch.float32).tiny
LARGEST_VALUE = 1e38  # beyond it, scales and what they give back may leave float32
ZERO_POINT_BYTES = 2
SCALE_BYTES = 2


def count_scales(spec: CodecSpec, rows: int, hidden: int) -> int:
    """R, how many scales a body of this shape holds."""
    if spec.granularity == "tensor":
        return 1
    if spec.granularity == "channel":
        return hidden
    if spec.granularity == "group":
        return rows * -(-hidden // spec.group)
    return rows


def code_bits(spec: CodecSpec, bits: int) -> int:
    return bits if spec.kind == "int" else 1 + spec.exponent + spec.mantissa


def body_bytes(spec: CodecSpec, rows: int, hidden: int, bits: int) -> int:
    """Size of the body that `quantize` gives."""
    per_scale = SCALE_BYTES + ZERO_POINT_BYTES * spec.affine
    codes = rows * packed_bytes(hidden, code_bits(spec, bits))
    return count_scales(spec, rows, hidden) * per_scale + codes


def quantize(values: Tensor, spec: CodecSpec, bits: int) -> bytes:
    """Scales, zero points if affine, then codes; values float32 (T, D), finite.

    Raises NonFiniteError beyond ±1e38.
    """
    largest = values.abs().max().item()
    if largest > LARGEST_VALUE:
        raise NonFiniteError(f"{spec.name} cannot hold {largest:.4g}; at most {LARGEST_VALUE:g}")
    cells = _to_cells(values, spec)  # (R, values of one scale)
    zero_points = b""
    if spec.kind == "float":
        scales = _scale_up(_largest(cells) / largest_float(spec.exponent, spec.mantissa))
        codes = encode_float(cells / scales, spec.exponent, spec.mantissa)
    elif bits == 1 and not spec.affine:
        scales = _to_bf16(cells.abs().mean(dim=1, keepdim=True))
        codes = (cells >= 0).to(torch.uint8)
    elif spec.affine:
        low, high = torch.aminmax(cells, dim=1, keepdim=True)
        # a row far from zero with little spread: the zero point must fit into 16 bits
        needed = torch.maximum(
            (high - low) / max(1, 2**bits - 2), torch.maximum(low.abs(), high.abs()) / 30000
        )
        scales = _scale_up(needed)
        zeros = (low / scales).round_()  # (R, 1)
        codes = (cells / scales - zeros).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        zero_points = _to_bytes(zeros.to(torch.int16))
    else:
        top = 2 ** (bits - 1) - 1
        scales = _scale_up(_largest(cells) / top)
        codes = (cells / scales).round_().add_(top).clamp_(0, 2 * top).to(torch.uint8)
    packed = pack_bits(_from_cells(codes, spec, values.shape), code_bits(spec, bits))
    return _to_bytes(scales.to(torch.bfloat16)) + zero_points + _to_bytes(packed)


def has_separate_rows(spec: CodecSpec) -> bool:
    """Whether a row is quantized without a look at its neighbours, in one width."""
    return spec.granularity in ("token", "group") and not spec.low_bits


def split_rows(body: bytes, spec: CodecSpec, rows: int, hidden: int, bits: int) -> list[bytes]:
    """The bodies that the rows of a body would have each by itself."""
    parts = list(_columns(memoryview(body), spec, rows, hidden, bits))
    return [b"".join(part[i * size : (i + 1) * size] for part, size in parts) for i in range(rows)]


def join_rows(bodies: Sequence[bytes], spec: CodecSpec, hidden: int, bits: int) -> bytes:
    """One body of all rows, from those that each have by itself."""
    views = [memoryview(body) for body in bodies]
    at = 0
    joined = []
    for size in _row_sizes(spec, hidden, bits):
        joined += [view[at : at + size] for view in views]
        at += size
    return b"".join(joined)


def _row_sizes(spec: CodecSpec, hidden: int, bits: int) -> tuple[int, int, int]:
    """Bytes of one row: scales, zero points, codes."""
    scales = count_scales(spec, 1, hidden)
    codes = packed_bytes(hidden, code_bits(spec, bits))
    return scales * SCALE_BYTES, scales * ZERO_POINT_BYTES * spec.affine, codes


def _columns(
    body: memoryview, spec: CodecSpec, rows: int, hidden: int, bits: int
) -> Iterator[tuple[memoryview, int]]:
    at = 0
    for size in _row_sizes(spec, hidden, bits):
        yield body[at : at + rows * size], size
        at += rows * size


def dequantize(body: memoryview, spec: CodecSpec, rows: int, hidden: int, bits: int) -> Tensor:
    """The values of a body of `body_bytes` bytes, float32 (rows, hidden)."""
    count = count_scales(spec, rows, hidden)
    at = count * SCALE_BYTES
    scales = _from_bytes(body[:at], torch.bfloat16).view(count, 1).float()
    zeros: Tensor | None = None
    if spec.affine:
        zeros = _from_bytes(body[at : at + count * ZERO_POINT_BYTES], torch.int16).view(count, 1)
        at += count * ZERO_POINT_BYTES
    packed = _from_bytes(body[at:], torch.uint8).view(rows, -1)
    codes = unpack_bits(packed, hidden, code_bits(spec, bits))
    cells = _to_cells(codes, spec)
    if spec.kind == "float":
        cells = decode_float(cells, spec.exponent, spec.mantissa)
    elif bits == 1 and not spec.affine:
        cells = cells.float().mul_(2).sub_(1)
    elif zeros is not None:
        cells = cells.float().add_(zeros)
    else:
        cells = cells.float().sub_(2 ** (bits - 1) - 1)
    return _from_cells(cells.mul_(scales), spec, torch.Size((rows, hidden)))


# --- scales


def _largest(cells: Tensor) -> Tensor:
    return cells.abs().amax(1, keepdim=True)


def _to_bf16(scales: Tensor) -> Tensor:
    return scales.clamp_min(SMALLEST).to(torch.bfloat16).float()


def _scale_up(scales: Tensor) -> Tensor:
    """Round up to a bfloat16, as float32: add what the cut-off mantissa bits lack."""
    as_integers = scales.clamp_min(SMALLEST).contiguous().view(torch.int32)
    return as_integers.add(0xFFFF).bitwise_and_(-0x10000).view(torch.float32)


# --- scale groups


def _to_cells(values: Tensor, spec: CodecSpec) -> Tensor:
    """(T, D) to (R, values of one scale). A last group that is not full repeats its last value."""
    if spec.granularity == "tensor":
        return values.reshape(1, -1)
    if spec.granularity == "channel":
        return values.T.contiguous()
    if spec.granularity == "group":
        group = min(spec.group, values.shape[1])
        missing = -values.shape[1] % group
        if missing:
            values = torch.cat([values, values[:, -1:].expand(-1, missing)], dim=1)
        return values.reshape(-1, group)
    return values


def _from_cells(cells: Tensor, spec: CodecSpec, shape: torch.Size) -> Tensor:
    if spec.granularity == "tensor":
        return cells.view(shape)
    if spec.granularity == "channel":
        return cells.T.contiguous()
    if spec.granularity == "group":
        return cells.reshape(shape[0], -1)[:, : shape[1]].contiguous()
    return cells


# --- floats of any size, without infinities and NaN


def largest_float(exponent: int, mantissa: int) -> float:
    """The largest number of a format with these bits: every code is a number."""
    if (exponent, mantissa) == (4, 3):
        return 448.0  # torch.float8_e4m3fn has one NaN
    if (exponent, mantissa) == (5, 2):
        return 57344.0  # torch.float8_e5m2 has infinities
    bias = 2 ** (exponent - 1) - 1
    return float((2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1 - bias))


def encode_float(values: Tensor, exponent: int, mantissa: int) -> Tensor:
    """float32 within the format's range to codes: sign, exponent, mantissa from the top down."""
    dtype = _torch_float8(exponent, mantissa)
    if dtype is not None:
        largest = largest_float(exponent, mantissa)
        codes: Tensor = values.clamp(-largest, largest).to(dtype).view(torch.uint8)
        return codes
    bias = 2 ** (exponent - 1) - 1
    magnitude = values.abs().clamp_max(largest_float(exponent, mantissa))
    power = torch.frexp(magnitude).exponent - 1  # magnitude = 1.f * 2**power
    power = power.masked_fill_(magnitude == 0, 1 - bias).clamp_(1 - bias, 2**exponent - 1 - bias)
    steps = torch.ldexp(magnitude, mantissa - power).round_()  # 2**mantissa is 1.0
    # adding the exponent field lets a mantissa that rounds up carry into it
    codes = steps.to(torch.int32) + ((power + bias - 1) << mantissa)
    codes.clamp_(0, 2 ** (exponent + mantissa) - 1)
    sign = torch.signbit(values).to(torch.int32) << (exponent + mantissa)
    return (codes + sign).to(torch.uint8)


def decode_float(codes: Tensor, exponent: int, mantissa: int) -> Tensor:
    """What `encode_float` encoded, float32."""
    dtype = _torch_float8(exponent, mantissa)
    if dtype is not None:
        return codes.contiguous().view(dtype).float()
    bias = 2 ** (exponent - 1) - 1
    whole = codes.to(torch.int32)
    field = (whole >> mantissa) & (2**exponent - 1)
    fraction = (whole & (2**mantissa - 1)).float()
    is_normal = field > 0
    significand = fraction + is_normal.float() * 2**mantissa
    power = torch.where(is_normal, field, 1) - bias - mantissa
    magnitude = torch.ldexp(significand, power)
    negative = (whole >> (exponent + mantissa)) & 1 == 1
    signed: Tensor = torch.where(negative, -magnitude, magnitude)
    return signed


def _torch_float8(exponent: int, mantissa: int) -> torch.dtype | None:
    known = {(4, 3): torch.float8_e4m3fn, (5, 2): torch.float8_e5m2}
    return known.get((exponent, mantissa))


# --- bytes


def _to_bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def _from_bytes(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
