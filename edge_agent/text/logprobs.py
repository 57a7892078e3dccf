"""Log-probabilities of tokens, as the model has them: before temperature, bias and penalties."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from common.codecs.codec import LEFT_OUT
from common.errors import SettingsError

MOST_TOP = 100


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token's, and the likeliest ones in its place, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def check_top(top: int | None) -> None:
    """Raises SettingsError for a number of likeliest tokens that is not served."""
    if top is not None and not 0 <= top <= MOST_TOP:
        raise SettingsError(f"{top} top log-probabilities; expected 0 to {MOST_TOP}")


def rank(logits: Tensor, token_ids: list[int], top: int) -> list[TokenLogprob]:
    """Of each token, given the logits (T, vocabulary) in its place.

    Fewer likeliest tokens than `top` where codec `topK` has left the others out.
    """
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    own = logprobs.gather(1, torch.tensor(token_ids)[:, None])[:, 0].tolist()
    best = logprobs.topk(min(top, logits.shape[1]), dim=-1)
    places = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        TokenLogprob(token_id, logprob, tuple(_known(zip(ids, values, strict=True))))
        for token_id, logprob, (ids, values) in zip(token_ids, own, places, strict=True)
    ]


def _known(places: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    """Without the tokens that codec `topK` has left out."""
    return ((token_id, logprob) for token_id, logprob in places if logprob > LEFT_OUT)
