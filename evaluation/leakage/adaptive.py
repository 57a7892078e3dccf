"""Attacks that know the defence.

- Search with a prior: exact search, where a row is no longer what any token gives. Each token is
  weighed by how likely the noise is that would have made this row of its own, and by how likely
  the public model, whole, takes it to come next. Greedy, from left to right.
- Alignment: a secret rotation is found from a few known tokens and from what rows of the same
  model look like unrotated, by Procrustes and by naming rows in turns.
- Statistics: shuffled channels are told by how their values are spread, without a known token.

Letters: T tokens, N rows, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.leakage.defences import Defence
from evaluation.leakage.exact_search import Trials
from evaluation.leakage.inversion import LinearMap
from evaluation.leakage.split_model import Codecs, SplitModel, run_each

BY_ROW = 48  # tokens that a row resembles and that are tried
BY_PRIOR = 16  # that the model expects
ROUNDS = 8
QUANTILES = 101


class PriorSearch:
    """With all of the model's weights, and knowing the defence."""

    def __init__(self, split: SplitModel, defence: Defence, first_token: int) -> None:
        self._split = split
        self._defence = defence
        alone = run_each(split.ends.head, range(split.ends.vocabulary), [first_token])
        self._alone = self._see(alone)  # (V, D)

    def recover(self, seen: Tensor, codecs: Codecs) -> list[int]:
        """The tokens of one session's rows (T, D)."""
        trials, reader = Trials(self._split.ends.head), self._split.open_reader(codecs)
        prior = torch.zeros(len(self._alone))
        found: list[int] = []
        for row in self._defence.whiten(seen):
            found.append(self._find(trials, row, prior))
            trials.accept(found[-1])
            prior = torch.log_softmax(reader.read(found[-1:]), dim=0)
        return found

    def _find(self, trials: Trials, row: Tensor, prior: Tensor) -> int:
        count = min(BY_ROW, len(self._alone))
        nearest = (self._alone - row).norm(dim=1).topk(count, largest=False).indices
        likely = prior.topk(BY_PRIOR).indices
        tried: list[int] = sorted({*nearest.tolist(), *likely.tolist()})
        rows = self._see(trials.try_next(tried))
        weights = prior[tried] - (rows - row).square().sum(dim=1) / 2
        return tried[int(weights.argmax())]

    def _see(self, rows: Tensor) -> Tensor:
        return self._defence.whiten(self._defence.expect(rows))


def align(rotated: Tensor, known: Tensor, own: Tensor, own_tokens: Tensor) -> Tensor:
    """The tokens (N,) of rows (N, D) that were all turned by one secret orthogonal matrix.

    `known` are the first of them as they were before, (n, D), which a prompt that is known gives
    anyone with a head; `own` are other rows (…, D), of known tokens.
    """
    reader = LinearMap(own, own_tokens)
    means = {int(t): own[own_tokens == t].mean(dim=0) for t in set(own_tokens.tolist())}
    back = _procrustes(rotated[: len(known)], known)
    # until more is known, rows are compared in the directions that the known ones span
    _, _, axes = torch.linalg.svd(known - known.mean(dim=0), full_matrices=False)
    axes = axes[: max(1, len(known) * 3 // 4)].T
    tokens = LinearMap(own @ axes, own_tokens).recover(rotated @ back @ axes)
    for _ in range(ROUNDS):
        back = _procrustes(rotated, torch.stack([means[int(token)] for token in tokens]))
        tokens = reader.recover(rotated @ back)
    return tokens


def sort_by_known_rows(shuffled: Tensor, known: Tensor) -> Tensor:
    """The channels of rows (N, D) back in order, whose first ones were `known` (n, D)."""
    return shuffled[:, _match(known, shuffled[: len(known)])]


def sort_by_statistics(shuffled: Tensor, own: Tensor, own_tokens: Tensor) -> Tensor:
    """The same without knowing any: channels of `own` rows are spread alike.

    What that leaves open is found by naming all rows and matching channels anew, in turns.
    """
    reader = LinearMap(own, own_tokens)
    means = {int(t): own[own_tokens == t].mean(dim=0) for t in set(own_tokens.tolist())}
    shares = torch.linspace(0, 1, QUANTILES)
    order = _match(own.quantile(shares, dim=0), shuffled.quantile(shares, dim=0))
    for _ in range(ROUNDS):
        tokens = reader.recover(shuffled[:, order])
        order = _match(torch.stack([means[int(token)] for token in tokens]), shuffled)
    return shuffled[:, order]


def _match(plain: Tensor, shuffled: Tensor) -> Tensor:
    """For each channel (D,) of plain rows the shuffled one that is nearest to it."""
    return torch.cdist(plain.T, shuffled.T).argmin(dim=1)


def _procrustes(rotated: Tensor, plain: Tensor) -> Tensor:
    """The orthogonal matrix (D, D) that brings rows nearest to plain ones (Schönemann, 1966)."""
    left, _, right = torch.linalg.svd(rotated.T @ plain)
    back: Tensor = left @ right
    return back
