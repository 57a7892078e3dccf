"""Exact search: which token, put through the head after those found so far, gives this row?

Whoever has the head's weights can ask that of every token of the vocabulary, row by row, and the
answer is the prompt. A row is encoded and decoded like those of the session, so a lossy codec does
not get in the way: the right token gives the very same values.

To be quick, tokens are tried in the order in which their rows after a text's first token alone
resemble the row that is sought, and the search ends with the first that gives it. If none does, all
of the vocabulary has been tried and the nearest is taken.

Where each row may have left the model behind another layer, because the device draws a cut for
every step, each of those heads is asked.

Letters: V tokens of the vocabulary, D width of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from common.codecs.codec import Codec
from common.errors import SettingsError
from common.spans.attention import Segment
from common.spans.kv_rows import KvRows
from common.spans.span_model import SpanModel
from evaluation.leakage.split_model import cross, run_each

FIRST_TRIED = 8
AT_ONCE = 256  # tokens, each with a copy of the KV
SAME = 0.01  # of a row's length: a value that fell on the other side of a rounding edge is less


class Trials:
    """A head after some text, and which row each token would give next."""

    def __init__(self, head: SpanModel) -> None:
        if head.keeps_states:
            raise SettingsError(
                "exact search puts many tokens after one text, which is not done here with layers "
                "that keep a state of it; choose other attacks with --attack"
            )
        self._head = head
        self._kv = head.new_kv()
        self._copies: list[KvRows] = []

    @property
    def length(self) -> int:
        return self._kv.length

    def try_next(self, token_ids: Sequence[int]) -> Tensor:
        """The rows (n, D) of so many tokens, each as if it came next."""
        parts = [token_ids[at : at + AT_ONCE] for at in range(0, len(token_ids), AT_ONCE)]
        return torch.cat([self._run(part) for part in parts])

    def accept(self, token_id: int) -> None:
        """This is the next token."""
        self._head.embed_and_run(torch.tensor([token_id]), [Segment(self._kv, self.length, 1)])

    def _run(self, token_ids: Sequence[int]) -> Tensor:
        while len(self._copies) < len(token_ids):
            self._copies.append(self._head.new_kv())
        copies = self._copies[: len(token_ids)]
        for copy in copies:
            self._catch_up(copy)
        segments = [Segment(copy, self.length, 1) for copy in copies]
        rows = self._head.embed_and_run(torch.tensor(token_ids), segments)
        for copy in copies:
            copy.length = self.length  # what came after that was a trial
        return rows

    def _catch_up(self, copy: KvRows) -> None:
        copy.reserve(self.length + 1)
        copy.buffer[copy.length : self.length] = self._kv.buffer[copy.length : self.length]


class ExactSearch:
    """With the weights of a head, or of several where the cut of each row is not known.

    Raises SettingsError for heads whose layers keep states.
    """

    def __init__(self, heads: Sequence[SpanModel], vocabulary: int, first_token: int) -> None:
        """`first_token` is what texts of this model begin with."""
        self._heads = heads
        self._alone = [run_each(head, range(vocabulary), [first_token]) for head in heads]

    def recover(self, seen: Tensor, codec: Codec, before: Sequence[int] = ()) -> list[int]:
        """The tokens of one session's uplink rows (T, D), which follow on known ones."""
        trials = [Trials(head) for head in self._heads]
        for token in before:
            for each in trials:
                each.accept(token)
        found = []
        for row in seen:
            token = self._find(trials, row, _reencoder(codec))
            for each in trials:
                each.accept(token)
            found.append(token)
        return found

    def rank(self, row: Tensor, head: int = 0) -> list[int]:
        """All tokens; those whose rows resemble this one (D,) first."""
        order: list[int] = (self._alone[head] - row).norm(dim=1).argsort().tolist()
        return order

    def _find(
        self, trials: Sequence[Trials], row: Tensor, reencode: Callable[[Tensor], Tensor]
    ) -> int:
        nearest, least = -1, float("inf")
        orders = [_widen(self.rank(row, head)) for head in range(len(trials))]
        for parts in zip(*orders, strict=True):
            for each, token_ids in zip(trials, parts, strict=True):
                distances = (reencode(each.try_next(token_ids)) - row).norm(dim=1)
                index = int(distances.argmin())
                if float(distances[index]) < least:
                    nearest, least = token_ids[index], float(distances[index])
            if least <= SAME * float(row.norm()):
                break
        return nearest


def _widen(token_ids: list[int]) -> Iterator[list[int]]:
    """First a few, then more and more at once."""
    at, count = 0, FIRST_TRIED
    while at < len(token_ids):
        yield token_ids[at : at + count]
        at, count = at + count, min(4 * count, AT_ONCE)


def _reencoder(codec: Codec) -> Callable[[Tensor], Tensor]:
    """How a trial's row would have arrived, where that does not depend on its neighbours."""
    if codec.spec.granularity in ("token", "group") and not codec.spec.low_bits:
        return lambda rows: cross(codec, rows)
    return lambda rows: rows
