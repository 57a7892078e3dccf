"""What is asked of a pool, and when: closed loops, random arrivals, traces. Pure, and seeded.

In a closed loop a session is due as soon as the one before it has ended, so a slow pool is asked
less. Arrivals of a rate, or of a trace, come when they come: a pool that falls behind has a growing
queue, and that shows in every latency, because it is counted from when a session was due.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console.inputs import read_text
from common.errors import SettingsError

MAX_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """One session to be had: so many tokens of prompt, so many of answer.

    `at_s` is when it is due, in seconds since the load began; None is as soon as its turn comes.
    """

    prompt_tokens: int
    tokens: int
    at_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole numbers from `low` to `high`, each as likely."""

    low: int
    high: int

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low},{self.high}"


def parse_lengths(text: str, option: str) -> Lengths:
    """Read `N` or `LOW,HIGH`. Raises SettingsError."""
    words = text.split(",")
    numbers = [int(word) for word in words if word.strip().isdecimal()]
    bad = len(numbers) != len(words) or len(words) > 2 or numbers != sorted(numbers)
    if bad or not 0 < numbers[0] <= numbers[-1] <= MAX_TOKENS:
        raise SettingsError(
            f"{option} is {text[:40]!r}; expected a number from 1 to {MAX_TOKENS:,}, or LOW,HIGH"
        )
    return Lengths(numbers[0], numbers[-1])


def draw_requests(
    prompt_tokens: Lengths, tokens: Lengths, rate: float | None, seed: int
) -> Iterator[Request]:
    """Requests without end; with a `rate` per second they arrive as a Poisson process does.

    That is: independent of each other, with pauses between them that are exponentially distributed.
    """
    lengths, pauses = random.Random(seed), random.Random(~seed)  # one seed, the same lengths
    at_s = 0.0
    while True:
        if rate is not None:
            at_s += pauses.expovariate(rate)
        prompt, answer = prompt_tokens.draw(lengths), tokens.draw(lengths)
        yield Request(prompt, answer, at_s if rate is not None else None)


def read_trace(path: Path) -> list[Request]:
    """Requests of a file of JSON lines {"at": s, "prompt_tokens": n, "tokens": m}, by time.

    Raises SettingsError for a line that is none.
    """
    lines = read_text(path, "--trace").splitlines()
    requests = [
        _read_line(line, f"--trace {path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not requests:
        raise SettingsError(f"--trace {path} has no line in it")
    return sorted(requests, key=lambda request: request.at_s or 0.0)


def _read_line(line: str, where: str) -> Request:
    try:
        values: Any = json.loads(line)
        at_s, prompt, answer = (values[name] for name in ("at", "prompt_tokens", "tokens"))
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f'{where} is {line[:60]!r}; expected {{"at": SECONDS, "prompt_tokens": N, "tokens": N}}'
        ) from error
    if type(at_s) not in (int, float) or not 0 <= at_s < math.inf:
        raise SettingsError(f"{where}: at is {at_s!r}; expected seconds, 0 or more")
    for name, number in (("prompt_tokens", prompt), ("tokens", answer)):
        if type(number) is not int or not 0 < number <= MAX_TOKENS:
            raise SettingsError(f"{where}: {name} is {number!r}; expected 1 to {MAX_TOKENS:,}")
    return Request(prompt, answer, float(at_s))


def draw_prompt(length: int, token_ids: Sequence[int], rng: random.Random) -> list[int]:
    """A prompt of random tokens: what it says does not matter, and no two begin alike."""
    return rng.choices(token_ids, k=length)
