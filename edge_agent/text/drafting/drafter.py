"""What a drafter is: it guesses the next tokens of one session, and says how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from edge_agent.text.ends import EndCaches, ModelEnds

MAX_GRADE = 15


class Draft(NamedTuple):
    """A guessed token. Guesses of one `grade` (0 to MAX_GRADE) are about equally often right.

    That is: right where all guesses before it in the same proposal were.
    """

    token_id: int
    grade: int


class Drafter(Protocol):
    """One session's. Letters: T tokens, D hidden size."""

    name: str  # lookup, ngram or model: as stats say who has drafted
    is_free: bool  # its guesses take no time to speak of, or it looks itself what they are worth

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        """Up to `limit` tokens that may follow on `token_ids`, the last of which is not run yet.

        Between two calls tokens are appended only, unless `cut_back` was called.
        """
        ...

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        """Rows (T, D) of the next tokens that were run and hold.

        What the head gave, before any codec, and what came back from the pool for the tail.
        """
        ...

    def cut_back(self, position: int) -> None:
        """Forget the tokens from `position` on, and their rows."""
        ...


class DrafterSource(Protocol):
    """What gives sessions their drafters, and learns what they write."""

    @property
    def is_demanded(self) -> bool:
        """Whether a session that cannot draft is an error."""
        ...

    def __call__(self, ends: ModelEnds, caches: EndCaches) -> Drafter | None:
        """One that guesses on these caches, if there is any. Raises MidspanError."""
        ...

    def keep(self, ends: ModelEnds, prompt_ids: Sequence[int], answer: Sequence[int]) -> None:
        """An answer is over."""
        ...
