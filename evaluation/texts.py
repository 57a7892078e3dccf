"""Read a text file for calibration and evaluation into token ids."""

from __future__ import annotations

from pathlib import Path

from common.errors import SettingsError
from edge_agent.text.tokenizer import TextTokenizer


def read_tokens(
    path: Path, tokenizer: TextTokenizer, documents: bool, max_tokens: int | None
) -> list[int]:
    """The first `max_tokens` tokens of a text.

    With `documents`, blank lines separate documents, which are joined by the tokenizer's end and
    beginning tokens, as texts are packed in training. Raises SettingsError for a text too short.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--text {path} cannot be read: {error}") from error
    if documents:
        ids = []
        for document in filter(None, (part.strip() for part in text.split("\n\n"))):
            ids += [*tokenizer.encode(document), *tokenizer.end_ids]
    else:
        ids = tokenizer.encode(text) if text.strip() else []
    ids = ids[:max_tokens]
    if len(ids) < 2:
        raise SettingsError(f"--text {path} has {len(ids)} tokens; at least 2 are needed")
    return ids
