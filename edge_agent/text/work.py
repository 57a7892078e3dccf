"""What a text session wants done for it: it computes nothing itself and knows no socket.

A session's answer is a generator that yields one of these and is sent the result. That of an Ask is
what was Answered, or the NoWorker that knows a detour. Whoever drives it decides how: one at a time
(edge_agent/text/session.py), or with those of many sessions in one batch
(edge_agent/engine/engine.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.codecs.codec import Codec
from common.errors import MidspanError
from edge_agent.engine.exchange import Ask
from edge_agent.text.ends import EndCaches
from edge_agent.text.logprobs import TokenLogprob


@dataclass(frozen=True, slots=True, eq=False)
class RunHead:
    """Token ids (T,) through embeddings and head; the result is their boundary rows (T, D)."""

    token_ids: Sequence[int]
    caches: EndCaches
    is_prompt: bool = False

    @property
    def size(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class RunTail:
    """The pool's rows (T, D) through the tail; the result are the Scores after the last."""

    rows: Tensor
    caches: EndCaches
    is_prompt: bool = False

    @property
    def size(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class EncodeRow:
    """A boundary row (1, D) to a body; the result is that, or the MidspanError that says why not.

    Rows of many sessions are quantized in one go, to the bytes that each has alone.
    """

    codec: Codec
    row: Tensor

    @property
    def width(self) -> int:
        return self.row.shape[1]

    def do(self) -> bytes | MidspanError:
        try:
            return self.codec.encode(self.row)
        except MidspanError as error:
            return error


@dataclass(frozen=True, slots=True, eq=False)
class DecodeRow:
    """A body of one row of `width` values to that row (1, D), float32; or the MidspanError."""

    codec: Codec
    body: bytes
    width: int

    def do(self) -> Tensor | MidspanError:
        try:
            return self.codec.decode(self.body, 1, self.width)
        except MidspanError as error:
            return error


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRows:
    """Boundary rows (T, D) through the tail; the result are logits after each, (T, vocabulary)."""

    rows: Tensor
    caches: EndCaches

    @property
    def size(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class EndElsewhere:
    """The pool may forget a session that goes on under another id; no result."""

    session_id: bytes


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token to be handed to whoever asked; no result."""

    token_id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of the prompt's tokens after its first; no result."""

    logprobs: list[TokenLogprob]


Work = (
    RunHead | RunTail | ScoreRows | EncodeRow | DecodeRow
    | Ask | EndElsewhere | NewToken | PromptScored
)  # fmt: skip
Working = Generator[Work, Any, None]
