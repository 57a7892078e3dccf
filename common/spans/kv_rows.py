"""The KV cache of one session in one span, one row per token.

A row holds the keys and values of all layers of the span for one token, flat and contiguous.
So a step's new KV is one slice, committing is one copy, taking over is another, and cutting back
is a smaller number. Attention reads a layer through a strided view. Workers take the memory from
a pool (common/spans/kv_pool.py).

Letters: T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from common.spans.kv_pool import SlotPool, Slots
from common.spans.states import States

MIN_CAPACITY = 64  # rows; of a slot, too
ByteRows: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.uint8]]"  # (rows, row bytes)


@dataclass(frozen=True, slots=True)
class LayerSlot:
    """Where one layer's keys and values lie in a row (in values, not bytes)."""

    key_at: int
    key_shape: tuple[int, int]  # (H, D)
    value_at: int
    value_shape: tuple[int, int]


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The shape of a row: one slot per layer of the span, in order."""

    slots: tuple[LayerSlot, ...]
    row_values: int
    dtype: torch.dtype
    layer_values: tuple[int, ...]  # how many values of a row each layer has
    shape: tuple[int, int] | None  # (H, D) of all keys and values, if those are alike

    @property
    def row_bytes(self) -> int:
        return self.row_values * self.dtype.itemsize


def make_layout(
    shapes: list[tuple[tuple[int, int], tuple[int, int]]], dtype: torch.dtype
) -> KvLayout:
    """Lay out layers with the given ((H, D) of keys, (H, D) of values) one after another."""
    slots: list[LayerSlot] = []
    at = 0
    for key_shape, value_shape in shapes:
        value_at = at + key_shape[0] * key_shape[1]
        slots.append(LayerSlot(at, key_shape, value_at, value_shape))
        at = value_at + value_shape[0] * value_shape[1]
    layer_values = tuple(k[0] * k[1] + v[0] * v[1] for k, v in shapes)
    alike = {shape for pair in shapes for shape in pair}
    shape = alike.pop() if len(alike) == 1 and at else None
    return KvLayout(tuple(slots), at, dtype, layer_values, shape)


def slot_bytes(layout: KvLayout) -> int:
    """What a pool's slots must have for this layout."""
    return max(1, layout.row_bytes) * MIN_CAPACITY


class KvRows:
    """`length` valid rows in a buffer that grows by doubling: in a pool's slots, if it has room."""

    def __init__(
        self,
        layout: KvLayout,
        device: torch.device | str = "cpu",
        pool: SlotPool | None = None,
        states: States | None = None,
    ) -> None:
        """`pool` has slots of `slot_bytes(layout)`, in the memory of the CPU.

        `states` are those of a span that has layers without rows; both end at the same token.
        """
        self.layout = layout
        self.states = states
        self.length = 0
        self.buffer = torch.empty(0, layout.row_values, dtype=layout.dtype, device=device)
        self._pool = pool
        self._slots: Slots | None = None

    @property
    def capacity(self) -> int:
        return int(self.buffer.shape[0])

    @property
    def capacity_bytes(self) -> int:
        held = self.states.held_bytes if self.states is not None else 0
        return self.capacity * self.layout.row_bytes + held

    def goes_on_at(self, position: int) -> bool:
        """Whether the next row may be this one: rows and states end before it."""
        ends = self.length if self.states is None else self.states.position
        return self.length == ends == position

    def cut_back(self, position: int) -> None:
        """Forget the rows from `position` on.

        Where there are states, those from the newest state on that is not beyond it.
        """
        self.length = min(self.length, position)
        if self.states is not None:
            self.length = self.states.cut_back(self.length)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows in all, keeping the valid ones."""
        if rows <= self.capacity:
            return
        capacity = max(MIN_CAPACITY, 1 << (rows - 1).bit_length())
        if self._pool is not None and self.layout.row_values:
            if self._slots and self._pool.extend(self._slots, capacity // MIN_CAPACITY):
                self.buffer = self._pooled(self._pool, self._slots)
                return
            slots = self._pool.take(capacity // MIN_CAPACITY)
            if slots is not None:
                self._move(self._pooled(self._pool, slots), slots)
                return
        # zeros touches the pages now: page faults later would be the main cost of a takeover
        self._move(self.buffer.new_zeros(capacity, self.layout.row_values), None)

    def release(self) -> None:
        """Forget all rows and give the memory back."""
        self.cut_back(0)
        self._move(self.buffer.new_empty(0, self.layout.row_values), None)

    def _pooled(self, pool: SlotPool, slots: Slots) -> Tensor:
        return pool.memory(slots).view(self.layout.dtype).view(-1, self.layout.row_values)

    def _move(self, buffer: Tensor, slots: Slots | None) -> None:
        buffer[: self.length] = self.buffer[: self.length]
        if self._pool is not None and self._slots is not None:
            self._pool.give_back(self._slots)
        self.buffer, self._slots = buffer, slots

    def write_views(self, start: int, end: int) -> Sequence[Tensor]:
        """Where rows start..end of each layer go: (T, values of the layer), keys before values."""
        return self.buffer[start:end].split_with_sizes(self.layout.layer_values, dim=1)

    def read_views(self, end: int) -> Sequence[Tensor]:
        """Rows 0..end of all layers, shape (1, H, T, D) each: keys, values, keys, values, …"""
        rows, layout = self.buffer[:end], self.layout
        if layout.shape is not None:  # in few calls, for this is done for each row
            parts = rows.view(end, -1, *layout.shape).permute(1, 2, 0, 3)
            return parts.unsqueeze(1).unbind(0)
        return [
            _slice(rows, at, shape).transpose(0, 1).unsqueeze(0)
            for slot in layout.slots
            for at, shape in ((slot.key_at, slot.key_shape), (slot.value_at, slot.value_shape))
        ]

    def read_bytes(self, start: int, end: int) -> bytes:
        """Rows start..end as they go into the store."""
        rows = self.buffer[start:end].cpu().view(torch.uint8)
        return rows.numpy().tobytes()

    def take_rows(self, start: int, count: int, read: Callable[[ByteRows], int]) -> int:
        """Put rows that `read` brings at `start`; returns how many.

        `read` gets room for `count` rows, uint8 (count, row bytes), and says how many it filled.
        """
        self.reserve(start + count)
        rows = self.buffer[start : start + count].view(torch.uint8)
        if rows.device.type == "cpu":
            return read(rows.numpy())
        landing = torch.empty(rows.shape, dtype=torch.uint8)
        filled = read(landing.numpy())
        rows[:filled] = landing[:filled].to(rows.device)
        return filled


def _slice(rows: Tensor, at: int, shape: tuple[int, int]) -> Tensor:
    """(T, row values) -> the (T, H, D) that starts at column `at`."""
    heads, size = shape
    return rows[:, at : at + heads * size].view(len(rows), heads, size)
