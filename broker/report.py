"""What `midspan status` shows of a BrokerState, as plain maps."""

from __future__ import annotations

from collections import Counter
from typing import Any

from broker.pools import Worker
from broker.state import BrokerState


def make_report(state: BrokerState, now: float) -> dict[str, Any]:
    """Workers, queues, sessions and counters; goes into the body of a StatusReport."""
    warm = Counter(
        worker.name
        for session in state.sessions.values()
        for worker in session.workers.values()
        if not worker.is_gone
    )
    return {
        "uptime_s": round(now - state.started_at, 1),
        "workers": [
            _report_worker(worker, warm[worker.name], now) for worker in state.workers.values()
        ],
        "queues": [
            {
                "model": model,
                "part": part,
                "precision": precision,
                "queued": pool.count_queued(),
                "workers": len(pool.workers),
                "busy_workers": round(pool.demand.busy_workers, 3),
                "wanted_workers": round(pool.demand.wanted_workers, 3),
                "wait_ms": round(pool.demand.wait_s * 1000, 1),
            }
            for (model, part, precision), pool in state.pools.items()
        ],
        "sessions": len(state.sessions),
        "steps_in_flight": sum(len(w.in_flight) for w in state.workers.values()),
        "counters": dict(state.counters),
    }


def _report_worker(worker: Worker, warm_sessions: int, now: float) -> dict[str, Any]:
    announce = worker.announce
    return {
        "worker_id": announce.worker_id,
        "state": worker.describe_state(),
        "host": announce.host,
        "pid": announce.pid,
        "services": [
            {
                "model": s.model,
                "name": s.name,
                "part": s.part,
                "hidden": s.hidden,
                "precision": s.precision,
            }
            for s in announce.services
        ],
        "in_flight": len(worker.in_flight),
        "capacity": announce.capacity,
        "warm_sessions": warm_sessions,
        "steps_done": worker.steps_done,
        "seen_ms_ago": round((now - worker.seen_at) * 1000),
        "stats": announce.stats,
    }
