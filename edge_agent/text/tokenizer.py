"""Text to token ids and back, also piece by piece while a text is being written; and chats."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import CheckpointError, SettingsError, in_one_line
from common.formats.tokenizer_bin import TOKENIZER_BIN
from common.weights.model_files import check_plain_files
from edge_agent.text.scored_tokenizer import ScoredTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an unfinished UTF-8 sequence decodes to
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's space


def _spell_bytes() -> dict[str, int]:
    """The character that stands for each byte in byte-level vocabularies, as GPT-2's code has it.

    Bytes that are printable in Latin-1 stand for themselves, the others come after 255 in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable}
    return spelled | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF = _spell_bytes()


class TextTokenizer:
    """The tokenizer of a Hugging Face directory, or one of llama2.c, there or in `file`.

    Raises CheckpointError when there is none.
    """

    def __init__(self, directory: Path, file: Path | None = None) -> None:
        check_plain_files(directory)
        if file is None and ScoredTokenizer.is_in(directory):
            file = directory / TOKENIZER_BIN
        self._tokenizer: Any = _load_tokenizer(directory) if file is None else ScoredTokenizer(file)
        self._special_ids = frozenset(self._tokenizer.all_special_ids)
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        self._is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))

    def encode(self, prompt: str) -> list[int]:
        """Token ids with the tokenizer's own special tokens. Raises SettingsError if empty."""
        if not prompt.strip():
            raise SettingsError("the prompt is empty; give a text, or - to read one from stdin")
        return self.tokenize(prompt)

    def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of any text, also of none."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def render_chat(self, messages: Sequence[Mapping[str, str]], template: str | None) -> list[int]:
        """Token ids of a chat up to where the answer begins; `template` instead of its own.

        Raises SettingsError when the template does not take these messages.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates raise what they like
            raise SettingsError(f"the chat template refuses this: {in_one_line(error)}") from error
        return self.tokenize(text, add_special_tokens=False)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is no text but a mark, as an end of text is."""
        return token_id in self._special_ids

    def name(self, token_id: int) -> str:
        """What the vocabulary calls a token; nothing beyond its end."""
        return self._tokenizer.convert_ids_to_tokens(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own UTF-8, which may be a part of a character; of a mark nothing."""
        name = self.name(token_id)
        if self.is_special(token_id):
            return b""
        if self._is_byte_level and all(character in BYTE_OF for character in name):
            return bytes(BYTE_OF[character] for character in name)
        if re.fullmatch("<0x[0-9A-F]{2}>", name):  # SentencePiece's
            return bytes([int(name[3:5], 16)])
        return name.replace(WORD_START, " ").encode()

    @property
    def end_ids(self) -> list[int]:
        """What ends a document: the end-of-sequence token, if there is one."""
        end = self._tokenizer.eos_token_id
        return [] if end is None else [end]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text


def _load_tokenizer(directory: Path) -> Any:
    """The library's. Raises CheckpointError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises bare ones for what it cannot read
        raise CheckpointError(
            f"{directory} has no usable tokenizer: {in_one_line(error)}"
        ) from error


class TextStream:
    """Turns tokens into text as they come: what is handed out is never taken back.

    A text may end in the middle of a character; and in some vocabularies a token's text depends on
    the one before it. So a few tokens are decoded together again, and only what is new and whole
    is handed out.
    """

    def __init__(self, tokenizer: TextTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-4:])
        self._shown = tokenizer.decode(self._ids).rstrip(REPLACEMENT)  # a character may be begun

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
