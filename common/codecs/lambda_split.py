"""The quantizers of Lambda-Split, by its formulas, so that its results can be reproduced.

    lambda-intN   s = (2^N - 1) / (max - min), z = -round(min s) - 2^(N-1), q = round(x s + z);
                  one scale for the whole tensor
    lambda-e4m3, lambda-e5m2   a cast to eight bits, without a scale

Source: Ohta and Nishio, "Lambda-Split: A Privacy-Preserving Split Computing Framework for
Cloud-Powered Generative AI", 2023. Better codecs of the same size are in common/codecs/spec.py.
"""

from __future__ import annotations

import re
import struct

import torch
from torch import Tensor

from common.codecs.bits import pack_bits, packed_bytes, unpack_bits
from common.errors import NonFiniteError, ProtocolError, SettingsError

PREFIX = "lambda-"
HEAD = struct.Struct("<dd")  # scale and zero point
FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class LambdaSplitCodec:
    """Has the methods of common.codecs.codec.Codec. Raises SettingsError for an unknown name."""

    needs_uplink = False

    def __init__(self, name: str) -> None:
        self.name = name
        kind = name.removeprefix(PREFIX)
        match = re.fullmatch(r"int([1-8])", kind)
        if match is None and kind not in FLOATS:
            known = f"{PREFIX}int1 to {PREFIX}int8, {PREFIX}e4m3, {PREFIX}e5m2"
            raise SettingsError(f"codec {name!r} is unknown; of Lambda-Split's there are {known}")
        self._bits = int(match[1]) if match else 0
        self._float = FLOATS.get(kind)

    def encode(self, rows: Tensor, uplink: Tensor | None = None) -> bytes:
        """Encode rows (R, V). Raises NonFiniteError if a value has no code."""
        values = rows.detach().cpu().float()
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"a tensor to be sent as {self.name} holds NaN or infinity")
        if self._float is not None:
            largest = values.abs().max().item()
            if largest > torch.finfo(self._float).max:
                raise NonFiniteError(f"{self.name} cannot hold {largest:.4g}, the largest value")
            return values.to(self._float).view(torch.uint8).numpy().tobytes()
        low, high = values.min().double().item(), values.max().double().item()
        scale = (2**self._bits - 1) / (high - low) if high > low else 1.0
        half = 2 ** (self._bits - 1)
        zero_point = -round(low * scale) - half
        codes = torch.round(values.double() * scale + zero_point).clamp(-half, half - 1) + half
        packed = pack_bits(codes.to(torch.uint8), self._bits)
        return HEAD.pack(scale, zero_point) + packed.numpy().tobytes()

    def decode(
        self,
        body: bytes,
        rows: int,
        hidden: int,
        dtype: torch.dtype = torch.float32,
        uplink: Tensor | None = None,
    ) -> Tensor:
        """Decode a body into (rows, hidden). Raises ProtocolError or NonFiniteError."""
        self.check_body(len(body), rows, hidden)
        if self._float is not None:
            raw = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            values = raw.view(self._float).float().view(rows, hidden)
        else:
            scale, zero_point = HEAD.unpack(body[: HEAD.size])
            if scale == 0:
                raise NonFiniteError(f"a {self.name} body has the scale 0")
            packed = torch.frombuffer(bytearray(body[HEAD.size :]), dtype=torch.uint8)
            codes = unpack_bits(packed.view(rows, -1), hidden, self._bits).double()
            values = ((codes - 2 ** (self._bits - 1) - zero_point) / scale).float()
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"a {self.name} body decodes to NaN or infinity")
        return values.to(dtype)

    def check_body(self, size: int, rows: int, hidden: int) -> None:
        """Raise ProtocolError if no body of these rows has this size."""
        want = rows * hidden
        if self._float is None:
            want = HEAD.size + rows * packed_bytes(hidden, self._bits)
        if size != want:
            shape = f"({rows}, {hidden})"
            raise ProtocolError(f"body has {size} bytes; {self.name} {shape} needs {want}")
