"""What the broker tells Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client import Metric

from broker.port import Port
from broker.state import BrokerState
from common.metrics.families import counters, gauge, gauges, histograms

SERVICE = ("model", "part", "precision")
EVENTS = {
    "steps": "Steps that arrived.",
    "answers": "Answers of workers.",
    "redispatched": "Steps that were given to another worker after the first one failed or died.",
    "handed_over": "Steps that were given to an idle worker because the first one was late.",
    "refused": "Steps that were refused.",
    "busy": "Steps that were told to come back because the queue was full.",
    "cancelled": "Steps that were cancelled at a worker.",
    "late_answers": "Answers that came after another worker's.",
    "dead_workers": "Workers that fell silent or lost their connection.",
    "foreign_sessions": "Messages about a session of another edge.",
    "forged_workers": "Messages in the name of another worker.",
}


def list_families(
    state: BrokerState, ports: dict[str, Port], bad_messages: int, memory_bytes: int
) -> Iterator[Metric]:
    """All families, as things are now."""
    pools = state.pools.values()
    yield gauges(
        "broker_queued_steps", "Steps that wait for a worker.", SERVICE,
        [(pool.key, pool.count_queued()) for pool in pools],
    )  # fmt: skip
    yield histograms(
        "broker_queue_wait_seconds", "How long steps waited before they went to a worker.",
        SERVICE, {pool.key: pool.waits for pool in pools},
    )  # fmt: skip
    yield gauges(
        "broker_wanted_workers", "Workers that the service could use; pools grow and shrink by it.",
        SERVICE, [(pool.key, pool.demand.wanted_workers) for pool in pools],
    )  # fmt: skip
    yield gauges(
        "broker_busy_workers", "Workers with a step, a mean over seconds.",
        SERVICE, [(pool.key, pool.demand.busy_workers) for pool in pools],
    )  # fmt: skip
    yield gauges(
        "broker_workers", "Workers by what they are doing.", ("state",), _count_states(state)
    )
    workers = state.workers.values()
    yield gauges(
        "broker_in_flight_steps", "Steps that a worker has not answered.", ("worker",),
        [((worker.name,), len(worker.in_flight)) for worker in workers],
    )  # fmt: skip
    yield gauges(
        "broker_worker_capacity_steps", "Steps that a worker may have in flight.", ("worker",),
        [((worker.name,), worker.announce.capacity) for worker in workers],
    )  # fmt: skip
    yield gauge("broker_sessions", "Sessions that are open.", len(state.sessions))
    yield gauge("broker_memory_bytes", "Of this process.", memory_bytes)
    for event, help_text in EVENTS.items():
        yield counters(f"broker_{event}", help_text, (), [((), state.counters[event])])
    yield counters("broker_bad_messages", "Messages that made no sense.", (), [((), bad_messages)])
    yield counters(
        "broker_bytes", "Bytes of messages, by side and direction.", ("side", "direction"),
        [
            ((side, direction), count)
            for side, port in ports.items()
            for direction, count in (("in", port.bytes_in), ("out", port.bytes_out))
        ],
    )  # fmt: skip


def _count_states(state: BrokerState) -> list[tuple[tuple[str], int]]:
    counted = Counter(worker.describe_state() for worker in state.workers.values())
    return [((name,), counted[name]) for name in ("ready", "starting", "draining")]
