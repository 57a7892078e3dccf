"""From measurements to figures: latencies, throughput, goodput, and what the pool did. Pure.

**The window.** It begins with the end of the warm-up and ends when no more sessions are begun (or
with the last answer, if that is earlier). Throughput is what came within it, whoever asked;
latencies, failures and goodput are of all sessions that were due within it, however late they
ended: to drop those that are not done when the time is over would drop the slowest.

**Latencies** are counted from when a session was due, not from when it could be sent.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loadtest.answers import Answer
from loadtest.observed import Observed, Sample
from loadtest.percentiles import summarize
from loadtest.slo import Slo

SERIES_S = 1.0  # length of a piece of the series


@dataclass(frozen=True, slots=True)
class Window:
    """What is counted, in seconds since the load began."""

    begin_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        return max(1e-9, self.end_s - self.begin_s)

    def holds(self, at_s: float) -> bool:
        return self.begin_s <= at_s <= self.end_s


def find_window(answers: Sequence[Answer], warmup_s: float, duration_s: float | None) -> Window:
    """See the module's own text."""
    last_s = max((answer.ended_s for answer in answers), default=0.0)
    return Window(warmup_s, min(last_s, duration_s) if duration_s is not None else last_s)


def make_report(
    answers: Sequence[Answer], window: Window, observed: Observed, slo: Slo | None = None
) -> dict[str, Any]:
    """All figures as plain numbers; None where whoever was asked does not tell."""
    counted = [answer for answer in answers if window.holds(answer.due_s)]
    whole = [answer for answer in counted if not answer.failure]
    tokens = round(sum(_count_tokens(answer, window) for answer in answers))
    per_token = [answer.per_token_s for answer in whole if answer.per_token_s]
    firsts = [answer.first_token_s for answer in counted if answer.first_token_s is not None]
    return {
        "sessions": len(counted),
        "failed": len(counted) - len(whole),
        "failures": dict(Counter(answer.failure for answer in counted if answer.failure)),
        "reasons": list(dict.fromkeys(a.reason for a in counted if a.failure))[:5],
        "seconds": round(window.seconds, 3),
        "tokens": tokens,
        "tokens_per_s": round(tokens / window.seconds, 2),
        "tokens_per_s_of_a_session": summarize([1 / s for s in per_token], 2),
        "sessions_per_s": round(len(whole) / window.seconds, 3),
        "ttft_s": summarize(firsts),
        "tpot_s": summarize(per_token),
        "itl_s": summarize([gap for answer in counted for gap in answer.gaps_s]),
        "session_s": summarize([answer.ended_s - answer.due_s for answer in whole]),
        "queue_s": summarize([s for answer in counted for s in answer.queue_s], 6),
        "sent_late_s": summarize([answer.sent_s - answer.due_s for answer in counted], 6),
        "goodput": None if slo is None else _count_good(counted, window, slo),
        "bytes_up": _add(counted, "bytes_up"),
        "bytes_down": _add(counted, "bytes_down"),
        "takeovers": _add(counted, "takeovers"),
        "replays": _count_replays(counted),
        "tokens_wrong": _add(counted, "tokens_wrong"),
        **observed.figures(),
        "series": make_series(answers, observed.samples, window.end_s),
        "events": [asdict(event) for event in observed.events],
    }


def list_latencies(answers: Sequence[Answer], window: Window) -> dict[str, list[float]]:
    """What a plot shows, in seconds, one by one."""
    counted = [answer for answer in answers if window.holds(answer.due_s)]
    firsts = [answer.first_token_s for answer in counted if answer.first_token_s is not None]
    return {
        "time to first token": firsts,
        "between two tokens": [gap for answer in counted for gap in answer.gaps_s],
    }


def _count_tokens(answer: Answer, window: Window) -> float:
    """Of an answer, those that came within the window; its pieces are taken for equally long."""
    came = sum(map(window.holds, answer.token_s))
    return came * answer.tokens / len(answer.token_s) if came else 0.0


def _count_good(counted: Sequence[Answer], window: Window, slo: Slo) -> dict[str, Any]:
    """Goodput: what was served within the bounds, and only that."""
    good = [answer for answer in counted if slo.is_met(answer)]
    return {
        "slo": str(slo),
        "sessions": len(good),
        "share": round(len(good) / max(1, len(counted)), 4),
        "sessions_per_s": round(len(good) / window.seconds, 3),
        "tokens_per_s": round(sum(a.tokens for a in good) / window.seconds, 2),
    }


def _add(answers: Sequence[Answer], name: str) -> int | None:
    known = [value for answer in answers if (value := getattr(answer, name)) is not None]
    return sum(known) if known else None


def _count_replays(answers: Sequence[Answer]) -> dict[str, int] | None:
    rows = [answer.rows_replayed for answer in answers if answer.rows_replayed is not None]
    return {"sessions": sum(map(bool, rows)), "rows": sum(rows)} if rows else None


def make_series(
    answers: Sequence[Answer], samples: Sequence[Sample], end_s: float
) -> list[dict[str, Any]]:
    """Second by second: tokens that came, and the last that was seen of the pool by then.

    Of a last second that was not over when the load was there is nothing, unless it is the first.
    """
    tokens: dict[int, float] = defaultdict(float)
    for answer in answers:
        for at_s in answer.token_s:
            tokens[int(at_s / SERIES_S)] += answer.tokens / len(answer.token_s)
    series: list[dict[str, Any]] = []
    for index in range(max(1, int(end_s / SERIES_S))):
        until_s = (index + 1) * SERIES_S
        seen = [sample for sample in samples if sample.at_s < until_s]
        pool = seen[-1] if seen else None
        series.append(
            {
                "at_s": index * SERIES_S,
                "tokens_per_s": round(tokens[index] / SERIES_S, 2),
                "workers": pool.workers if pool else None,
                "queued": pool.queued if pool else None,
                "in_flight": pool.in_flight if pool else None,
            }
        )
    return series
