"""Read some rows or columns of a stored matrix, and no more of it into memory than that.

Rows that lie side by side in the file are read at once. Columns lie in all rows, so those are read
some at a time, and what is not wanted is dropped. A matrix that is not stored as it is used (codes
and scales, an adapter's changes, older files) is read as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from common.weights.checkpoint import Checkpoint
from common.weights.safetensors_places import Place, PlaceReader

STRIP_BYTES = 1 << 20  # of what is read and dropped again
STRIP_ROWS = 64
Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"


class MatrixReader:
    """Reads from one checkpoint; `close` it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files = PlaceReader()

    def close(self) -> None:
        self._files.close()

    def read_rows(self, name: str, ids: Ids, into: Tensor) -> None:
        """Rows of a matrix, or values of a vector, in the order of `ids`. Raises CheckpointError.

        `into` has a row for each.
        """
        place = self._place(name)
        if place is None:
            whole = self._checkpoint.read_once(name, into.dtype)
            into.copy_(whole[torch.from_numpy(ids)])
            return
        row_bytes = place.size // self._checkpoint.shape(name)[0]
        for at, first, count in _runs(ids):
            rows = into[at : at + count]
            if place.dtype == into.dtype:
                memory = rows.reshape(-1).view(torch.uint8)
                self._read(place, first * row_bytes, memory)
                continue
            for begin in range(0, count, STRIP_ROWS):
                part = rows[begin : begin + STRIP_ROWS]
                memory = torch.empty(len(part) * row_bytes, dtype=torch.uint8)
                self._read(place, (first + begin) * row_bytes, memory)
                part.copy_(memory.view(place.dtype).view(part.shape))

    def read_whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """All of a tensor."""
        return self._checkpoint.read_once(name, dtype).clone()

    def read_columns(self, name: str, ids: Ids, into: Tensor) -> None:
        """Columns of a matrix as the rows of `into`, in the order of `ids`."""
        wanted = torch.from_numpy(ids)
        for first, strip in self._strips(name, into.dtype):
            into[:, first : first + len(strip)].copy_(strip.index_select(1, wanted).T)

    def _strips(self, name: str, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """A matrix some rows at a time, each with the number of its first."""
        place = self._place(name)
        if place is None:
            yield 0, self._checkpoint.read_once(name, dtype)
            return
        height, width = self._checkpoint.shape(name)
        row_bytes = place.size // height
        at_once = max(1, STRIP_BYTES // row_bytes)
        memory = torch.empty(min(at_once, height) * row_bytes, dtype=torch.uint8)
        for first in range(0, height, at_once):
            strip = memory[: min(at_once, height - first) * row_bytes]
            self._read(place, first * row_bytes, strip)
            yield first, strip.view(place.dtype).view(-1, width)

    def _place(self, name: str) -> Place | None:
        if not self._checkpoint.is_in_safetensors(name):
            return None
        return self._checkpoint.place(name)

    def _read(self, place: Place, offset: int, memory: Tensor) -> None:
        """Fill `memory` with bytes of a tensor."""
        part = replace(place, offset=place.offset + offset, size=memory.numel())
        self._files.read_into(memory, part)


def _runs(ids: Ids) -> Iterator[tuple[int, int, int]]:
    """Where ids that follow on each other begin in the list, the first of them, and how many."""
    breaks: Any = np.flatnonzero(np.diff(ids) != 1) + 1
    for start, end in itertools.pairwise([0, *breaks.tolist(), len(ids)]):
        if end > start:
            yield start, int(ids[start]), end - start
