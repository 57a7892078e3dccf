"""Prompts and chats to token ids, judged before anything is computed or sent.

Chats go through the tokenizer's template, or one that was given. A template that wants roles to
alternate gets consecutive messages of one role as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from common.errors import SettingsError
from edge_agent.server.errors import refuse
from edge_agent.server.schema import Message, Prompt
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session_settings import count_new_tokens
from edge_agent.text.tokenizer import TextTokenizer

LONG_TEXT = 20_000  # characters, about 10 ms
ALL_THAT_FIT = 1 << 20  # new tokens, where neither request nor context says how many


class PromptReader:
    """Reads prompts for one model. `template` is a chat template instead of the tokenizer's."""

    def __init__(
        self, ends: ModelEnds, tokenizer: TextTokenizer, template: str | None = None
    ) -> None:
        self._ends = ends
        self._tokenizer = tokenizer
        self._template = template

    async def read(self, prompt: Prompt) -> list[int]:
        """Token ids; those that are given are taken as they are."""
        if not isinstance(prompt, str):
            return prompt
        return await _tokenize(len(prompt), lambda: self._tokenizer.tokenize(prompt))

    async def read_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a chat. Raises RequestFault."""
        if self._template is None and not self._tokenizer.has_chat_template:
            raise refuse(
                f"{self._ends.name} has no chat template, so nobody knows how it wants a chat to "
                "be written; start the server with --chat-template FILE, or use /v1/completions",
                "messages",
                "no_chat_template",
            )
        said = [_as_template_has_it(message) for message in messages]
        length = sum(len(message["content"]) for message in said)
        try:
            return await _tokenize(length, lambda: self._render(said))
        except SettingsError as error:
            raise refuse(str(error), "messages") from error

    def _render(self, said: list[dict[str, str]]) -> list[int]:
        joined = join_same_roles(said)
        try:
            return self._tokenizer.render_chat(said, self._template)
        except SettingsError:
            if len(joined) == len(said):
                raise
            return self._tokenizer.render_chat(joined, self._template)

    def check(
        self, prompt_ids: Sequence[int], max_new_tokens: int, score_prompt: bool, field: str
    ) -> None:
        """Raises RequestFault for a prompt that the model cannot take."""
        try:
            count_new_tokens(self._ends, prompt_ids, max_new_tokens, score_prompt)
        except SettingsError as error:
            is_long = self._ends.context is not None and len(prompt_ids) >= self._ends.context
            code = "context_length_exceeded" if is_long else None
            raise refuse(str(error), field, code) from error

    def check_bias(self, bias: dict[int, float] | None) -> None:
        """Raises RequestFault for a token that the model does not have."""
        largest = max(bias or {}, default=0)
        if largest >= self._ends.vocabulary:
            raise refuse(
                f"logit_bias names token {largest}; {self._ends.name} has 0 to "
                f"{self._ends.vocabulary - 1}",
                "logit_bias",
            )


async def _tokenize(length: int, work: Callable[[], list[int]]) -> list[int]:
    """What takes long keeps nobody else waiting: tokenizers are busy without Python's lock."""
    return work() if length < LONG_TEXT else await asyncio.to_thread(work)


def _as_template_has_it(message: Message) -> dict[str, str]:
    role = "system" if message.role == "developer" else message.role
    name = {"name": message.name} if message.name is not None else {}
    return {"role": role, "content": message.content, **name}


def join_same_roles(said: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Messages with those that follow one of the same role and name joined to it."""
    joined: list[dict[str, str]] = []
    for message in said:
        before = joined[-1] if joined else {}
        if (before.get("role"), before.get("name")) == (message["role"], message.get("name")):
            joined[-1] = before | {"content": f"{before['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined
