"""llama2.c's tokenizer.bin: tokens with scores, and the merging of the best pair first.

The same ids come out as of run.c, for every text. A merge table, as Hugging Face's tokenizers
have, would not do: it orders pairs, where run.c orders what pairs make, and takes the leftmost of
those that are equal; `a aa` and `aa a` are then told apart by their place alone.

What run.c does with each pair in each round is done here with a heap, so a long text costs no
square of its length.
"""

from __future__ import annotations

import heapq
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import CheckpointError
from common.weights.model_files import check_plain_file

TOKENIZER_BIN = "tokenizer.bin"
BEGIN_ID, END_ID = 1, 2
FIRST_BYTE_ID = 3  # of 256, one for each byte
LEAST_SCORE = -1e10  # what is not above it is never merged
RAW_BYTE = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
ENTRY = struct.Struct("<fi")
MAX_BYTES, MAX_TOKEN_BYTES = 256 << 20, 1 << 16


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """A vocabulary: bytes and score of each token, by id."""

    pieces: Sequence[bytes]
    scores: Sequence[float]
    longest: int  # bytes, as the file says
    ids: dict[bytes, int] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        ids: dict[bytes, int] = {}
        for token_id, piece in enumerate(self.pieces):
            ids.setdefault(piece, token_id)
        object.__setattr__(self, "ids", ids)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Token ids, the first of which is that of the beginning if `begins`."""
        ids = [BEGIN_ID] * begins
        if text:
            ids.append(self.ids[b" "])  # every text begins with a space
        for character in text:
            data = character.encode("utf-8", "replace")
            found = self.ids.get(data)
            ids += [byte + FIRST_BYTE_ID for byte in data] if found is None else [found]
        return self._merge(ids)

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge the pair that makes the token of the highest score, the leftmost of equal ones."""
        follows = [*range(1, len(ids)), -1]
        precedes = list(range(-1, len(ids) - 1))
        is_gone = [False] * len(ids)
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(at: int) -> None:
            """Put the pair that begins at a place into the heap, if it makes a token."""
            right = follows[at] if at >= 0 else -1
            if right < 0:
                return
            made = self.ids.get(self.pieces[ids[at]] + self.pieces[ids[right]])
            if made is not None and self.scores[made] > LEAST_SCORE:
                heapq.heappush(heap, (-self.scores[made], at, made, ids[at], ids[right]))

        for at in range(len(ids)):
            offer(at)
        while heap:
            _, at, made, left_id, right_id = heapq.heappop(heap)
            right = follows[at]
            if is_gone[at] or right < 0 or (ids[at], ids[right]) != (left_id, right_id):
                continue  # one of them has been merged with another
            ids[at], is_gone[right] = made, True
            follows[at] = follows[right]
            if follows[at] >= 0:
                precedes[follows[at]] = at
            offer(precedes[at])
            offer(at)
        return [token_id for token_id, gone in zip(ids, is_gone, strict=True) if not gone]

    def decode(self, ids: Sequence[int]) -> bytes:
        """The text's UTF-8, without the marks of beginning and end and what has no token.

        What stands behind the beginning loses the space that every text begins with.
        """
        parts = []
        before = -1
        for token_id in ids:
            if token_id not in (BEGIN_ID, END_ID) and token_id < len(self.pieces):
                piece = self.pieces[token_id]
                parts.append(spell(piece[before == BEGIN_ID and piece.startswith(b" ") :]))
            before = token_id
        return b"".join(parts)


def spell(piece: bytes) -> bytes:
    """What a token writes: itself, or the byte that it names."""
    match = RAW_BYTE.fullmatch(piece)
    return bytes([int(match[1], 16)]) if match else piece


def read_tokenizer(path: Path) -> ScoredTokens:
    """Raises CheckpointError for what is no tokenizer of llama2.c."""
    check_plain_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} has more than {MAX_BYTES} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) < 4:
        raise CheckpointError(f"{path} is too short for a tokenizer of llama2.c")
    pieces: list[bytes] = []
    scores: list[float] = []
    at = 4
    while at < len(data):
        end = at + ENTRY.size
        score, length = ENTRY.unpack_from(data, at) if end <= len(data) else (0.0, -1)
        if not 0 <= length <= MAX_TOKEN_BYTES or end + length > len(data) or score != score:
            raise CheckpointError(
                f"{path} is no tokenizer of llama2.c: token {len(pieces)} is broken"
            )
        pieces.append(data[end : end + length])
        scores.append(score)
        at = end + length
    tokens = ScoredTokens(pieces, scores, struct.unpack_from("<i", data)[0])
    _check(tokens, path)
    return tokens


def _check(tokens: ScoredTokens, path: Path) -> None:
    if len(tokens.pieces) < FIRST_BYTE_ID + 256 or b" " not in tokens.ids:
        raise CheckpointError(
            f"{path} has {len(tokens.pieces)} tokens; expected 3 marks, 256 bytes and more, a "
            "space among them"
        )


def write_tokenizer(tokens: ScoredTokens, path: Path) -> None:
    """Write a tokenizer.bin."""
    entries = zip(tokens.pieces, tokens.scores, strict=True)
    body = b"".join(ENTRY.pack(score, len(piece)) + piece for piece, score in entries)
    path.write_bytes(struct.pack("<i", tokens.longest) + body)
