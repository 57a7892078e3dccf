"""What a worker tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import Metric

from cloud_worker.loop.stage_service import StageService
from cloud_worker.state.store import KvStore
from common.metrics.families import counters, gauge, gauges, histograms

SERVICE = ("model", "part")
COUNTED = {
    "steps": "Steps that were computed.",
    "rows": "Rows of text that were computed.",
    "batches": "Batches that they were in.",
    "takeovers": "Sessions whose state was looked for in the store.",
    "rows_pulled": "Rows that the store had.",
    "bytes_pulled": "Their bytes.",
    "rows_refused": "Rows of the store that were damaged, or not the session's.",
    "rows_asked": "Rows that an edge was asked to send again.",
    "tensors_asked": "Tensors of images that an edge was asked for.",
    "loads_given_up": "Loads that a slow store did not finish.",
    "commits_over_share": "Commits that the store refused, as the edge has its share.",
    "body_bytes_in": "Bytes of the bodies of steps.",
    "body_bytes_out": "Bytes of the bodies of replies.",
}


def list_families(
    services: Sequence[StageService[Any]], store: KvStore, events: Mapping[str, int]
) -> Iterator[Metric]:
    """All families, as things are now. `events` are counters of the worker as a whole."""
    labelled = [((s.service.name, s.service.part), s) for s in services]
    for name, help_text in COUNTED.items():
        values = [
            (labels, s.stats.get(name, s.stats.get(f"image_{name}"))) for labels, s in labelled
        ]
        known = [(labels, value) for labels, value in values if value is not None]
        yield counters(f"worker_{name}", help_text, SERVICE, known)
    yield histograms(
        "worker_batch_steps", "Steps that were computed together.", SERVICE,
        {labels: s.batch_steps for labels, s in labelled},
    )  # fmt: skip
    yield histograms(
        "worker_batch_seconds", "How long a batch took.", SERVICE,
        {labels: s.batch_seconds for labels, s in labelled},
    )  # fmt: skip
    yield gauges(
        "worker_ready_steps", "Steps that wait to be computed here.", SERVICE,
        [(labels, s.count_ready()) for labels, s in labelled],
    )  # fmt: skip
    yield gauges(
        "worker_uncommitted_rows", "Rows that the store does not have yet.", SERVICE,
        [(labels, s.count_uncommitted()) for labels, s in labelled],
    )  # fmt: skip
    yield gauges(
        "worker_warm_bytes", "State of sessions in memory.", SERVICE,
        [(labels, s.warm_bytes()) for labels, s in labelled],
    )  # fmt: skip
    yield gauge("worker_store_up", "Whether the store answers.", store.is_up())
    yield counters(
        "worker_events", "What went wrong, by kind.", ("event",),
        [((name,), count) for name, count in events.items()],
    )  # fmt: skip
