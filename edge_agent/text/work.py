"""What a text session wants done for it: it computes nothing itself and knows no socket.

A session's answer is a generator that yields one of these and is sent the result. That of an Ask is
what was Answered, or the NoWorker that knows a detour, or StepOvertaken. Whoever drives it decides
how: one at a time (edge_agent/text/session.py), or with those of many sessions in one batch
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
    """The pool's rows (T, D) through the tail; the result are the Scores after the last ones."""

    rows: Tensor
    caches: EndCaches
    is_prompt: bool = False
    wanted: int = 1  # after how many

    @property
    def size(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class EncodeRows:
    """Boundary rows (T, D) to a body each; the result is those, or the MidspanError why not.

    Rows of many sessions are quantized in one go, to the bytes that each has alone.
    """

    codec: Codec
    rows: Tensor

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def do(self) -> list[bytes] | MidspanError:
        try:
            return self.codec.encode_each(self.rows)
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
class SendAhead:
    """A step that goes on from the one before, to be asked for without a wait; no result."""

    ask: Ask


@dataclass(frozen=True, slots=True)
class AwaitAnswer:
    """The first of the steps that were sent ahead; the result is as that of an Ask."""


@dataclass(frozen=True, slots=True)
class DropAsks:
    """Nobody waits for what was sent ahead; no result."""


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
    RunHead | RunTail | ScoreRows | EncodeRows | DecodeRow
    | Ask | SendAhead | AwaitAnswer | DropAsks | EndElsewhere | NewToken | PromptScored
)  # fmt: skip
Working = Generator[Work, Any, None]
