"""What a generation cost: bytes, milliseconds by stage, and who computed it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from common.link import Link

STAGES = ("head", "network", "queue", "middle", "tail")


@dataclass(slots=True)
class GenerationStats:
    """Filled by a session while it generates. Times in seconds, one entry per decode step."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    prompt_bytes_up: int = 0
    prompt_bytes_down: int = 0
    rows_replayed: int = 0
    asked_again: int = 0
    answers_unusable: int = 0
    detours: int = 0  # how often the session went on over other parts
    committed: int = 0
    stage_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STAGES})
    tokens_by_worker: Counter[str] = field(default_factory=Counter)
    round_trips: int = 0  # of decode steps
    drafted: Counter[str] = field(default_factory=Counter)  # tokens that were sent, by drafter
    accepted: Counter[str] = field(default_factory=Counter)  # of these, the right ones
    codecs: dict[str, str] = field(default_factory=dict)  # of prompt and decode, up and down
    chosen_for: Link | None = None  # by which they were chosen

    @property
    def tokens_per_round_trip(self) -> float:
        """Of the tokens after the first, which comes with the prompt."""
        return (self.new_tokens - 1) / self.round_trips if self.round_trips else 0.0

    def count_drafts(self, drafter: str, sent: int, right: int) -> None:
        self.drafted[drafter] += sent
        self.accepted[drafter] += right

    def add_stage(self, name: str, seconds: float) -> None:
        self.stage_s[name].append(seconds)

    def last_stages(self) -> dict[str, float]:
        """Seconds by stage of the last decode step; empty before the first."""
        return {name: values[-1] for name, values in self.stage_s.items() if values}

    def to_json(self) -> dict[str, Any]:
        """Plain numbers. Bytes per token and stage medians are over decode steps only."""
        steps = max(1, self.new_tokens - 1)
        decode_s = self.total_s - self.first_token_s
        trips_per_token = self.round_trips / steps
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_ms": round(self.first_token_s * 1e3, 2),
            "tokens_per_s": round((self.new_tokens - 1) / decode_s, 2) if decode_s > 0 else 0.0,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "bytes_up_per_token": round((self.bytes_up - self.prompt_bytes_up) / steps, 1),
            "bytes_down_per_token": round((self.bytes_down - self.prompt_bytes_down) / steps, 1),
            "ms_per_token": {
                name: round(median(values) * trips_per_token * 1e3, 3) if values else 0.0
                for name, values in self.stage_s.items()
            },
            "rows_replayed": self.rows_replayed,
            "asked_again": self.asked_again,
            "answers_unusable": self.answers_unusable,
            "detours": self.detours,
            "committed": self.committed,
            "tokens_by_worker": dict(self.tokens_by_worker),
            "round_trips": self.round_trips,
            "tokens_per_round_trip": round(self.tokens_per_round_trip, 3),
            "drafted": dict(self.drafted),
            "accepted": dict(self.accepted),
            "codecs": self.codecs,
            "codecs_chosen_for": _describe_link(self.chosen_for),
        }


def _describe_link(link: Link | None) -> dict[str, float] | None:
    if link is None:
        return None
    return {"rtt_ms": round(link.rtt_ms, 3), "mbit": round(link.mbit, 3)}
