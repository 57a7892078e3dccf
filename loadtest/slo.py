"""What counts as well served: bounds on an answer's latencies. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from common.errors import SettingsError
from loadtest.answers import Answer


@dataclass(frozen=True, slots=True)
class Slo:
    """Bounds in seconds; None is no bound."""

    ttft: float | None = None  # until the first token
    itl: float | None = None  # each gap between two tokens
    tpot: float | None = None  # the mean of those gaps

    def is_met(self, answer: Answer) -> bool:
        """Whether an answer is complete and within all bounds."""
        if answer.failure:
            return False
        measured = (
            (self.ttft, answer.first_token_s),
            (self.itl, max(answer.gaps_s, default=None)),
            (self.tpot, answer.per_token_s),
        )
        return all(bound is None or value is None or value <= bound for bound, value in measured)

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return ",".join(f"{name}={value:g}" for name, value in values.items() if value is not None)


def parse_slo(text: str) -> Slo:
    """Read `ttft=2,itl=0.2,tpot=0.1`, or some of these. Raises SettingsError."""
    known = [field.name for field in fields(Slo)]
    bounds: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            seconds = float(number)
        except ValueError:
            seconds = math.nan
        if name.strip() not in known or name.strip() in bounds or not 0 < seconds < math.inf:
            raise SettingsError(
                f"--slo has {part[:40]!r}; expected seconds of each of {', '.join(known)} once, "
                "as ttft=2,itl=0.2"
            )
        bounds[name.strip()] = seconds
    return Slo(**bounds)
