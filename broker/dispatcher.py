"""Which worker gets which step, and when (broker/state.py has the rules): state in, actions out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from broker.actions import (
    Action,
    Cancel,
    Dispatched,
    Forget,
    Note,
    Refuse,
)
from broker.book import Book
from broker.fair_queue import FairQueue
from broker.pools import (
    HAND_OVER_S,
    LOOK_AT,
    ServicePool,
    Worker,
)
from broker.records import SEND_AGAIN_S, SessionRecord, StepRecord
from common.protocol.messages import (
    StepKey,
)

Tell = Callable[[StepRecord], Action]  # what becomes of a step


class Dispatcher:
    """Hands steps out, queues them, takes them back and tries elsewhere."""

    def __init__(self, book: Book, max_attempts: int) -> None:
        self._book = book
        self._ledger = book.ledger
        self._workers = book.workers
        self._steps = book.steps
        self._sessions = book.sessions
        self._counters = book.counters
        self.max_attempts = max_attempts
        self.settling: dict[StepKey, StepRecord] = {}  # not to be handed out yet

    def route(self, record: StepRecord, now: float, has_waited: bool = False) -> list[Action]:
        """Hand a step out if a worker takes it, else queue it, before others if it `has_waited`."""
        record.pool = self._book.home_of(record)
        key, pool, account = record.step.key, record.pool, record.account
        if now < record.wait_until:
            self.settling[key] = record
            return []
        if record.failures:
            untried = self._pick_untried(record, now)
            if untried is not None:
                return [self._assign(record, untried, now)]
            pool.retries[key] = None
            return []
        is_alone = self._ledger.is_alone(account)
        warm = self._book.warm_worker_of(record)
        queue = pool.waiting
        if warm is not None and not warm.is_stuck(now, pool.patience_s):
            if warm.is_open and warm.has_place_for(account, is_alone) and warm.is_fresh(now):
                return [self._assign(record, warm, now)]
            worker = pool.find(account, is_alone, now, only_idle=True, but=record.step.shun)
            queue = pool.backlog_of(warm)
        else:
            but = record.step.shun if len(pool.workers) > 1 else ""
            worker = pool.find(account, is_alone, now, but=but)
        if worker is not None:
            return [self._assign(record, worker, now)]
        record.queue = queue
        if has_waited:
            queue.add_first(account, key)
        else:
            queue.add(account, key)
        return []

    def _assign(self, record: StepRecord, worker: Worker, now: float) -> Dispatched:
        key = record.step.key
        record.worker, record.queue = worker, None
        record.late_on.pop(worker.name, None)  # what it may still say of that attempt is late
        record.attempts += 1
        record.sent_at = record.asked_at = now
        record.again_after_s = SEND_AGAIN_S
        worker.take(key, record.account, now)
        waited_s = max(0.0, now - record.queued_at)
        record.pool.waits.observe(waited_s)
        queue_us = record.earlier_queue_us + round(waited_s * 1e6)
        return Dispatched(worker.name, key, record.attempts, queue_us)

    def take_from_queue(self, record: StepRecord) -> None:
        """A step waits no longer, wherever it did."""
        if record.queue is not None:
            record.queue.remove(record.account, record.step.key)
            record.queue = None
        record.pool.retries.pop(record.step.key, None)
        self.settling.pop(record.step.key, None)

    def take_back(self, record: StepRecord, now: float) -> None:
        """A step's worker does not have it any more."""
        if record.worker is not None:
            record.worker.drop(record.step.key)
        record.worker = None
        record.queued_at = now

    def send_again(self, record: StepRecord, now: float) -> list[Action]:
        """A step in flight for long may have been lost on its way; a worker takes it twice."""
        if record.worker is None or now - record.asked_at < record.again_after_s:
            return []
        record.asked_at = now
        record.again_after_s *= 2
        return [Dispatched(record.worker.name, record.step.key, record.attempts, 0)]

    def try_elsewhere(self, record: StepRecord, now: float) -> list[Action]:
        """Route a step that a worker failed, or refuse it after too many."""
        if record.tries >= self.max_attempts:
            reasons = dict.fromkeys(f"worker {w}: {why}" for w, why in record.failures)
            tried = f"failed {record.tries} times: {'; '.join(reasons)}"
            return self.refuse(record, "failed", tried)
        self._counters["redispatched"] += 1
        return self.route(record, now, has_waited=True)

    def refuse(
        self, record: StepRecord, code: str, reason: str, detour: Sequence[str] = ()
    ) -> list[Action]:
        """Tell the edge that a step will not be computed, and none that goes on from it."""

        def tell(each: StepRecord) -> Refuse:
            self._counters["refused"] += 1
            why = reason if each is record else f"it goes on from a step that is refused: {reason}"
            return Refuse(each.edge.address, each.step.key, code, why, detour)

        return self.remove(record, tell)

    def remove(self, record: StepRecord, tell: Tell | None = None) -> list[Action]:
        """A step will not be answered, nor will those that go on from it.

        The edge is told of each in the order that it sent them, unless it does not wait for them.
        """
        behind = self._book.drop_record(record)
        actions = self._withdraw(record, tell)
        return actions + self.remove_behind(record, behind, tell)

    def remove_behind(
        self, before: StepRecord, behind: Iterable[StepRecord], tell: Tell | None
    ) -> list[Action]:
        """Steps that go on from one that is not answered, wherever they are by now.

        That one may come again, for it is as if they had not been sent.
        """
        actions: list[Action] = []
        for record in behind:
            self._book.drop_record(record)
            actions += self._withdraw(record, tell)
        session = self._sessions.get(before.step.session_id)
        if session is not None:
            session.newest = before.step.key
        return actions

    def _withdraw(self, record: StepRecord, tell: Tell | None) -> list[Action]:
        """Nobody shall have a step any more."""
        if record.worker is None:
            self.take_from_queue(record)
        told = [tell(record)] if tell is not None else []
        return [Forget(record.step.key), *self.cancel_at_all(record), *told]

    def hand_out(self, session: SessionRecord, now: float) -> list[Action]:
        """Route the steps of a session that need not wait for those before them any more.

        One that has passed a part goes before steps that are new at the next.
        """
        actions: list[Action] = []
        for record in session.release():
            record.queued_at = now
            actions += self.route(record, now, has_waited=record.hop > 0)
        return actions

    def cancel_at_all(self, record: StepRecord, but: str = "") -> list[Action]:
        """Whoever has a step that is over shall drop it, and counts as busy until then."""
        holders = dict(record.late_on)
        if record.worker is not None:
            holders[record.worker.name] = record.attempts
        holders.pop(but, None)
        self._counters["cancelled"] += len(holders)
        return [
            Cancel(worker_id, record.step.key, attempt, record.edge.key)
            for worker_id, attempt in holders.items()
            if worker_id in self._workers
        ]

    def dispatch_to(self, worker: Worker | None, now: float) -> list[Action]:
        """A worker may have room: give it what waits for it, or for anybody."""
        actions: list[Action] = []
        if worker is None:
            return actions
        for pool in worker.pools:
            if pool.retries:
                actions += self._retry_at(worker, pool, now)
        while (key := self._next_for(worker, now)) is not None:
            actions.append(self._assign(self._steps[key], worker, now))
        return actions

    def _next_for(self, worker: Worker, now: float) -> StepKey | None:
        """Take the step that a worker should have next from its queue."""
        pools = [pool for pool in worker.pools if pool.waiting or pool.backlogs]
        if not pools or not worker.is_open or not worker.is_fresh(now):
            return None
        queues = [queue for pool in pools for queue in pool.queues_for(worker)]
        if queues:  # in turn, or those who wait for this one would always be first
            worker.turn = (worker.turn + 1) % len(queues)
            queues = queues[worker.turn :] + queues[: worker.turn]
        if not worker.in_flight:  # it may help others
            queues += [queue for pool in pools if (queue := pool.first_backlog()) is not None]
        for queue in queues:
            key = self._take_for(worker, queue)
            if key is not None:
                return key
        return None

    def _take_for(self, worker: Worker, queue: FairQueue) -> StepKey | None:
        """The first step in turn that a worker may have and that does not shun it."""
        for _ in range(LOOK_AT):
            may = (  # few fill their share of one worker
                account
                for account in queue.accounts()
                if worker.has_place_for(account, self._ledger.is_alone(account))
            )
            account = next(may, None)
            if account is None:
                return None
            key = queue.take(account)
            record = self._steps[key]
            if record.step.shun != worker.name or len(record.pool.workers) < 2:
                return key
            queue.add(account, key)  # behind its others
        return None

    def dispatch_from(self, pool: ServicePool, now: float) -> list[Action]:
        """Much may have changed in a pool: hand out what waits for anybody there."""
        actions = self._try_again(pool, now)
        is_anything_placed = True
        while is_anything_placed:
            is_anything_placed = False
            for account in list(pool.waiting.accounts()):
                worker = pool.find(account, self._ledger.is_alone(account), now)
                if worker is not None:
                    record = self._steps[pool.waiting.take(account)]
                    actions.append(self._assign(record, worker, now))
                    is_anything_placed = True
        return actions

    def queue_for_all(self, pool: ServicePool, keys: Iterable[StepKey]) -> None:
        """What waited for one worker waits for any."""
        for key in keys:
            record = self._steps[key]
            record.queue = pool.waiting
            pool.waiting.add(record.account, key)

    def release_backlogs(self, worker: Worker, now: float) -> list[Action]:
        """A worker is not waited for any more."""
        actions: list[Action] = []
        for pool in worker.pools:
            self.queue_for_all(pool, pool.take_backlog(worker))
            actions += self.dispatch_from(pool, now)
        return actions

    def rehome(self, pool: ServicePool, now: float) -> list[Action]:
        """Steps of sessions that nobody has answered yet need not wait for one precision."""
        actions: list[Action] = []
        if pool.workers:
            return actions
        for key in list(pool.queued()):
            record = self._steps[key]
            if self._book.choose_anew(record).workers:
                self.take_from_queue(record)
                actions += self.route(record, now)
        return actions

    def _retry_at(self, worker: Worker, pool: ServicePool, now: float) -> list[Action]:
        """A worker may have room: for steps that it has not failed, or that all have."""
        actions: list[Action] = []
        for key in list(islice(pool.retries, LOOK_AT)):
            if not worker.is_open or not worker.is_fresh(now):
                break
            record = self._steps[key]
            is_tried = record.failed_on(worker.name)
            if is_tried and len({name for name, _ in record.failures}) < len(pool.workers):
                continue
            if worker.has_place_for(record.account, self._ledger.is_alone(record.account)):
                del pool.retries[key]
                actions.append(self._assign(record, worker, now))
        return actions

    def _try_again(self, pool: ServicePool, now: float) -> list[Action]:
        """The workers of a pool are others than before."""
        actions: list[Action] = []
        for key in list(pool.retries):
            record = self._steps[key]
            worker = self._pick_untried(record, now)
            if worker is not None:
                del pool.retries[key]
                actions.append(self._assign(record, worker, now))
        return actions

    def _pick_untried(self, record: StepRecord, now: float) -> Worker | None:
        """A worker that has not failed the step; one that has, if there is no other."""
        is_alone = self._ledger.is_alone(record.account)
        workers = [w for w in record.pool.workers.values() if not (w.draining or w.is_gone)]
        able = [w for w in workers if w.announce.ready and w.is_fresh(now)]
        untried = [w for w in able if not record.failed_on(w.name)]
        candidates = [
            worker
            for worker in untried or workers
            if worker.is_open
            and worker.is_fresh(now)
            and worker.has_place_for(record.account, is_alone)
        ]
        moving = [w for w in candidates if not w.is_stuck(now, record.pool.patience_s)]
        warm = self._book.warm_worker_of(record)
        if warm in moving and not record.failed_on(warm.name if warm else ""):
            return warm
        return min(moving or candidates, key=lambda w: len(w.in_flight), default=None)

    def look_after_late_workers(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in self._workers.values():
            if not worker.is_stuck(now, HAND_OVER_S):
                continue
            for key, flight in list(worker.in_flight.items()):
                if now - flight.sent_at < HAND_OVER_S:
                    break
                record = self._steps.get(key)
                if record is not None and record.worker is worker:
                    actions += self._hand_over(record, worker, now)
            if any(worker.is_stuck(now, pool.patience_s) for pool in worker.pools):
                actions += self.release_backlogs(worker, now)
        return actions

    def _hand_over(self, record: StepRecord, late: Worker, now: float) -> list[Action]:
        """Give a step that is late to an idle worker too, each time with twice the patience."""
        if now - record.sent_at < record.pool.patience_s * 2**record.moves:
            return []
        idle = next(
            (
                worker
                for worker in record.pool.idle(now)
                if worker.name not in record.late_on and not record.failed_on(worker.name)
            ),
            None,
        )
        if idle is None:
            return []
        record.late_on[late.name] = late_attempt = record.attempts
        record.moves += 1
        self._counters["handed_over"] += 1
        return [
            Note(f"a step is late on worker {late.name}: {idle.name} too"),
            self._assign(record, idle, now),
            Cancel(late.name, record.step.key, late_attempt, record.edge.key),
        ]
