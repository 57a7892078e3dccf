"""Each attack by its name: what it makes of what an operator has of some sessions.

| attack | has of the model | and besides |
|---|---|---|
| exact-search | the head's weights | |
| nearest-embedding | the embedding table | |
| linear-map, network | a head to ask | rows of texts of their own |
| known-plaintext | nothing | 64 tokens of the sessions |
| downlink | the tail's weights | |
| drafted-rows | the head's weights | what was read so far |

The last reads what was never written: rows of guesses that were wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evaluation.leakage.drafts import list_wrong_guesses
from evaluation.leakage.exact_search import ExactSearch
from evaluation.leakage.inversion import (
    LinearMap,
    NearestEmbedding,
    Network,
    RowAttack,
    know_plaintext,
)
from evaluation.leakage.split_model import Codecs, Conversation, SplitModel

NOTHING = -1  # a token of which an attack does not see anything
GIVEN = -2  # one that was known before
KNOWN_TOKENS = 64
DRAFTED = "drafted-rows"

Guesses = list[list[int]]  # of each session, for each token that it sent


@dataclass(frozen=True)
class Situation:
    """What an operator has: sessions at one cut with one codec, the model, texts of their own."""

    split: SplitModel
    codecs: Codecs
    conversations: Sequence[Conversation]
    own_texts: Sequence[Sequence[int]]

    def of_wrong_guesses(self) -> Situation:
        """The steps of these sessions that took wrong guesses along."""
        wrong = [
            step
            for each in self.conversations
            for step in list_wrong_guesses(self.split, each, self.codecs)
        ]
        return replace(self, conversations=wrong)

    @functools.cached_property
    def own_rows(self) -> Tensor:
        """What the head makes of the attacker's texts, through the codec: (N, D)."""
        return torch.cat([self.split.send(text, self.codecs) for text in self.own_texts])

    @functools.cached_property
    def own_tokens(self) -> Tensor:
        return torch.tensor([token for text in self.own_texts for token in text])


def search_exactly(situation: Situation) -> Guesses:
    ends = situation.split.ends
    first_token = situation.conversations[0].token_ids[0]
    search = ExactSearch([ends.head], ends.vocabulary, first_token)
    up = situation.codecs.up
    return [search.recover(each.up, up) for each in situation.conversations]


def read_drafted_rows(situation: Situation) -> Guesses:
    """By exact search, behind what stood before the guesses: `situation` is that of wrong ones."""
    ends = situation.split.ends
    if not situation.conversations:
        return []
    search = ExactSearch([ends.head], ends.vocabulary, situation.conversations[0].token_ids[0])
    up, guesses = situation.codecs.up, []
    for each in situation.conversations:
        known = each.prompt_tokens
        found = search.recover(each.up[known:], up, before=each.token_ids[:known])
        guesses.append([GIVEN] * known + found)
    return guesses


def find_nearest_embedding(situation: Situation) -> Guesses:
    return _by_row(situation, NearestEmbedding(situation.split.embeddings))


def map_linearly(situation: Situation) -> Guesses:
    return _by_row(situation, LinearMap(situation.own_rows, situation.own_tokens))


def train_network(situation: Situation) -> Guesses:
    return _by_row(situation, Network(situation.own_rows, situation.own_tokens))


def use_known_plaintext(situation: Situation) -> Guesses:
    rows = torch.cat([each.up for each in situation.conversations])
    tokens = torch.tensor([t for each in situation.conversations for t in each.token_ids])
    guesses = _by_row(situation, know_plaintext(rows[:KNOWN_TOKENS], tokens[:KNOWN_TOKENS]))
    left = KNOWN_TOKENS
    for guess in guesses:
        given = min(left, len(guess))
        guess[:given] = [GIVEN] * given
        left -= given
    return guesses


def read_downlink(situation: Situation) -> Guesses:
    """What greedy choice takes after each row that comes back is the next token of an answer."""
    logits = [situation.split.read_downlink(each.down) for each in situation.conversations]
    return [[NOTHING, *each.argmax(dim=1).tolist()[:-1]] for each in logits]


def _by_row(situation: Situation, attack: RowAttack) -> Guesses:
    return [attack.recover(each.up).tolist() for each in situation.conversations]


ATTACKS: dict[str, Callable[[Situation], Guesses]] = {
    "exact-search": search_exactly,
    "nearest-embedding": find_nearest_embedding,
    "linear-map": map_linearly,
    "network": train_network,
    "known-plaintext": use_known_plaintext,
    "downlink": read_downlink,
    DRAFTED: read_drafted_rows,
}
