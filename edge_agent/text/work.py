"""What a text session wants done for it: it computes nothing itself and knows no socket.

A session's answer is a generator that yields one of these and is sent the result. Whoever drives
it decides how: one at a time (edge_agent/text/session.py), or with those of many sessions in one
batch (edge_agent/engine/engine.py).
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edge_agent.engine.exchange import Ask
from edge_agent.text.ends import EndCaches


@dataclass(frozen=True, slots=True, eq=False)
class RunHead:
    """Token ids (T,) through embeddings and head; the result is their boundary rows (T, D)."""

    token_ids: Sequence[int]
    caches: EndCaches


@dataclass(frozen=True, slots=True, eq=False)
class RunTail:
    """Boundary rows (T, D) through the tail; the result are the Scores after the last."""

    rows: Tensor
    caches: EndCaches


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token to be handed to whoever asked; no result."""

    token_id: int


Work = RunHead | RunTail | Ask | NewToken
Working = Generator[Work, Any, None]
