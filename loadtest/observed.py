"""What was seen of a pool while it was under load: samples of its reports, and what was done to it.

Pure: `loadtest/observer.py` asks. Workers count for themselves and say so until they die, so what
a killed worker did after it last said so is missing from sums of theirs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

COUNTED = ("batches", "steps", "bytes_pulled")  # by workers
COUNTED_BY_BROKER = (
    "steps", "busy", "redispatched", "handed_over", "late_answers", "dead_workers",
)  # fmt: skip


SCALED = "scaled:"  # what events begin with that only changed the number of workers


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was done to the pool, for the plot."""

    at_s: float
    what: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A pool at one moment. `cpu_s` is what its broker's process has used, if that is known."""

    at_s: float
    workers: int  # that are ready
    queued: int
    in_flight: int
    sessions: int
    counters: Mapping[str, int]  # of the broker, since it began
    by_worker: Mapping[str, Mapping[str, int]]
    cpu_s: float | None = None


def read_sample(report: Mapping[str, Any], at_s: float, cpu_s: float | None = None) -> Sample:
    """What a broker's report says (broker/report.py)."""
    workers = report["workers"]
    return Sample(
        at_s=at_s,
        workers=sum(worker["state"] == "ready" for worker in workers),
        queued=sum(queue["queued"] for queue in report["queues"]),
        in_flight=report["steps_in_flight"],
        sessions=report["sessions"],
        counters={name: report["counters"].get(name, 0) for name in COUNTED_BY_BROKER},
        by_worker={
            worker["worker_id"]: {name: int(worker["stats"].get(name, 0)) for name in COUNTED}
            for worker in workers
        },
        cpu_s=cpu_s,
    )


@dataclass(slots=True)
class Observed:
    """All that was seen. Without a pool to ask there is nothing, and figures are None."""

    samples: list[Sample] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """What is in the report."""
        kinds = [event.what.partition(" ")[0] for event in self.events]
        done = {"kills": kinds.count("killed"), "drains": kinds.count("drained")}
        if not self.samples:
            return {"steps_per_batch": None, "broker": None, "workers": None, **done}
        counted = count_by_workers(self.samples)
        present = [sample.workers for sample in self.samples]
        return {
            "steps_per_batch": round(counted["steps"] / max(1, counted["batches"]), 2),
            "bytes_pulled": counted["bytes_pulled"],
            "broker": measure_broker(self.samples),
            "workers": {"least": min(present), "most": max(present)},
            **done,
        }


def count_by_workers(samples: Sequence[Sample]) -> dict[str, int]:
    """What all workers counted between the first sample and the last, also those that are gone."""
    first: dict[str, Mapping[str, int]] = {}
    last: dict[str, Mapping[str, int]] = {}
    for sample in samples:
        for worker_id, counts in sample.by_worker.items():
            # a worker that came later had counted nothing before
            came_later = sample is not samples[0]
            first.setdefault(worker_id, dict.fromkeys(COUNTED, 0) if came_later else counts)
            last[worker_id] = counts
    return {name: sum(last[w][name] - first[w][name] for w in last) for name in COUNTED}


def measure_broker(samples: Sequence[Sample]) -> dict[str, Any]:
    """What the broker counted, and what a step took of its CPU's time, if that is known.

    One that was restarted counts anew, so pieces between two samples are added.
    """
    counted, used_s = Counter(dict.fromkeys(COUNTED_BY_BROKER, 0)), 0.0
    known = all(sample.cpu_s is not None for sample in samples)
    for before, after in pairwise(samples):
        if after.counters["steps"] >= before.counters["steps"]:
            counted.update({name: after.counters[name] - before.counters[name] for name in counted})
            used_s += max(0.0, (after.cpu_s or 0.0) - (before.cpu_s or 0.0))
    steps = counted["steps"]
    return {
        **counted,
        "cpu_us_per_step": round(used_s / steps * 1e6, 1) if known and steps else None,
        "queued_most": max(sample.queued for sample in samples),
        "in_flight_most": max(sample.in_flight for sample in samples),
    }
