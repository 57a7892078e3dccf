"""A table of what follows on a few tokens, beside a model: made of texts, looked up fast.

For contexts of 1 to ORDER tokens it has the likeliest next token and its share of all that came,
smoothed: best / (all + 1/4), in 255ths. A context is known by 32 bits of a hash of its tokens, one
sorted list for all lengths, so a guess is a few binary searches, the longest context first. A
context that says what the next shorter one says is left out. Two contexts of one hash are told
apart by nothing: among 500,000 one lookup in 8,600 of a context that is not there finds another's,
which costs a wrong guess.

Letters: N contexts, T tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import CheckpointError, SettingsError
from common.weights.model_files import check_plain_file
from edge_agent.text.drafting.files import replace_file

TENSORS = "keys", "tokens", "shares"
FORMAT = "midspan-ngrams/1"
ORDER = 8  # tokens of the longest context
LARGEST = 500_000  # contexts: 3.5 MB
LEVELS = 16  # of shares; contexts whose share is of one level say the same
PRIOR = 0.25  # what was seen once is right four times in five
FACTOR, WORD = 0x9E3779B97F4A7C15, (1 << 64) - 1  # 2**64 / golden ratio: Fibonacci hashing
Array = np.ndarray[Any, np.dtype[Any]]


class Guess(NamedTuple):
    """What is likeliest to follow."""

    token_id: int
    share: float  # smoothed
    length: int  # tokens of the context


class NgramTable:
    """Made of the arrays that its file holds."""

    def __init__(self, keys: Array, tokens: Array, shares: Array, vocabulary: int) -> None:
        """`keys` (N,) uint32, sorted; `tokens` (N,) uint16 or uint32; `shares` (N,) uint8."""
        self.vocabulary = vocabulary
        self._arrays = keys, tokens, shares
        self._keys, self._tokens, self._shares = (_view(array) for array in self._arrays)

    def __len__(self) -> int:
        return len(self._keys)

    def guess(self, token_ids: Sequence[int]) -> Guess | None:
        """What follows on the longest context at the end of these tokens that is known."""
        keys = hash_ending(token_ids)
        for length in range(len(keys), 0, -1):
            key = keys[length - 1]
            at = bisect_left(self._keys, key)
            if at < len(self._keys) and self._keys[at] == key:
                return Guess(self._tokens[at], self._shares[at] / 255, length)
        return None

    def save(self, path: Path, **more: str) -> None:
        """Write its file; `more` is said of it as well."""
        arrays = dict(zip(TENSORS, self._arrays, strict=True))
        about = {"format": FORMAT, "vocabulary": str(self.vocabulary), **more}
        replace_file(path, save(arrays, metadata=about))


def load_table(path: Path, vocabulary: int) -> NgramTable:
    """Read what `save` wrote, for a model of so many tokens.

    Raises CheckpointError if it is not there, broken, or of another vocabulary.
    """
    check_plain_file(path)
    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            arrays = [file.get_tensor(name) for name in TENSORS]
        _check(about, arrays, vocabulary)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no usable table of n-grams: {error}") from error
    keys, tokens, shares = arrays
    return NgramTable(keys, tokens, shares, vocabulary)


def _check(about: Mapping[str, str], arrays: Sequence[Array], vocabulary: int) -> None:
    """Raises ValueError."""
    if about.get("format") != FORMAT:
        raise ValueError(f"its format is {about.get('format', 'none')!r}; expected {FORMAT!r}")
    if about.get("vocabulary") != str(vocabulary):
        raise ValueError(
            f"it was made for a vocabulary of {about.get('vocabulary')} tokens, "
            f"and the model's has {vocabulary}"
        )
    keys, tokens, shares = arrays
    kinds = [array.dtype.name for array in arrays]
    if kinds != ["uint32", _token_type(vocabulary), "uint8"]:
        raise ValueError(f"its tensors are of {kinds}")
    if keys.ndim != 1 or not keys.shape == tokens.shape == shares.shape:
        raise ValueError(f"its tensors have shapes {[array.shape for array in arrays]}")
    if (keys[1:] <= keys[:-1]).any() or (tokens >= vocabulary).any():
        raise ValueError("its contexts are not in order, or its tokens not of the vocabulary")


def _token_type(vocabulary: int) -> str:
    return "uint16" if vocabulary <= 1 << 16 else "uint32"


def _view(array: Array) -> Sequence[int]:
    """Its numbers one by one: several times faster than numpy's own."""
    view: Any = memoryview(array)  # type: ignore[arg-type]
    return view  # type: ignore[no-any-return]


def hash_ending(token_ids: Sequence[int]) -> list[int]:
    """32 bits for each of the last 1 to ORDER tokens."""
    keys, state = [], 0
    for token in token_ids[: -ORDER - 1 : -1]:
        state = ((state ^ (token + 1)) * FACTOR) & WORD
        state ^= state >> 29
        keys.append(state >> 32)
    return keys


def hash_endings(token_ids: Array) -> list[Array]:
    """As `hash_ending` for the beginnings of a text (T,): arrays (T - n + 1,) uint32 by length."""
    tokens, keys = token_ids.astype(np.uint64) + np.uint64(1), []
    state = np.zeros(len(tokens), dtype=np.uint64)
    for length in range(1, min(ORDER, len(tokens)) + 1):
        state = state[1:] if length > 1 else state
        state = (state ^ tokens[: len(tokens) - length + 1]) * np.uint64(FACTOR)
        state ^= state >> np.uint64(29)
        keys.append((state >> np.uint64(32)).astype(np.uint32))
    return keys


def build_table(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]], vocabulary: int, largest: int = LARGEST
) -> NgramTable:
    """Of texts (T,) and what follows on each of their tokens (T,).

    Of more than `largest` contexts those that were seen most often stay. Raises SettingsError for
    texts without tokens.
    """
    known: tuple[Array, Array, Array] = _nothing()
    kept: list[tuple[Array, Array, Array, Array]] = []
    for counted in _count(texts):
        keys, tokens, shares, totals, shorter = counted
        same = _says_same(known, shorter, tokens, shares)
        kept.append((keys[~same], tokens[~same], shares[~same], totals[~same]))
        known = keys, tokens, shares
    if not kept:
        raise SettingsError("the texts for a table of n-grams have no tokens")
    keys, tokens, shares, totals = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    often = np.argsort(-totals, kind="stable")[:largest]
    keys, first = np.unique(keys[often], return_index=True)
    often = often[first]
    tokens = tokens[often].astype(_token_type(vocabulary))
    return NgramTable(keys, tokens, shares[often], vocabulary)


def _nothing() -> tuple[Array, Array, Array]:
    return np.zeros(0, np.uint32), np.zeros(0, np.uint32), np.zeros(0, np.uint8)


def _says_same(
    known: tuple[Array, Array, Array], shorter: Array, tokens: Array, shares: Array
) -> Array:
    """Where the context that is one token shorter has the same token, about as often."""
    if not len(known[0]):
        return np.zeros(len(tokens), dtype=bool)
    at = np.searchsorted(known[0], shorter)
    step = 256 // LEVELS
    same: Array = (known[1][at] == tokens) & (known[2][at] // step == shares // step)
    return same


def _count(
    texts: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> list[tuple[Array, Array, Array, Array, Array]]:
    """By length of context: sorted keys, likeliest next tokens, shares, totals, shorter keys."""
    by_length: list[list[tuple[Array, Array, Array]]] = [[] for _ in range(ORDER)]
    for ids, following in texts:
        hashes, nexts = hash_endings(np.asarray(ids)), np.asarray(following, dtype=np.uint64)
        for length, keys in enumerate(hashes, 1):
            shorter = hashes[length - 2][1:] if length > 1 else keys
            by_length[length - 1].append((keys, nexts[length - 1 :], shorter))
    joined = [[np.concatenate(p) for p in zip(*parts, strict=True)] for parts in by_length if parts]
    return [_find_likeliest(*parts) for parts in joined]


def _find_likeliest(
    keys: Array, nexts: Array, shorter: Array
) -> tuple[Array, Array, Array, Array, Array]:
    pairs, counts = np.unique(keys.astype(np.uint64) << np.uint64(32) | nexts, return_counts=True)
    owners = (pairs >> np.uint64(32)).astype(np.uint32)
    unique, first = np.unique(owners, return_index=True)
    totals = np.add.reduceat(counts, first)
    order = np.lexsort((-counts, owners))  # of each context the most frequent first
    best = order[first]
    shares = (255 * counts[best] / (totals + PRIOR)).astype(np.uint8)
    _, places = np.unique(keys, return_index=True)
    tokens = (pairs[best] & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return unique, tokens, shares, totals, shorter[places]
