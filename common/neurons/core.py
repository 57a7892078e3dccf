"""The core of a prompt: neurons that are among the largest for most of its tokens.

As CoreInfer (https://arxiv.org/abs/2410.18311) has it: each token votes for the largest of the
neurons that are positive for it, and those with the most votes are computed for the answer.

Letters: T tokens, M neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_votes(values: Tensor, share: float) -> Tensor:
    """For how many tokens of values (T, M) each neuron is among the largest: int32 (M,).

    Those are int(share x the number of positive ones).
    """
    most = ((values > 0).sum(-1).double() * share).long()  # (T,)
    widest = int(most.max()) if len(most) else 0
    if not widest:
        return torch.zeros(values.shape[-1], dtype=torch.int32, device=values.device)
    places = values.topk(widest, dim=-1).indices
    counted = torch.arange(widest, device=values.device) < most[:, None]
    return places[counted].bincount(minlength=values.shape[-1]).int()


def pick_core(votes: Tensor, ranks: Tensor, count: int) -> Tensor:
    """The places of the `count` neurons with the most votes, ascending, of votes (M,).

    Of equal ones that with the lower rank: everybody who has the votes picks the same.
    """
    keys = votes.long() * (int(ranks.max()) + 1) - ranks
    return keys.topk(count).indices.sort().values
