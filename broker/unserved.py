"""What becomes of steps that pass a part of a model which nobody serves: state in, actions out.

Who has gone mostly comes back, so they wait, unless others make up the same layers (a detour).
"""

from __future__ import annotations

from broker.actions import Action, Refuse
from broker.book import Book
from broker.dispatcher import Dispatcher
from broker.peer import Peer
from broker.pools import ServiceKey, ServicePool
from common.protocol.messages import AnyOpening, StepKey

WORKER_RETURN_S = 30.0  # how long steps wait for a service whose last worker has gone
START_S = 3.0  # a broker that has just started does not know its workers yet


class Unserved:
    """Steps wait `hold_s` for a service that nobody has had; until `knows_all_at` all may come."""

    def __init__(
        self, book: Book, dispatcher: Dispatcher, hold_s: float, knows_all_at: float
    ) -> None:
        self._book = book
        self._dispatcher = dispatcher
        self._hold_s = hold_s
        self._knows_all_at = knows_all_at

    def refuse(
        self,
        key: StepKey,
        pools: list[ServicePool],
        opening: AnyOpening,
        edge: Peer,
        now: float,
    ) -> Action | None:
        """A step passes a part that nobody serves: it need not wait if others make that up."""
        empty = [pool for pool in pools if not pool.workers]
        if not empty:
            return None
        lost = [pool for pool in empty if not (self._hold_s or self._may_return(pool, now))]
        detour = self._book.find_detour(opening, empty[0].key[2])
        if not lost and not detour:
            return None
        self._book.counters["refused"] += 1
        why = self._book.why_no_worker((lost or empty)[0].key)
        return Refuse(edge.address, key, "no_worker", why, detour)

    def look_after(self, service: ServiceKey, pool: ServicePool, now: float) -> list[Action]:
        """Nobody serves this: what waits here has waited long enough when nobody comes."""
        actions = self._send_round(service, pool)
        if self._may_return(pool, now):
            return actions
        for record in [self._book.steps[key] for key in pool.queued()]:
            if now - record.queued_at >= self._hold_s:
                why = self._book.why_no_worker(service)
                actions += self._dispatcher.refuse(record, "no_worker", why)
        if pool.count_queued():
            return actions
        del self._book.pools[service]
        self._book.pools_of_part[service[:2]].remove(pool)
        if not self._book.pools_of_part[service[:2]]:
            del self._book.pools_of_part[service[:2]]
        return actions

    def _send_round(self, service: ServiceKey, pool: ServicePool) -> list[Action]:
        """Sessions whose layers others make up need not wait for somebody to come back."""
        actions: list[Action] = []
        detours: dict[tuple[str, ...], list[str]] = {}
        for record in [self._book.steps[key] for key in pool.queued()]:
            opening = self._book.sessions[record.step.session_id].opening
            route = tuple(opening.route)
            if route not in detours:
                detours[route] = self._book.find_detour(opening, service[2])
            if detours[route]:
                why = self._book.why_no_worker(service)
                actions += self._dispatcher.refuse(record, "no_worker", why, detours[route])
        return actions

    def _may_return(self, pool: ServicePool, now: float) -> bool:
        """Workers that go are mostly replaced; a service that nobody has had is a mistake."""
        if now < self._knows_all_at:
            return True
        wanted = pool.key[2]
        return any(
            other.gone_at is not None and now - other.gone_at < WORKER_RETURN_S
            for other in self._book.pools_of_part.get(pool.key[:2], ())
            if wanted in ("", other.key[2])
        )
