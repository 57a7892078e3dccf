"""Guesses that were wrong: their rows went up as well, for tokens that nobody has written.

A session guesses here by the table of n-grams that lies with the model, or from its own text where
there is none; the trained layer guesses likelier tokens and gives no other kind of row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch

from edge_agent.text.drafting.choice import find_table
from edge_agent.text.drafting.drafter import Drafter
from edge_agent.text.drafting.lookup import LookupDrafter
from edge_agent.text.drafting.measure import count_right
from edge_agent.text.drafting.ngram import NgramDrafter
from edge_agent.text.ends import ModelEnds
from evaluation.leakage.split_model import Codecs, Conversation, SplitModel

GUESSES = 4  # in a step
MOST_STEPS = 6  # of a session, with wrong guesses


def open_drafter(ends: ModelEnds) -> Drafter:
    table = find_table(ends, missing_is_fine=True)
    return NgramDrafter([table]) if table is not None else LookupDrafter()


def list_wrong_guesses(
    split: SplitModel, conversation: Conversation, codecs: Codecs
) -> list[Conversation]:
    """Some of a session's steps, with the wrong guesses that each took along.

    What the session had written by then, and the guesses that were right, count as a prompt.
    """
    return list(islice(_find_wrong(split, conversation, codecs), MOST_STEPS))


def _find_wrong(
    split: SplitModel, conversation: Conversation, codecs: Codecs
) -> Iterator[Conversation]:
    drafter, ids = open_drafter(split.ends), conversation.token_ids
    for end in range(conversation.prompt_tokens + 1, len(ids)):
        drafts = drafter.propose(ids[:end], GUESSES)
        right = count_right(drafts, ids[end:])
        if right < len(drafts) and end + right < len(ids):  # beyond it nobody knows what was right
            text = [*ids[:end], *(draft.token_id for draft in drafts)]
            rows = split.send(text, codecs)
            yield Conversation(text, end + right, rows, torch.empty(0))
