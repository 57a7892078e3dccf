"""Read a text file for calibration and evaluation into token ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common.console.inputs import read_text
from common.errors import SettingsError
from edge_agent.text.tokenizer import TextTokenizer

FEWEST_TOKENS = 64  # of fewer, a mean says more of the text than of the model


def read_tokens(
    path: Path,
    tokenizer: TextTokenizer,
    documents: bool,
    max_tokens: int | None,
    *,
    least: int = 2,
    named: str = "--text",
) -> list[int]:
    """The first `max_tokens` tokens of a text; `named` is what names it.

    With `documents`, blank lines separate documents, which are joined by the tokenizer's end and
    beginning tokens, as texts are packed in training. Raises SettingsError for fewer tokens than
    `least`.
    """
    text = read_text(path, named)
    if documents:
        ids = []
        for document in _split_documents(text):
            ids += [*tokenizer.encode(document), *tokenizer.end_ids]
    else:
        ids = tokenizer.encode(text) if text.strip() else []
    ids = ids[:max_tokens]
    if len(ids) < least:
        cut = f" with at most {max_tokens:,} taken" if len(ids) == max_tokens else ""
        raise SettingsError(
            f"{named} {path} has {len(ids)} tokens{cut}; at least {least} are needed"
        )
    return ids


def read_prompts(
    path: Path, tokenizer: TextTokenizer, documents: bool, length: int
) -> list[list[int]]:
    """A text as prompts of at most `length` tokens, none of fewer than 2.

    With `documents` each is the beginning of one, else they follow on each other, each with the
    mark that begins a text, if the tokenizer sets one. Raises SettingsError.
    """
    text = read_text(path, "--text")
    if documents:
        prompts = [tokenizer.encode(document)[:length] for document in _split_documents(text)]
    else:
        ids = tokenizer.encode(text) if text.strip() else []
        marks = [token for token in ids[:1] if tokenizer.is_special(token)]
        step = max(1, length - len(marks))
        own = ids[len(marks) :]
        prompts = [marks + piece for piece in cut_windows(own, step)]
    return [prompt for prompt in prompts if len(prompt) > 1]


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty; at least one. Raises SettingsError."""
    text = read_text(path, "--text")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise SettingsError(f"--text {path} has no lines; expected a prompt on each")
    return lines


def cut_windows(token_ids: Sequence[int], length: int) -> list[list[int]]:
    """Pieces of `length` tokens that follow on each other; the last may be shorter."""
    return [list(token_ids[at : at + length]) for at in range(0, len(token_ids), length)]


def _split_documents(text: str) -> list[str]:
    """What blank lines separate."""
    return [part.strip() for part in text.split("\n\n") if part.strip()]
