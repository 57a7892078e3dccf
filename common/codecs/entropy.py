"""Entropy coding of whole numbers with static Gaussian tables, by a range coder.

The coder is constriction's (Bamler 2022, arXiv:2201.01741). A column's model is a Gaussian of its
deviation, rounded to an eighth of an octave (0.001 bits a value) and integrated over each whole
number. So columns are few kinds, those of a kind are coded in one call, and a value is looked up in
a table; a model made for each value took twenty times as long. Nothing adapts and no state is kept
between bodies.

A body is a byte that names its format, then whole words: the columns, kind by kind and each from
its first row to its last, then what lay beyond a table's reach, in 16 bits each.

Both ends must have the same tables to the last bit. They are made by sums, products, quotients and
square roots alone, which IEEE arithmetic rounds alike on every processor.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import NonFiniteError, ProtocolError

FORMAT = b"\x01"  # bodies of the first format had none, and whole words only
LARGEST = 32767
NARROWEST = 0.05  # steps; a narrower column costs next to nothing anyway
OCTAVE_KINDS = 8
REACH = 8, 16  # deviations, and values, on each side that a table has
ESCAPE, RARE = 2.0**-14, 2.0**-24  # chances of a value beyond, and of any at least

Floats = NDArray[np.float64]


class SymbolCoder:
    """For columns of these deviations, (D,)."""

    def __init__(self, deviations: Tensor) -> None:
        kinds = find_kinds(deviations.double().numpy())
        self._order = np.argsort(kinds, kind="stable")  # columns, those of a kind together
        self._place = np.argsort(self._order, kind="stable")  # where each column is in that order
        found, starts = np.unique(kinds[self._order], return_index=True)
        ends = [*starts[1:], len(kinds)]
        self._groups = [
            (slice(a, b), make_table(int(kind)))
            for kind, a, b in zip(found, starts, ends, strict=True)
        ]
        reaches = [
            np.full(columns.stop - columns.start, table.reach) for columns, table in self._groups
        ]
        self._reach = np.concatenate(reaches).astype(np.int32)[:, None]  # (D, 1), in that order

    def encode(self, symbols: Tensor) -> bytes:
        """Whole numbers, (T, D) of any dtype, to bytes. Raises NonFiniteError beyond ±32767."""
        if not symbols.numel():
            return b""
        if float(symbols.abs().max()) > LARGEST:
            raise NonFiniteError(
                f"a value is more than {LARGEST} quantization steps away from the mean"
            )
        columns = symbols.to(torch.int32).numpy().T[self._order]  # (D, T)
        is_beyond = np.abs(columns) > self._reach
        codes = np.where(is_beyond, 2 * self._reach + 1, columns + self._reach)
        encoder = constriction.stream.queue.RangeEncoder()
        for group, table in self._groups:
            encoder.encode(codes[group].ravel(), table.model)
        if is_beyond.any():
            encoder.encode(columns[is_beyond] + LARGEST, _any_value())
        words: bytes = encoder.get_compressed().astype("<u4").tobytes()
        return FORMAT + words

    def decode(self, data: memoryview, rows: int) -> Tensor:
        """What `encode` was given, float32 (rows, D). Raises ProtocolError for other bytes."""
        if len(data) % 4 != 1 or bytes(data[:1]) != FORMAT:
            raise ProtocolError(
                f"an entropy-coded body of {len(data)} bytes is none of format {FORMAT[0]}; "
                "expected a byte for it and whole words"
            )
        words = np.frombuffer(data[1:], dtype="<u4").astype(np.uint32)
        try:
            columns = self._decode_columns(constriction.stream.queue.RangeDecoder(words), rows)
        except (ValueError, AssertionError, KeyError, OverflowError) as error:
            raise ProtocolError(f"an entropy-coded body cannot be decoded: {error}") from error
        return torch.from_numpy(np.ascontiguousarray(columns[self._place].T, dtype=np.float32))

    def _decode_columns(self, decoder: Any, rows: int) -> NDArray[np.int32]:
        """(D, T), in the order in which columns are coded. Raises ValueError for other bytes."""
        columns = np.empty((len(self._order), rows), dtype=np.int32)
        for group, table in self._groups:
            count = (group.stop - group.start) * rows
            columns[group] = decoder.decode(table.model, count).reshape(-1, rows)
        is_beyond = columns == 2 * self._reach + 1
        columns -= self._reach
        if is_beyond.any():
            columns[is_beyond] = decoder.decode(_any_value(), int(is_beyond.sum())) - LARGEST
        if not decoder.maybe_exhausted():
            raise ValueError("there are bytes left over")
        return columns


@dataclass(frozen=True, slots=True)
class Table:
    """Chances of the whole numbers from -reach to reach, and of one beyond."""

    reach: int
    model: Any


def find_kinds(deviations: Floats) -> NDArray[np.int64]:
    """Which of the widths is nearest to each, by their ratio."""
    widths = list_widths()
    between = widths[:-1] * math.sqrt(widths[1] / widths[0])
    return np.searchsorted(between, deviations).astype(np.int64)


@functools.cache
def list_widths() -> Floats:
    """The deviations of all kinds, an eighth of an octave apart."""
    ratio = 2.0
    for _ in range(OCTAVE_KINDS.bit_length() - 1):
        ratio = math.sqrt(ratio)
    widths = [NARROWEST]
    while widths[-1] < LARGEST:
        widths.append(widths[-1] * ratio)
    return np.array(widths)


@functools.cache
def make_table(kind: int) -> Table:
    width = float(list_widths()[kind])
    reach = min(LARGEST, math.ceil(REACH[0] * width) + REACH[1])
    chances = np.append(integrate_gaussian(width, reach), ESCAPE) + RARE
    # not lazily: a lazy table is searched from its first entry on, for each value
    model = constriction.stream.model.Categorical(chances, perfect=False, lazy=False)
    return Table(reach, model)


def integrate_gaussian(width: float, reach: int) -> Floats:
    """Its mass within half a step of each whole number from -reach to reach, by Simpson's rule."""
    parts = 2 * math.ceil(1.5 / width) + 2
    offsets = np.arange(parts + 1) / parts - 0.5
    weights = np.where(np.arange(parts + 1) % 2, 4.0, 2.0)
    weights[[0, -1]] = 1.0
    points = (np.arange(reach + 1) + offsets[:, None]) / width  # (parts + 1, reach + 1)
    heights = weights[:, None] * exponential(-0.5 * points * points)
    half = functools.reduce(np.add, heights)  # row by row: in the same order everywhere
    half = half / (3 * parts * width * math.sqrt(2 * math.pi))
    return np.concatenate([half[:0:-1], half])


def exponential(x: Floats) -> Floats:
    """e^x for x up to 0, as (1 + y + y²/2! + …)^1024 with y = x / 1024; 0 where that is tiny."""
    y = np.maximum(x, -200.0) / 1024
    total = np.ones_like(y)
    for factor in range(9, 0, -1):
        total = 1 + total * y / factor
    for _ in range(10):
        total = total * total
    return total


def _any_value() -> Any:
    return constriction.stream.model.Uniform(2 * LARGEST + 1)
