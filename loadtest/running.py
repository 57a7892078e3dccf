"""Run a load to its end and report: the part that pools and endpoints have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.answers import Answer
from loadtest.live import show_live
from loadtest.observed import Observed
from loadtest.pacing import Clock, Load, Target
from loadtest.report import find_window, list_latencies, make_report
from loadtest.settings import LoadSettings
from loadtest.slo import Slo


@dataclass(frozen=True, slots=True)
class Outcome:
    """The report, and the latencies in seconds that a plot shows one by one."""

    report: dict[str, Any]
    latencies: Mapping[str, Sequence[float]]


def run_load(
    target: Target, clock: Clock, settings: LoadSettings, observed: Observed
) -> Sequence[Answer]:
    """Ask for all sessions; what became of each."""
    load = Load(target, clock, settings.concurrency, settings.duration_s)
    with show_live(load, observed):
        asyncio.run(load.run(settings.list_requests(), settings.is_open))
    return load.answers


def report_load(
    answers: Sequence[Answer], settings: LoadSettings, observed: Observed, slo: Slo | None
) -> Outcome:
    """What there is to say of them."""
    window = find_window(answers, settings.warmup_s, settings.duration_s)
    report = {
        "load": settings.describe(),
        "synthetic": None,
        "images": None,
        **make_report(answers, window, observed, slo),
    }
    return Outcome(report, list_latencies(answers, window))
