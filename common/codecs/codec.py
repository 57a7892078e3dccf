"""A boundary codec put together: prediction, normalization, rotation, quantization, packing.

Encoding goes down that list and decoding up again. A body says nothing about itself: rows, size
and codec stand in the message's header, and both ends take the calibration from a file whose
fingerprint they have compared. Every row is quantized on its own (unless a codec's granularity is
tensor or channel), so its values do not depend on its neighbours.

Values that a codec cannot hold are refused by name, never sent.

Letters: T tokens (rows), D hidden.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import zstandard
from torch import Tensor

from common.codecs.calibration import Calibration, DirectionCalibration
from common.codecs.entropy import SymbolCoder
from common.codecs.quantize import (
    body_bytes,
    dequantize,
    has_separate_rows,
    join_rows,
    quantize,
    split_rows,
)
from common.codecs.spec import CodecSpec, parse_codec
from common.errors import NonFiniteError, ProtocolError, SettingsError

CAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ZSTD_LEVEL = 3
NO_CHANCE = -1e30  # the logit of a token that `topK` has left out
LEFT_OUT = -1e20  # below this are such logits only, whatever temperature and penalties do to them
RAW, COMPRESSED = b"\x00", b"\x01"


class Codec:
    """Turns rows (T, D) into bytes and back. Raises SettingsError without a needed calibration."""

    def __init__(self, spec: CodecSpec, direction: str, calibration: Calibration | None) -> None:
        self.spec = spec
        self.name = spec.name
        self._predictor = None
        self._budget = spec.budget
        self._known: DirectionCalibration | None = None
        if spec.needs_calibration:
            if calibration is None:
                raise SettingsError(
                    f"codec {spec.name!r} needs a calibration of this model and span; make one "
                    "with `midspan calibrate` and name it with --calibration"
                )
            self._predictor = calibration.predictor if direction == "down" else None
            if not spec.predict:
                self._predictor = None
            known = {"up": calibration.up, "down": calibration.down}[direction]
            self._known = known if self._predictor is None else calibration.residual
            if spec.is_searched and calibration.smallest_budget is not None:
                self._budget = calibration.smallest_budget

    @property
    def needs_uplink(self) -> bool:
        """Whether encoding and decoding need the decoded uplink rows of the same tokens."""
        return self._predictor is not None

    def encode(self, rows: Tensor, uplink: Tensor | None = None) -> bytes:
        """Encode rows (T, D). Raises NonFiniteError if a value has no code."""
        rows = rows.detach().cpu()
        if self.spec.kind == "cast":
            body = self._encode_cast(rows)
        elif self.spec.kind == "top":
            body = self._encode_top(rows.float())
        else:
            values = self._before_quantizing(rows.float(), uplink)
            if not _is_finite(values):
                raise NonFiniteError(
                    f"boundary rows to be sent as {self.name} hold NaN or infinity"
                )
            body = self._quantize(values)
        return _compress(body) if self.spec.zstd else body

    def decode(
        self,
        body: bytes,
        rows: int,
        hidden: int,
        dtype: torch.dtype = torch.float32,
        uplink: Tensor | None = None,
    ) -> Tensor:
        """Decode a body into (rows, hidden). Raises ProtocolError if it is none of that shape."""
        data = memoryview(body)
        if self.spec.zstd:
            data = _decompress(data, self._largest_body(rows, hidden))
        self._check_size(len(data), rows, hidden)
        if rows == 0:
            return torch.empty(0, hidden, dtype=dtype)
        if self.spec.kind == "cast":
            decoded = _from_buffer(data, CAST_DTYPES[self.spec.exponent]).view(rows, hidden)
        elif self.spec.kind == "top":
            decoded = self._decode_top(data, rows, hidden)
        else:
            decoded = self._after_quantizing(self._dequantize(data, rows, hidden), uplink)
        if not _is_finite(decoded):
            raise NonFiniteError(f"a {self.name} body decodes to NaN or infinity")
        return decoded.to(dtype)

    def approximate(self, rows: Tensor, uplink: Tensor | None = None) -> Tensor:
        """What `decode` gives for what `encode` gives of rows (T, D), sooner if it can."""
        if self.spec.kind != "fisher":
            body = self.encode(rows, uplink)
            return self.decode(body, len(rows), rows.shape[1], uplink=uplink)
        values = self._before_quantizing(rows, uplink)
        return self._after_quantizing(values.div(self._step()).round_().mul_(self._step()), uplink)

    @property
    def _has_separate_rows(self) -> bool:
        """And no product of matrices, whose last bits may depend on how many rows there are."""
        spec = self.spec
        if spec.zstd or spec.hadamard or self._predictor is not None:
            return False
        if spec.kind in ("fisher", "top"):
            return False
        return spec.kind == "cast" or has_separate_rows(spec)

    def encode_each(self, rows: Tensor, uplinks: Tensor | None = None) -> list[bytes]:
        """Rows (n, D) of n sessions, each to the body that `encode` gives it, in one go if it can.

        Raises NonFiniteError if a value of any has no code.
        """
        if len(rows) == 1 or not self._has_separate_rows:
            parts = [None] * len(rows) if uplinks is None else torch.split(uplinks, 1)
            pairs = zip(torch.split(rows, 1), parts, strict=True)
            return [self.encode(row, uplink) for row, uplink in pairs]
        body = self.encode(rows, uplinks)
        if self.spec.kind == "cast":
            size = len(body) // len(rows)
            return [body[at : at + size] for at in range(0, len(body), size)]
        return split_rows(body, self.spec, len(rows), rows.shape[1], self.spec.bits)

    def decode_each(self, bodies: Sequence[bytes], hidden: int) -> Tensor:
        """Bodies of one row each to rows (n, hidden), in one go if it can. Raises as `decode`."""
        if len(bodies) == 1 or not self._has_separate_rows:
            return torch.cat([self.decode(body, 1, hidden) for body in bodies])
        for body in bodies:
            self._check_size(len(body), 1, hidden)
        if self.spec.kind == "cast":
            return self.decode(b"".join(bodies), len(bodies), hidden)
        joined = join_rows(bodies, self.spec, hidden, self.spec.bits)
        return self.decode(joined, len(bodies), hidden)

    def check_body(self, size: int, rows: int, hidden: int) -> None:
        """Raise ProtocolError if no body of these rows can have this size."""
        if self.spec.zstd:
            limit = self._largest_body(rows, hidden) + 1
            if not 1 <= size <= limit:
                raise ProtocolError(f"body has {size} bytes; {self.name} allows up to {limit}")
        else:
            self._check_size(size, rows, hidden)

    # --- sizes

    def row_bytes(self, hidden: int) -> int:
        """Of a row that comes alone, before zstd; the most that it may be if that depends."""
        return self._largest_body(1, hidden)

    def _fixed_size(self, rows: int, hidden: int) -> int | None:
        """Bytes of a body before zstd, or None if that depends on the values."""
        spec = self.spec
        if rows == 0:
            return 0
        if spec.kind == "cast":
            return rows * hidden * CAST_DTYPES[spec.exponent].itemsize
        if spec.kind == "top":
            return rows * min(spec.count, hidden) * 8
        if spec.kind == "fisher":
            return None
        if spec.low_bits:
            high = self._high_rows(rows)
            return (
                -(-rows // 8)
                + body_bytes(spec, high, hidden, spec.bits) * (high > 0)
                + body_bytes(spec, rows - high, hidden, spec.low_bits) * (high < rows)
            )
        return body_bytes(spec, rows, hidden, spec.bits)

    def _largest_body(self, rows: int, hidden: int) -> int:
        fixed = self._fixed_size(rows, hidden)
        return fixed if fixed is not None else 8 + 4 * rows * hidden

    def _check_size(self, size: int, rows: int, hidden: int) -> None:
        want = self._fixed_size(rows, hidden)
        if want is not None and size != want:
            raise ProtocolError(
                f"body has {size} bytes; {self.name} ({rows}, {hidden}) needs {want}"
            )
        if want is None and size > self._largest_body(rows, hidden):
            raise ProtocolError(
                f"body has {size} bytes, too many for {self.name} ({rows}, {hidden})"
            )

    def _high_rows(self, rows: int) -> int:
        return math.ceil(rows * self.spec.high_fraction)

    # --- the parts

    def _encode_cast(self, rows: Tensor) -> bytes:
        cast = rows.to(CAST_DTYPES[self.spec.exponent]).contiguous()
        if not _is_finite(cast):
            if _is_finite(rows):
                largest = rows.abs().max().item()
                raise NonFiniteError(f"{self.name} cannot hold {largest:.4g}, the largest value")
            raise NonFiniteError(self._not_finite())
        return cast.view(torch.uint8).numpy().tobytes()

    def _encode_top(self, rows: Tensor) -> bytes:
        """Token ids of all rows, int32, then their logits, float32; the largest first."""
        if not _is_finite(rows):
            raise NonFiniteError(self._not_finite())
        values, ids = rows.topk(min(self.spec.count, rows.shape[1]))
        return ids.to(torch.int32).numpy().tobytes() + values.numpy().tobytes()

    def _decode_top(self, data: memoryview, rows: int, width: int) -> Tensor:
        half = len(data) // 2
        ids = _from_buffer(data[:half], torch.int32).view(rows, -1).long()
        if int(ids.min()) < 0 or int(ids.max()) >= width:
            raise ProtocolError(f"a {self.name} body names a token beyond the {width} that are")
        values = _from_buffer(data[half:], torch.float32).view(rows, -1)
        return torch.full((rows, width), NO_CHANCE).scatter_(1, ids, values)

    def _not_finite(self) -> str:
        return f"boundary rows to be sent as {self.name} hold NaN or infinity"

    def _before_quantizing(self, values: Tensor, uplink: Tensor | None) -> Tensor:
        if self._predictor is not None:
            assert uplink is not None, "prediction needs the uplink rows"
            values = values - self._predictor.predict(uplink.float())
        if self._known is not None and self.spec.kind == "fisher":
            return (values - self._known.mean) @ self._known.fisher
        if self._known is not None and self.spec.norm:
            values = (values - self._known.mean) / self._known.scale
        return _rotate(values, self.spec.hadamard)

    def _after_quantizing(self, values: Tensor, uplink: Tensor | None) -> Tensor:
        if self._known is not None and self.spec.kind == "fisher":
            values = (values @ self._known.fisher_inverse).add_(self._known.mean)
        else:
            values = _rotate(values, self.spec.hadamard)  # a symmetric rotation undoes itself
            if self._known is not None and self.spec.norm:
                values = torch.addcmul(self._known.mean, values, self._known.scale)
        if self._predictor is not None:
            assert uplink is not None, "prediction needs the uplink rows"
            values = values + self._predictor.predict(uplink.float())
        return values

    def _quantize(self, values: Tensor) -> bytes:
        spec = self.spec
        if spec.kind == "fisher":
            return self._coder.encode(values.div(self._step()).round_())
        if not len(values):
            return b""
        if not spec.low_bits:
            return quantize(values, spec, spec.bits)
        high = self._pick_high_rows(values)
        mask = torch.nn.functional.pad(high.to(torch.uint8), (0, -len(high) % 8)).view(-1, 8)
        weights = 2 ** torch.arange(8, dtype=torch.uint8)
        bits = (mask * weights).sum(dim=1).to(torch.uint8).numpy().tobytes()
        parts = [(values[high], spec.bits), (values[~high], spec.low_bits)]
        return bits + b"".join(quantize(part, spec, n) for part, n in parts if len(part))

    def _dequantize(self, data: memoryview, rows: int, hidden: int) -> Tensor:
        spec = self.spec
        if spec.kind == "fisher":
            return self._coder.decode(data, rows).mul_(self._step())
        if not spec.low_bits:
            return dequantize(data, spec, rows, hidden, spec.bits)
        mask_bytes = -(-rows // 8)
        packed = _from_buffer(data[:mask_bytes], torch.uint8)[:, None]
        high = (packed >> torch.arange(8, dtype=torch.uint8)).view(-1)[:rows].bitwise_and(1).bool()
        count = int(high.sum())
        if count != self._high_rows(rows):
            raise ProtocolError(f"{count} of {rows} rows are marked; {self.name} marks others")
        cut = mask_bytes + (body_bytes(spec, count, hidden, spec.bits) if count else 0)
        values = torch.empty(rows, hidden)
        if count:
            values[high] = dequantize(data[mask_bytes:cut], spec, count, hidden, spec.bits)
        if count < rows:
            values[~high] = dequantize(data[cut:], spec, rows - count, hidden, spec.low_bits)
        return values

    def _pick_high_rows(self, values: Tensor) -> Tensor:
        """The rows with the largest values: they would lose most with few bits."""
        largest = torch.linalg.vector_norm(values, torch.inf, dim=1)
        high = torch.zeros(len(values), dtype=torch.bool)
        high[largest.topk(self._high_rows(len(values))).indices] = True
        return high

    def _step(self) -> float:
        """Rounding errors of D coordinates cost D * step^2 / 24 nats, half their squared length."""
        assert self._known is not None
        return math.sqrt(24 * self._budget / len(self._known.mean))

    @functools.cached_property
    def _coder(self) -> SymbolCoder:
        assert self._known is not None
        return SymbolCoder(self._known.deviation / self._step())


def make_codec(name: str, direction: str, calibration: Calibration | None = None) -> Codec:
    """The codec of that name for rows that go `up` or `down`. Raises SettingsError."""
    return Codec(parse_codec(name), direction, calibration)


def _rotate(values: Tensor, block: int) -> Tensor:
    """Multiply blocks of neighbouring columns by a Hadamard matrix; a smaller rest stays."""
    whole = values.shape[1] // block * block if block else 0
    if not whole:
        return values
    rotated = values[:, :whole].reshape(-1, block) @ _hadamard(block)
    rotated = rotated.view(values.shape[0], whole)
    if whole == values.shape[1]:
        return rotated
    return torch.cat([rotated, values[:, whole:]], dim=1)


@functools.cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's matrix, symmetric and orthogonal: (size, size), size a power of two."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def _is_finite(values: Tensor) -> bool:
    """In one pass: a float64 sum of finite float32 values is finite, and only of those."""
    return math.isfinite(values.sum(dtype=torch.float64).item())


def _from_buffer(data: memoryview, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


def _compress(body: bytes) -> bytes:
    compressed = zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(body)
    return COMPRESSED + compressed if len(compressed) < len(body) else RAW + body


def _decompress(data: memoryview, limit: int) -> memoryview:
    if bytes(data[:1]) == RAW:
        return data[1:]
    if bytes(data[:1]) != COMPRESSED:
        raise ProtocolError("a zstd body begins with an unknown byte")
    try:
        if zstandard.frame_content_size(data[1:]) > limit:
            raise ProtocolError(f"a zstd body says that it holds more than {limit} bytes")
        out = zstandard.ZstdDecompressor().decompress(data[1:], max_output_size=limit)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"a zstd body cannot be decompressed: {error}") from error
    return memoryview(out)
