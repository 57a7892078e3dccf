"""Log-probabilities as OpenAI writes them, in chats and in completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_agent.server.answers import ShownToken
from edge_agent.text.tokenizer import TextTokenizer


class ChatLogprobs:
    """Tokens with their bytes. Marks, as the end of a text, are no part of it and are left out."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer

    def write(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        shown = [token for token in tokens if not self._tokenizer.is_special(token.token_id)]
        return {"content": [self._write_token(token) for token in shown], "refusal": None}

    def _write_token(self, token: ShownToken) -> dict[str, Any]:
        assert token.logprob is not None
        own = bytes_of(self._tokenizer, token)
        top = []
        for token_id, logprob in token.logprob.top:
            text, its_bytes = token.text, own
            if token_id != token.token_id:
                text = spell(self._tokenizer, token_id)
                its_bytes = self._tokenizer.token_bytes(token_id)
            top.append({"token": text, "logprob": logprob, "bytes": list(its_bytes)})
        return {
            "token": token.text,
            "logprob": token.logprob.logprob,
            "bytes": list(own),
            "top_logprobs": top,
        }


class CompletionLogprobs:
    """Four lists with an entry for every token; offsets are into the text of the choice."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0

    def write(self, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """Of the tokens that follow those of the last call."""
        written: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": [],
        }  # fmt: skip
        for token in tokens:
            name = token.text or spell(self._tokenizer, token.token_id)
            logprob = token.logprob
            written["tokens"].append(name)
            written["token_logprobs"].append(logprob.logprob if logprob else None)
            written["top_logprobs"].append(self._list_top(token, name))
            written["text_offset"].append(self._offset)
            self._offset += len(token.text)
        return written

    def _list_top(self, token: ShownToken, name: str) -> dict[str, float] | None:
        """The likeliest and the token itself; of two with one text the likelier."""
        if token.logprob is None:
            return None
        own = token.token_id
        top: dict[str, float] = {}
        for token_id, logprob in (*token.logprob.top, (own, token.logprob.logprob)):
            text = name if token_id == own else spell(self._tokenizer, token_id)
            top.setdefault(text, logprob)
        return top


def bytes_of(tokenizer: TextTokenizer, token: ShownToken) -> bytes:
    """What a token adds to the text: itself, unless it is a part of a character."""
    own = tokenizer.token_bytes(token.token_id)
    return own if _is_cut_character(own) else token.text.encode()


def spell(tokenizer: TextTokenizer, token_id: int) -> str:
    """A token by itself: its text, a mark's name, or the bytes of a part of a character."""
    if tokenizer.is_special(token_id):
        return tokenizer.name(token_id)
    own = tokenizer.token_bytes(token_id)
    if _is_cut_character(own):
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in own)
    return own.decode()


def _is_cut_character(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return True
    return False
