"""How much of the texts attacks have recovered: the lines of the table.

A token counts as recovered where the guess for its place is that token; marks such as the
beginning of a text count for nothing. Text similarity is of words: difflib's ratio, twice the words
in matching runs over all words, so a guess of the same letters in other words earns nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_agent.text.tokenizer import TextTokenizer
from evaluation.leakage.attacks import ATTACKS, DRAFTED, GIVEN, NOTHING, Guesses, Situation
from evaluation.leakage.split_model import Conversation, SplitModel
from evaluation.leakage.texts import Texts


@dataclass(frozen=True, slots=True)
class Leak:
    """What one attack recovers at one cut with one codec. Its fields are the columns."""

    attack: str
    cut: str
    codec: str
    recovered_percent: float  # of all tokens
    prompt_percent: float
    answer_percent: float
    similarity_percent: float  # of the texts


@dataclass(frozen=True, slots=True)
class Campaign:
    """Which attacks, with which codecs, and how long the answers are."""

    attacks: Sequence[str]
    codecs: Sequence[str]
    calibration: Path | None
    answer_tokens: int


def attack_model(
    split: SplitModel, texts: Texts, campaign: Campaign, tokenizer: TextTokenizer
) -> Iterator[list[Leak]]:
    """A line for each attack, codec by codec. Raises SettingsError before the first."""
    for codecs in [split.make_codecs(name, campaign.calibration) for name in campaign.codecs]:
        situation = Situation(
            split,
            codecs,
            [split.converse(prompt, campaign.answer_tokens, codecs) for prompt in texts.prompts],
            texts.others,
        )
        leaks = [measure(name, situation, tokenizer) for name in campaign.attacks]
        yield [leak for leak in leaks if leak is not None]


def measure(attack: str, situation: Situation, tokenizer: TextTokenizer) -> Leak | None:
    """Attack, and count; None if there is nothing to attack."""
    if attack == DRAFTED:
        situation = situation.of_wrong_guesses()
    if not situation.conversations:
        return None
    guesses: Guesses = ATTACKS[attack](situation)
    pairs = zip(situation.conversations, guesses, strict=True)
    kept = [_keep(conversation, guess, tokenizer) for conversation, guess in pairs]
    similar = [_compare(each, tokenizer) for each in kept]
    tokens = [token for each in kept for token in each]
    return Leak(
        attack,
        situation.split.name,
        situation.codecs.name,
        _percent(tokens),
        _percent([token for token in tokens if token.is_prompt]),
        _percent([token for token in tokens if not token.is_prompt]),
        round(100 * sum(similar) / len(similar), 1),
    )


@dataclass(frozen=True, slots=True)
class _Token:
    is_prompt: bool
    sent: int
    guessed: int


def _keep(
    conversation: Conversation, guess: Sequence[int], tokenizer: TextTokenizer
) -> list[_Token]:
    """What counts of a session."""
    pairs = enumerate(zip(conversation.token_ids, guess, strict=True))
    return [
        _Token(place < conversation.prompt_tokens, sent, guessed)
        for place, (sent, guessed) in pairs
        if guessed != GIVEN and not tokenizer.is_special(sent)
    ]


def _compare(tokens: Sequence[_Token], tokenizer: TextTokenizer) -> float:
    words = tokenizer.decode([token.sent for token in tokens]).split()
    guessed = [token.guessed for token in tokens if token.guessed != NOTHING]
    matcher = difflib.SequenceMatcher(None, words, tokenizer.decode(guessed).split(), False)
    return matcher.ratio()


def _percent(tokens: Sequence[_Token]) -> float:
    recovered = sum(token.sent == token.guessed for token in tokens)
    return round(100 * recovered / len(tokens), 2) if tokens else 0.0
