"""What became of one session: when each of its tokens came, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from loadtest.demand import Request


@dataclass(slots=True)
class Answer:
    """Times are seconds since the load began. What whoever was asked does not tell stays None."""

    request: Request
    due_s: float
    sent_s: float  # later than due where the load itself was late, or nobody was free
    token_s: list[float] = field(default_factory=list)  # when each came, or each piece of text
    tokens_counted: int | None = None  # by whoever answered, where a piece may be several
    ended_s: float = 0.0
    failure: str = ""  # its kind, or nothing
    reason: str = ""
    bytes_up: int | None = None
    bytes_down: int | None = None
    takeovers: int | None = None  # tokens that another worker computed than the one before
    rows_replayed: int | None = None
    queue_s: Sequence[float] = ()  # of each decode step, in broker and workers
    tokens_wrong: int | None = None  # where it is known what they must be

    @property
    def tokens(self) -> int:
        return len(self.token_s) if self.tokens_counted is None else self.tokens_counted

    @property
    def first_token_s(self) -> float | None:
        """From when it was due until the first token came."""
        return self.token_s[0] - self.due_s if self.token_s else None

    @property
    def gaps_s(self) -> list[float]:
        """Between a token and the next; between pieces of text, where those are what comes."""
        return [later - earlier for earlier, later in pairwise(self.token_s)]

    @property
    def per_token_s(self) -> float | None:
        """The mean of those gaps: how long a token takes after the first."""
        count = self.tokens - 1
        return (self.token_s[-1] - self.token_s[0]) / count if self.token_s and count > 0 else None
