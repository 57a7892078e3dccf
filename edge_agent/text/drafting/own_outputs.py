"""What a model has written on this device, kept there to guess by: opt-in, for it is text.

One file per model in a directory of the user's, readable by them alone: token ids, 4 bytes each,
and a mark between answers. Token ids are text to whoever has the tokenizer. Any process appends
whole answers and, when the file is too large, replaces it by its newer half; both under a lock of
a file beside it. An answer that was cut off by a crash is less of an answer, nothing else.

The table is made anew when a fourth has been added, so adding costs the same at any size.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.errors import SettingsError
from edge_agent.text.drafting.files import replace_file
from edge_agent.text.drafting.ngram_table import Array, NgramTable, build_table

LARGEST_TOKENS = 250_000  # 1 MB; a table of them takes 0.4 s to make
FIRST_TABLE = 500  # tokens
MARK = 0xFFFFFFFF  # between answers
PRIVATE = 0o600


class OwnOutputs:
    """Those of one model. All who use a directory at once see each other's when they start."""

    def __init__(
        self, directory: Path, model: str, vocabulary: int, largest: int = LARGEST_TOKENS
    ) -> None:
        """`model` is its fingerprint. Raises SettingsError for a directory that cannot be used."""
        self.path = directory / f"{model}.tokens"
        self._vocabulary = vocabulary
        self._largest = largest
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._tokens: list[Array] = [self._read()]
        except OSError as error:
            raise SettingsError(
                f"the model's outputs cannot be kept in {directory}: {error.strerror or error}"
            ) from error
        self._built = self._held = len(self._tokens[0])
        self.table: NgramTable | None = self._build()

    def add(self, prompt_end: Sequence[int], answer: Sequence[int]) -> None:
        """Keep an answer, behind the last tokens of its prompt. Raises OSError."""
        tokens = np.array([*prompt_end, *answer, MARK], dtype=np.uint32)
        with self._locked():
            self._append(tokens.tobytes())
        self._tokens.append(tokens)
        self._held += len(tokens)
        if self._held - self._built > max(FIRST_TABLE, self._built // 4):
            self._rebuild()

    def _append(self, data: bytes) -> None:
        with open(os.open(self.path, os.O_RDWR | os.O_CREAT, PRIVATE), "r+b") as file:
            size = file.seek(0, os.SEEK_END) // 4 * 4  # a full disk may have cut a token in two
            file.seek(size)
            file.write(data)
        if size + len(data) > 4 * self._largest:
            self._halve()

    def _rebuild(self) -> None:
        self._tokens = [np.concatenate(self._tokens)[-self._largest :]]
        self._built = self._held = len(self._tokens[0])
        self.table = self._build()

    def _build(self) -> NgramTable | None:
        (tokens,) = self._tokens
        ends = np.flatnonzero(tokens == MARK)
        texts = [part[part != MARK] for part in np.split(tokens, ends)]
        pairs = [(text[:-1], text[1:]) for text in texts if len(text) > 1]
        return build_table(pairs, self._vocabulary) if pairs else None

    def _read(self) -> Array:
        """What is in the file, without what is of no token."""
        data = self.path.read_bytes() if self.path.exists() else b""
        tokens = np.frombuffer(data[: len(data) // 4 * 4], dtype=np.uint32)[-self._largest :]
        known: Array = tokens[(tokens < self._vocabulary) | (tokens == MARK)]
        return known

    def _halve(self) -> None:
        tokens = self._read()[-self._largest // 2 :]
        begins = np.flatnonzero(tokens == MARK)
        replace_file(self.path, tokens[begins[0] + 1 :].tobytes() if len(begins) else b"", PRIVATE)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """While no other process writes."""
        lock = self.path.with_suffix(".lock")
        with open(os.open(lock, os.O_WRONLY | os.O_CREAT, PRIVATE), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
