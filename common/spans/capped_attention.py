"""Attention with a soft cap (Gemma 2) or with sinks (gpt-oss), which torch's own has not.

A cap c makes a score s no larger than c: c tanh(s / c). A sink is a score of each head that belongs
to no key: what it gets of the softmax is lost. Both are the arithmetic of the papers' own code, in
float32 where scores become shares.

Letters: T tokens, K keys, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def capped_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    *,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Query (1, H, T, D) over keys and values (1, fewer H, K, D); returns (1, T, H, D).

    `mask` says which keys a row sees, bool (…, T, K); without it the last row sees all, and each
    row before it one less. `sinks` has shape (H,).
    """
    heads, rows = query.shape[1:3]
    groups = heads // keys.shape[1]
    keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
    scores = (
        query @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is None and rows > 1:
        count = keys.shape[2]
        seen = torch.ones(rows, count, dtype=torch.bool, device=query.device)
        mask = seen.tril(count - rows)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, heads, 1, 1).expand(1, heads, rows, 1).to(scores.dtype)
        scores = torch.cat([scores, column], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    return (shares[..., : keys.shape[2]] @ values).transpose(1, 2).contiguous()
