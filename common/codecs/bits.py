"""Pack small unsigned integers to the bit, and unpack them.

Eight codes of `bits` bits each fill `bits` whole bytes, lowest code in the lowest bits. A row whose
length is no multiple of eight is padded with zeros, which are dropped again.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 8  # codes


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one row of `columns` codes."""
    return columns if bits == 8 else -(-columns // GROUP) * bits


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below 2**bits, shape (rows, columns), to uint8 (rows, packed_bytes)."""
    if bits == 8:
        return codes
    rows, columns = codes.shape
    if columns % GROUP:
        codes = torch.nn.functional.pad(codes, (0, GROUP - columns % GROUP))
    groups = codes.view(rows, -1, GROUP)
    if bits in (1, 2, 4):
        return _pack_in_bytes(groups, bits)
    words = torch.zeros(groups.shape[:2], dtype=torch.int64)
    for i in range(GROUP):
        words.bitwise_or_(groups[:, :, i].to(torch.int64).bitwise_left_shift_(bits * i))
    as_bytes = words.view(torch.uint8).view(rows, -1, 8)
    return as_bytes[:, :, :bits].reshape(rows, -1)


def _pack_in_bytes(groups: Tensor, bits: int) -> Tensor:
    """Widths that divide eight never cross a byte."""
    per_byte = 8 // bits
    cells = groups.reshape(groups.shape[0], -1, per_byte)
    packed = cells[:, :, 0].clone()
    for i in range(1, per_byte):
        packed.bitwise_or_(cells[:, :, i].bitwise_left_shift(bits * i))
    return packed


def unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """The codes of `pack_bits`, uint8 (rows, columns)."""
    if bits == 8:
        return packed
    rows = packed.shape[0]
    if bits in (1, 2, 4):
        shifts = [packed.bitwise_right_shift(bits * i) for i in range(8 // bits)]
        codes = torch.stack(shifts, dim=2).bitwise_and_((1 << bits) - 1)
        return codes.view(rows, -1)[:, :columns]
    groups = packed.reshape(rows, -1, bits)
    padded = torch.zeros(rows, groups.shape[1], 8, dtype=torch.uint8)
    padded[:, :, :bits] = groups
    words = padded.view(torch.int64)  # (rows, groups, 1)
    shifts64 = torch.arange(GROUP, dtype=torch.int64) * bits
    codes = words.bitwise_right_shift(shifts64).bitwise_and_((1 << bits) - 1).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns]
