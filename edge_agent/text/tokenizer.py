"""Text to token ids and back, also piece by piece while a text is being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, SettingsError, in_one_line
from common.weights.model_files import check_plain_files

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to


class TextTokenizer:
    """The tokenizer of a Hugging Face directory. Raises CheckpointError when there is none."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        check_plain_files(directory)
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # tokenizers raises bare ones for what it cannot read
            raise CheckpointError(
                f"{directory} has no usable tokenizer: {in_one_line(error)}"
            ) from error

    def encode(self, prompt: str) -> list[int]:
        """Token ids with the tokenizer's own special tokens. Raises SettingsError if empty."""
        if not prompt.strip():
            raise SettingsError("the prompt is empty; give a text, or - to read one from stdin")
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    @property
    def end_ids(self) -> list[int]:
        """What ends a document: the end-of-sequence token, if there is one."""
        end = self._tokenizer.eos_token_id
        return [] if end is None else [end]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


class TextStream:
    """Turns tokens into text as they come: what is handed out is never taken back.

    A text may end in the middle of a character; and in some vocabularies a token's text depends on
    the one before it. So a few tokens are decoded together again, and only what is new and whole
    is handed out.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-4:])
        self._shown = tokenizer.decode(self._ids)

    def add(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        self._ids.append(token_id)
        text = self._tokenizer.decode(self._ids)
        if text.endswith(REPLACEMENT) or len(text) < len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._ids = self._ids[-4:]
        self._shown = self._tokenizer.decode(self._ids)
        return new
