"""What the options of `midspan loadtest` said about the load, checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from loadtest.demand import Lengths, Request, draw_requests, parse_lengths, read_trace

DEFAULT_SESSIONS = 64
CLOSED_CONCURRENCY, OPEN_CONCURRENCY = 8, 256


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How many sessions, when, and how long they are."""

    sessions: int | None
    concurrency_asked: int | None
    prompt_text: str
    tokens_text: str
    rate: float | None
    duration_s: float | None
    warmup_s: float
    seed: int
    trace: Path | None

    def check(self) -> None:
        """Raises SettingsError for what cannot be, or does nothing."""
        if self.trace is not None and self.rate is not None:
            raise SettingsError("--trace says when sessions are due, and so does --rate; give one")
        if self.duration_s is not None and self.warmup_s >= self.duration_s:
            raise SettingsError(
                f"--warmup is {self.warmup_s:g} s of a --duration of {self.duration_s:g} s; "
                "nothing would be counted"
            )
        self.list_requests()

    @property
    def prompt_tokens(self) -> Lengths:
        return parse_lengths(self.prompt_text, "--prompt-tokens")

    @property
    def tokens(self) -> Lengths:
        return parse_lengths(self.tokens_text, "--tokens")

    @property
    def is_open(self) -> bool:
        """Sessions come when they come, whether the pool keeps up or not."""
        return self.rate is not None or self.trace is not None

    @property
    def concurrency(self) -> int:
        default = OPEN_CONCURRENCY if self.is_open else CLOSED_CONCURRENCY
        return self.concurrency_asked or default

    def list_requests(self) -> Iterable[Request]:
        """Raises SettingsError."""
        if self.trace is not None:
            return read_trace(self.trace)[: self.sessions]
        endless = draw_requests(self.prompt_tokens, self.tokens, self.rate, self.seed)
        default = None if self.duration_s is not None else DEFAULT_SESSIONS
        return itertools.islice(endless, self.sessions or default)

    def longest(self) -> tuple[int, int]:
        """Tokens of the longest prompt and of the longest answer that may come."""
        if self.trace is None:
            return self.prompt_tokens.high, self.tokens.high
        requests = read_trace(self.trace)
        return max(r.prompt_tokens for r in requests), max(r.tokens for r in requests)

    def describe(self) -> dict[str, Any]:
        """What goes into the report, so that a figure can be had again."""
        mode = "trace" if self.trace else "rate" if self.rate is not None else "closed loop"
        return {
            "mode": mode,
            "rate": self.rate,
            "concurrency": self.concurrency,
            "prompt_tokens": None if self.trace else str(self.prompt_tokens),
            "tokens": None if self.trace else str(self.tokens),
            "trace": str(self.trace) if self.trace else None,
            "duration_s": self.duration_s,
            "warmup_s": self.warmup_s,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class WorkerCount:
    """How many workers a pool of ours has: from `least` to `most`."""

    least: int
    most: int

    @property
    def is_fixed(self) -> bool:
        return self.least == self.most
