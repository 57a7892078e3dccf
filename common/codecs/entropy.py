"""Entropy coding of whole numbers with static, per-column Gaussian tables, by a range coder.

The coder is constriction's (Bamler 2022, arXiv:2201.01741). The model of column j is a Gaussian of
deviation `deviations[j]`, integrated over each whole number, so nothing adapts and no state is
kept between bodies.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import NonFiniteError, ProtocolError

LARGEST = 32767
NARROWEST = 0.05  # steps; a narrower column costs next to nothing anyway


def encode_symbols(symbols: Tensor, deviations: Tensor) -> bytes:
    """Whole numbers, (T, D) of any dtype, to bytes. Raises NonFiniteError beyond ±32767."""
    if symbols.numel() and float(symbols.abs().max()) > LARGEST:
        raise NonFiniteError(
            f"a value is more than {LARGEST} quantization steps away from the mean"
        )
    encoder = constriction.stream.queue.RangeEncoder()
    flat = symbols.to(torch.int32).numpy().ravel()
    encoder.encode(flat, _model(), *_parameters(deviations, len(symbols)))
    words: bytes = encoder.get_compressed().astype("<u4").tobytes()
    return words


def decode_symbols(data: memoryview, rows: int, deviations: Tensor) -> Tensor:
    """The numbers of `encode_symbols`, float32 (rows, D). Raises ProtocolError for other bytes."""
    if len(data) % 4:
        raise ProtocolError(f"an entropy-coded body has {len(data)} bytes; expected whole words")
    words = np.frombuffer(data, dtype="<u4").astype(np.uint32)
    try:
        decoder = constriction.stream.queue.RangeDecoder(words)
        flat = decoder.decode(_model(), *_parameters(deviations, rows))
        if not decoder.maybe_exhausted():
            raise ValueError("there are bytes left over")
    except (ValueError, AssertionError, KeyError, OverflowError) as error:
        raise ProtocolError(f"an entropy-coded body cannot be decoded: {error}") from error
    return torch.from_numpy(flat.astype(np.float32)).view(rows, -1)


def _model() -> Any:
    return constriction.stream.model.QuantizedGaussian(-LARGEST, LARGEST)


def _parameters(deviations: Tensor, rows: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    widths = deviations.double().clamp_min(NARROWEST).numpy()
    tiled = np.tile(widths, rows)
    return np.zeros_like(tiled), tiled
