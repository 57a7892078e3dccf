"""A tokenizer.bin of llama2.c with as much of a Hugging Face tokenizer's face as we look at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.formats.tokenizer_bin import BEGIN_ID, END_ID, TOKENIZER_BIN, read_tokenizer

TEMPLATE = "chat_template.jinja"
# what templates are given for the marks: characters that no text has, so none is taken for one
BEGIN_MARK, END_MARK = "\ufdd0", "\ufdd1"
MARKS = {"bos_token": BEGIN_MARK, "eos_token": END_MARK}
MARK_IDS = {BEGIN_MARK: [BEGIN_ID], END_MARK: [END_ID]}


class ScoredTokenizer:
    """That of a file, with a chat template if one lies beside it. Raises CheckpointError."""

    all_special_ids = (BEGIN_ID, END_ID)
    eos_token_id = END_ID

    def __init__(self, file: Path) -> None:
        self._tokens = read_tokenizer(file)
        template = file.with_name(TEMPLATE)
        self.chat_template = template.read_text("utf-8") if template.exists() else None

    @staticmethod
    def is_in(directory: Path) -> bool:
        """Whether a model's directory has no other."""
        others = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
        return (directory / TOKENIZER_BIN).is_file() and not any(
            (directory / name).exists() for name in others
        )

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        if add_special_tokens:
            return {"input_ids": self._tokens.encode(text)}
        pieces = re.split(f"([{BEGIN_MARK}{END_MARK}])", text)
        encoded = (MARK_IDS.get(p) or self._tokens.encode(p, begins=False) for p in pieces)
        return {"input_ids": [token_id for ids in encoded for token_id in ids]}

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        chat_template: str | None,
        add_generation_prompt: bool,
        tokenize: bool,
    ) -> str:
        """A chat as text, by a template of the usual kind."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered, _ = render_jinja_template(
            [list(messages)],
            chat_template=chat_template or self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **MARKS,
        )
        text: str = rendered[0]
        return text

    def convert_ids_to_tokens(self, token_id: int) -> str | None:
        """A token's name; None beyond the vocabulary."""
        pieces = self._tokens.pieces
        return pieces[token_id].decode("utf-8", "replace") if token_id < len(pieces) else None

    def decode(self, token_ids: Any, skip_special_tokens: bool) -> str:
        """Text; an unfinished character is a replacement character, as everywhere."""
        assert skip_special_tokens
        return self._tokens.decode([int(i) for i in token_ids]).decode("utf-8", "replace")
