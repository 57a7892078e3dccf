"""Tokens per round trip: what a drafter would have saved in writing texts that are known.

A round trip runs the last token and the guesses after it, and gives a token for each guess that was
right, and one more. The prompt's own round trip, which gives the first new token, is not counted:
it is made with and without drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from edge_agent.text.drafting.drafter import Draft, Drafter


@dataclass(frozen=True, slots=True, eq=False)
class KnownText:
    """A prompt and what was written after it. Letters: T tokens, D hidden size.

    `boundary` and `tail_inputs`, (T, D), are the rows of its tokens, for drafters that see them.
    """

    token_ids: Sequence[int]
    prompt: int  # tokens of it
    boundary: Tensor | None = None
    tail_inputs: Tensor | None = None


def tokens_per_round_trip(
    open_drafter: Callable[[KnownText], Drafter], texts: Iterable[KnownText], limit: int
) -> float:
    """Of all texts together; each has a drafter of its own. NaN where nothing was written."""
    tokens = trips = 0
    for text in texts:
        more, done = _write(open_drafter(text), text, limit)
        tokens, trips = tokens + more, trips + done
    return tokens / trips if trips else float("nan")


def _write(drafter: Drafter, text: KnownText, limit: int) -> tuple[int, int]:
    """Tokens after the first new one, and round trips."""
    end, at, trips, seen = len(text.token_ids), text.prompt + 1, 0, 0
    begin = at
    while at < end:
        _show(drafter, text, seen, at - 1)
        seen = at - 1
        drafts = drafter.propose(text.token_ids[:at], min(limit, end - at - 1))
        at += count_right(drafts, text.token_ids[at:]) + 1
        trips += 1
    return end - begin, trips


def _show(drafter: Drafter, text: KnownText, begin: int, end: int) -> None:
    if text.boundary is not None and text.tail_inputs is not None:
        drafter.observe(text.boundary[begin:end], text.tail_inputs[begin:end])


def count_right(drafts: Sequence[Draft], following: Sequence[int]) -> int:
    """Of the first guesses, up to one that is wrong."""
    right = 0
    for draft, token in zip(drafts, following, strict=False):
        if draft.token_id != token:
            break
        right += 1
    return right
