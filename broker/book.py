"""What the broker knows: workers, the services they are in, sessions, and steps. No decisions."""

from __future__ import annotations

import contextlib
from collections import Counter, OrderedDict
from collections.abc import Iterable

from broker.demand import DEFAULT_GOALS, Goals, Sample
from broker.ledger import Ledger, Limits
from broker.pools import (
    ServiceKey,
    ServicePool,
    Worker,
    describe_service,
)
from broker.records import SessionRecord, StepRecord
from common.errors import SettingsError
from common.protocol.messages import MAX_HOPS, AnyOpening, Opening, StepKey
from common.spans.cut import Span, find_route, read_span

COUNTERS = (
    "steps", "answers", "redispatched", "refused", "busy", "late_answers", "dead_workers",
    "foreign_sessions", "forged_workers", "handed_over", "cancelled",
)  # fmt: skip


class Book:
    """Shared by those who decide. Nothing in it could not be lost."""

    def __init__(self, limits: Limits, goals: Goals = DEFAULT_GOALS) -> None:
        self._goals = goals
        self.ledger = Ledger(limits)
        self.workers: dict[str, Worker] = {}
        self.steps: dict[StepKey, StepRecord] = {}
        self.pools: dict[ServiceKey, ServicePool] = {}
        self.pools_of_part: dict[tuple[str, str], list[ServicePool]] = {}  # in all precisions
        self.sessions: OrderedDict[bytes, SessionRecord] = OrderedDict()  # the most silent first
        self.counters = dict.fromkeys(COUNTERS, 0)

    def see(self, session_id: bytes, session: SessionRecord, now: float) -> None:
        session.seen_at = now
        self.sessions.move_to_end(session_id)

    def forget_session(self, session_id: bytes) -> None:
        self.ledger.drop_session(self.sessions.pop(session_id).account)

    def add_record(self, session: SessionRecord, record: StepRecord) -> None:
        """A step of a session, which is handed out when it is released."""
        self.steps[record.step.key] = record
        self.ledger.add_step(record.account, record.body_bytes)
        record.is_held = True
        session.steps.append(record)

    def drop_record(self, record: StepRecord) -> list[StepRecord]:
        """A step is over; those that go on from it, which are left for the caller."""
        del self.steps[record.step.key]
        self.ledger.drop_step(record.account, record.body_bytes)
        session = self.sessions.get(record.step.session_id)
        if session is None or record not in session.steps:
            return []
        behind = list(session.steps)[session.steps.index(record) + 1 :]
        session.steps.remove(record)
        return behind

    def warm_worker_of(self, record: StepRecord) -> Worker | None:
        """Who is warm for a step's session and may have the step."""
        session = self.sessions.get(record.step.session_id)
        warm = session.warm_worker(record.hop) if session is not None else None
        if warm is None or warm.draining or warm.name not in record.pool.workers:
            return None
        return warm

    def home_of(self, record: StepRecord) -> ServicePool:
        """Where a step waits: where it did, unless nobody serves that and its session may move."""
        if record.pool.workers:
            return record.pool
        return self.pool_of(self.choose_anew(record).key)

    def choose_anew(self, record: StepRecord) -> ServicePool:
        session = self.sessions[record.step.session_id]
        precision = session.opening.precision or session.precision
        return self.pools_on(session.opening, precision)[record.hop]

    def pool_of(self, service: ServiceKey) -> ServicePool:
        pool = self.pools.get(service)
        if pool is None:
            pool = self.pools[service] = ServicePool(service, self._goals)
            self.pools_of_part.setdefault(service[:2], []).append(pool)
        return pool

    def pools_on(self, opening: AnyOpening, precision: str) -> list[ServicePool]:
        """Who serves each part of a session's route: as it was begun, else who has least to do.

        In one precision for all parts. A pool that nobody is in, and no step yet, is not kept.
        """
        if not precision:
            precision = self._choose_precision(opening)
        services = [(opening.model, part, precision) for part in opening.route]
        return [self.pools.get(service) or ServicePool(service) for service in services]

    def _choose_precision(self, opening: AnyOpening) -> str:
        """In which most of a route is served, and its first part by whoever has least to do."""
        pools_of = [
            [pool for pool in self.pools_of_part.get((opening.model, part), ()) if pool.workers]
            for part in opening.route
        ]
        served = Counter(pool.key[2] for pools in pools_of for pool in pools)
        load = {pool.key[2]: pool.least_load for pool in pools_of[0]}
        return min(served, key=lambda name: (-served[name], load.get(name, 0), name), default="")

    def sample_demand(self, now: float) -> None:
        """Look at what each service has to do. In the time that it takes to walk over all steps."""
        steps: dict[ServicePool, list[StepRecord]] = {pool: [] for pool in self.pools.values()}
        for record in self.steps.values():
            if not record.is_held:
                steps.setdefault(record.pool, []).append(record)
        for pool, records in steps.items():
            busy = {record.worker for record in records if record.worker is not None}
            queued = [now - record.queued_at for record in records if record.worker is None]
            seen = Sample(len(busy), len(records), queued, workers=len(pool.workers))
            pool.demand.sample(seen, now)

    def why_no_worker(self, service: ServiceKey) -> str:
        model, part, precision = service
        wanted = f"{part} of the model with fingerprint {model}"
        if precision:
            wanted += f" in {precision}, in which this session is computed"
        return f"no worker serves {wanted}; {self.describe_serving()}"

    def find_detour(self, opening: AnyOpening, precision: str) -> list[str]:
        """Parts that are served, in one precision, and make up the layers of a session's route."""
        if not isinstance(opening, Opening):
            return []
        served: dict[str, list[Span]] = {}
        for (model, part), pools in self.pools_of_part.items():
            for pool in pools if model == opening.model else ():
                if pool.workers and precision in ("", pool.key[2]):
                    served.setdefault(pool.key[2], []).extend(_read_spans([part]))
        wanted = _read_spans(opening.route)
        if not wanted:
            return []
        middle = Span(wanted[0].first, *wanted[-1].stop)
        routes = [find_route(spans, middle) for _, spans in sorted(served.items())]
        shortest = min((route for route in routes if route), key=len, default=[])
        return [str(span) for span in shortest] if len(shortest) <= MAX_HOPS else []

    def describe_serving(self) -> str:
        """One line about what the workers serve."""
        services = {s for w in self.workers.values() for s in w.announce.services}
        if not services:
            return "there are no workers at all"
        listed = ", ".join(sorted(describe_service(s) for s in services))
        return f"being served: {listed}"


def _read_spans(parts: Iterable[str]) -> list[Span]:
    """Those parts that are spans of layers."""
    spans = []
    for part in parts:
        with contextlib.suppress(SettingsError):
            spans.append(read_span(part))
    return spans
