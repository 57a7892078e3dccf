"""What chat and completions send: the same course of events, in two shapes.

A shape says how a choice looks, whole or in part. Of several choices each has a state of its own
(offsets, whether its role was said), so a shape is made for one answer.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from common.errors import MidspanError
from edge_agent.engine.streams import Token
from edge_agent.server.answers import Answer, ShownToken
from edge_agent.server.errors import fault_of
from edge_agent.server.json_bodies import as_event
from edge_agent.server.logprobs import ChatLogprobs, CompletionLogprobs
from edge_agent.server.schema import Sampled
from edge_agent.server.streaming import DONE, Event
from edge_agent.text.tokenizer import TextTokenizer

log = logging.getLogger("midspan.serve")


class Shape(Protocol):
    """How the choices of one endpoint look. For one answer."""

    prefix: str
    whole: str
    chunk: str

    def opening(self) -> dict[str, Any] | None:
        """What comes before the first piece, in a stream."""

    def part(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """A piece, in a stream."""

    def ending(self) -> dict[str, Any]:
        """What comes with the finish_reason, in a stream."""

    def complete(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        """All of it."""


class ChatShape:
    prefix, whole, chunk = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: TextTokenizer, top: int | None) -> None:
        self._logprobs = ChatLogprobs(tokenizer) if top is not None else None

    def _write(self, tokens: Sequence[ShownToken]) -> dict[str, Any] | None:
        return self._logprobs.write(tokens) if self._logprobs else None

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def part(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": self._write(tokens)}

    def ending(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def complete(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self._write(tokens)}


class CompletionShape:
    prefix, whole, chunk = "cmpl-", "text_completion", "text_completion"

    def __init__(self, tokenizer: TextTokenizer, top: int | None) -> None:
        self._logprobs = CompletionLogprobs(tokenizer) if top is not None else None

    def opening(self) -> dict[str, Any] | None:
        return None

    def part(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return {"text": text, "logprobs": self._logprobs.write(tokens) if self._logprobs else None}

    def ending(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def complete(self, text: str, tokens: Sequence[ShownToken]) -> dict[str, Any]:
        return self.part(text, tokens)


@dataclass(slots=True)
class TextResponse:
    """One response of one or more answers, in the shape of its endpoint."""

    request: Sampled
    answers: Sequence[Answer]
    model: str
    fingerprint: str
    prompt_tokens: int
    make_shape: Callable[[], Shape]
    shapes: list[Shape] = field(init=False)
    common: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.shapes = [self.make_shape() for _ in self.answers]
        self.common = {
            "id": self.shapes[0].prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": f"fp_{self.fingerprint}",
        }

    @property
    def usage(self) -> dict[str, int]:
        new = sum(answer.new_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }

    async def collect(self, events: AsyncIterator[Event]) -> dict[str, Any]:
        """The whole response, when all answers are complete. Raises what one that fails does."""
        texts = [""] * len(self.answers)
        tokens: list[list[ShownToken]] = [[] for _ in self.answers]
        async for answer, piece in events:
            if piece is not None:
                texts[answer.index] += piece.text
                tokens[answer.index] += piece.tokens
        choices = [
            {"index": index, "finish_reason": answer.finish_reason}
            | shape.complete(texts[index], tokens[index])
            for index, (answer, shape) in enumerate(zip(self.answers, self.shapes, strict=True))
        ]
        whole = {**self.common, "object": self.shapes[0].whole, "choices": choices}
        if self.request.midspan:
            whole["midspan"] = [answer.stream.stats.to_json() for answer in self.answers]
        return whole | {"usage": self.usage}

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """Server-sent events; an error after the first is one of them, and the last."""
        try:
            for answer, shape in zip(self.answers, self.shapes, strict=True):
                if (opening := shape.opening()) is not None:
                    yield self._chunk(answer, opening)
            costs = [Cost() for _ in self.answers]
            async for answer, piece in events:
                shape = self.shapes[answer.index]
                if piece is None:
                    stats = answer.stream.stats.to_json() if self.request.midspan else None
                    yield self._chunk(answer, shape.ending(), answer.finish_reason, stats)
                    continue
                cost = None
                if self.request.midspan and piece.token is not None:
                    cost = costs[answer.index].of(piece.token)
                if piece.text or cost or (piece.tokens and self._tells_logprobs):
                    yield self._chunk(answer, shape.part(piece.text, piece.tokens), None, cost)
            if self.request.wants_usage:
                yield as_event({**self._head, "choices": [], "usage": self.usage})
            yield DONE
        except Exception as error:
            if not isinstance(error, MidspanError):
                log.exception("a stream failed")
            yield as_event(fault_of(error).body)

    @property
    def _tells_logprobs(self) -> bool:
        return self.answers[0].wish.top_logprobs is not None

    @property
    def _head(self) -> dict[str, Any]:
        return {**self.common, "object": self.shapes[0].chunk}

    def _chunk(
        self,
        answer: Answer,
        choice: dict[str, Any],
        finish_reason: str | None = None,
        midspan: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": answer.index, **choice, "finish_reason": finish_reason}
        chunk = {**self._head, "choices": [choice]}
        if self.request.wants_usage:
            chunk["usage"] = None
        if midspan is not None:
            chunk["midspan"] = midspan
        return as_event(chunk)


@dataclass(slots=True)
class Cost:
    """What each token of an answer cost by itself."""

    bytes_up: int = 0
    bytes_down: int = 0
    at_s: float = 0.0

    def of(self, token: Token) -> dict[str, Any]:
        """Of the token that follows the one of the last call."""
        cost = {
            "token_id": token.token_id,
            "worker": token.worker_id,
            "bytes_up": token.bytes_up - self.bytes_up,
            "bytes_down": token.bytes_down - self.bytes_down,
            "ms": round((token.at_s - self.at_s) * 1e3, 3),
            "stages_ms": {name: round(s * 1e3, 3) for name, s in token.stage_s.items()},
        }
        self.bytes_up, self.bytes_down, self.at_s = token.bytes_up, token.bytes_down, token.at_s
        return cost
