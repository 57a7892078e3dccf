"""A text divided into what sessions are asked and what the attacker has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import SettingsError
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.texts import read_prompts

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Texts:
    """Token ids of the sessions' prompts, and of texts of the attacker's own."""

    prompts: Prompts
    others: Prompts


@dataclass(frozen=True, slots=True)
class Division:
    """How much is whose, in tokens."""

    prompt_tokens: int  # of one prompt at most
    all_prompts_tokens: int
    pairs: int


def divide_text(
    path: Path, tokenizer: TextTokenizer, documents: bool, division: Division, vocabulary: int
) -> Texts:
    """Prompts from the beginning of a text; what follows is the attacker's.

    If that is too little, the attacker asks a head of their own for rows of random tokens.
    Raises SettingsError for a text too short.
    """
    texts = read_prompts(path, tokenizer, documents, division.prompt_tokens)
    prompts = _take(texts, division.all_prompts_tokens)
    if sum(map(len, prompts)) < 2:
        raise SettingsError(f"--text {path} has fewer than 2 tokens; nothing can be sought in it")
    others = _take(texts[len(prompts) :], division.pairs)
    lacking = division.pairs - sum(map(len, others))
    others += draw_texts(lacking, division.prompt_tokens, texts[0][0], vocabulary)
    return Texts(prompts, others)


def draw_texts(tokens: int, length: int, first_token: int, vocabulary: int) -> Prompts:
    """Random texts of `length` tokens that begin as others do; so many tokens at least."""
    generator = random.Random(0)
    return [
        [first_token, *(generator.randrange(vocabulary) for _ in range(length - 1))]
        for _ in range(-(-tokens // length))
    ]


def _take(texts: Sequence[list[int]], tokens: int) -> Prompts:
    """The first of them, of so many tokens in all; the last is cut off."""
    taken: Prompts = []
    for text in texts:
        if tokens <= 0:
            break
        taken.append(text[:tokens])
        tokens -= len(text)
    return taken
