"""Single rows of exact sessions in groups of a fixed number, filled up with rows that mean nothing.

A product with a fixed number of rows goes to the same kernel each time, and attention is computed
for each row by itself, so a row's bits depend on its place in the group at most. Whether they do is
tried before the first group: every row in every place, and beside others. It is tried only where
all matrices see each row of a group once: experts see as many rows as chose them, and latent
attention makes keys of all that is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.spans.attention import Segment
from common.spans.kv_rows import KvRows

ROWS = 8  # of a group
PASS_ROWS = 16  # of a batch, which take about as long as a pass of few rows does
LENGTHS_APART = 37  # of the caches that groups are tried with


@dataclass(frozen=True, slots=True)
class Pass:
    """Rows that go through at once; the last `pads` of a group mean nothing."""

    rows: Tensor  # (T, D), or token ids (T,)
    segments: list[Segment]
    is_group: bool = False
    pads: int = 0

    @property
    def own(self) -> list[Segment]:
        """Those that mean something."""
        return self.segments[: len(self.segments) - self.pads]


def fill_up(rows: Tensor, segments: Sequence[Segment], nowhere: KvRows) -> Pass:
    """A group of some single rows; the KV of the others goes to `nowhere`."""
    pads = ROWS - len(segments)
    filled = torch.cat([rows, rows.new_ones(pads, *rows.shape[1:])])
    return Pass(filled, [*segments, *[Segment(nowhere, 0, 1)] * pads], is_group=True, pads=pads)


def count_as_rows(units: Sequence[int], groups_agree: bool) -> int:
    """How many rows of one pass take as long as these units of an exact session.

    Each needs a pass, or a place in a group.
    """
    single = PASS_ROWS // ROWS if groups_agree else PASS_ROWS
    return sum(single if rows == 1 else max(rows, PASS_ROWS) for rows in units)


def draw_rows(width: int, dtype: torch.dtype, vocabulary: int) -> Tensor:
    """Rows to try groups with, (2 * ROWS, width); or token ids (2 * ROWS,) of a `vocabulary`."""
    generator = torch.Generator().manual_seed(0)
    if vocabulary:
        return torch.randint(vocabulary, (2 * ROWS,), generator=generator)
    return torch.randn(2 * ROWS, width, generator=generator).to(dtype)


def draw_caches(new_kv: Callable[[], KvRows], most: int) -> list[KvRows]:
    """As many caches, of different numbers of random rows below `most`."""
    generator = torch.Generator().manual_seed(1)
    caches = [new_kv() for _ in range(2 * ROWS)]
    for index, kv in enumerate(caches):
        count = 1 + index * LENGTHS_APART % max(1, most - 2)
        kv.reserve(count + 1)
        kv.buffer[:count] = torch.randn(count, kv.layout.row_values, generator=generator)
        kv.length = count
    return caches


def _knows_matrices(model: nn.Module) -> bool:
    """Whether all matrices are of kinds that are known to take each row once."""
    return all(
        isinstance(module, nn.Linear | nn.Embedding)
        for module in model.modules()
        for values in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if values.ndim > 1
    )


def agree(
    model: nn.Module, values: Tensor, caches: Sequence[KvRows], run: Callable[[Pass], Tensor]
) -> bool:
    """Whether a row has the same bits in each place of a group, and beside other rows.

    False as well for a model with matrices of other kinds than linear layers and embeddings.

    `values` are 2 * ROWS rows (or token ids), as many `caches` have some rows each, and `run` gives
    what comes of a group.
    """
    if not _knows_matrices(model):
        return False
    seen: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(
            lambda of, given: seen.add(given[0].numel() // of.in_features)
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    starts = [cache.length for cache in caches]

    def compute(order: Sequence[int]) -> Tensor:
        segments = [Segment(caches[i], starts[i], 1) for i in order]
        return run(Pass(values[list(order)], segments, is_group=True))

    try:
        wanted = compute(range(ROWS))
        for shift in range(1, ROWS):
            order = [(place + shift) % ROWS for place in range(ROWS)]
            if not torch.equal(compute(order), wanted[order]):
                return False
            order = [place if place == shift else ROWS + place for place in range(ROWS)]
            if not torch.equal(compute(order)[shift], wanted[shift]):
                return False
    finally:
        for hook in hooks:
            hook.remove()
    return seen <= {ROWS}
