"""The workers of a service, sorted by how busy they are, and the steps that wait for them.

Every change takes constant time, however many workers there are: a worker moves from one shelf to
the next when a step comes or goes, and who is silent or late is found out when it is looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from broker.demand import DEFAULT_GOALS, Demand, Goals
from broker.fair_queue import FairQueue
from broker.ledger import Account
from broker.peer import Peer
from common.metrics.histogram import SECONDS, Histogram
from common.protocol.messages import Announce, Service, StepKey

ServiceKey = tuple[str, str, str]  # model fingerprint, part, precision

HAND_OVER_S, HAND_OVER_TIMES = 2.0, 3.0  # of what the service's steps usually take
LOOK_AT = 16  # workers, for one on which an edge does not fill its share


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that a worker was sent, and has neither answered nor confirmed to have dropped."""

    account: Account
    sent_at: float


@dataclass(slots=True, eq=False)
class Worker:
    """A worker as it last announced itself."""

    announce: Announce
    peer: Peer  # the connection that takes its steps
    seen_at: float
    fresh_s: float  # who was silent for longer gets nothing new
    pools: list[ServicePool] = field(default_factory=list)
    draining: bool = False
    is_gone: bool = False
    is_quiet: bool = False
    in_flight: dict[StepKey, Flight] = field(default_factory=dict)
    steps_done: int = 0
    turn: int = 0  # of the queues that it takes from
    _of_account: dict[bytes, int] = field(default_factory=dict)  # steps, by the account's name

    @property
    def name(self) -> str:
        return self.announce.worker_id

    def describe_state(self) -> str:
        """One word for what it is doing."""
        if self.draining:
            return "draining"
        return "ready" if self.announce.ready else "starting"

    def is_same(self, announce: Announce, peer: Peer) -> bool:
        """Whether the one that announces itself is this worker, connected anew or not.

        Without keys only its connection says so: host and process are mere words.
        """
        if not peer.key:
            return peer.address == self.peer.address
        claim = (peer.key, announce.host, announce.pid)
        return claim == (self.peer.key, self.announce.host, self.announce.pid)

    @property
    def room(self) -> int:
        if self.draining or self.is_gone or not self.announce.ready:
            return 0
        return self.announce.capacity - len(self.in_flight)

    @property
    def is_open(self) -> bool:
        """Whether it takes another step, as far as we know."""
        return not self.is_quiet and self.room > 0

    @property
    def share(self) -> int:
        """How many steps one edge may have here while others have sessions, too."""
        return max(1, self.announce.capacity // 2)

    @property
    def oldest(self) -> Flight | None:
        return next(iter(self.in_flight.values()), None)

    def has_place_for(self, account: Account, is_alone: bool) -> bool:
        return is_alone or self._of_account.get(account.name, 0) < self.share

    def take(self, key: StepKey, account: Account, now: float) -> None:
        """A step was sent to it."""
        self._forget(key)
        self.in_flight[key] = Flight(account, now)
        self._of_account[account.name] = self._of_account.get(account.name, 0) + 1
        self.settle()

    def drop(self, key: StepKey) -> None:
        """It has answered a step, or will not compute it."""
        if self._forget(key):
            self.settle()

    def _forget(self, key: StepKey) -> bool:
        flight = self.in_flight.pop(key, None)
        if flight is None:
            return False
        name = flight.account.name
        count = self._of_account[name] - 1
        if count:
            self._of_account[name] = count
        else:
            del self._of_account[name]
        return True

    def settle(self) -> None:
        """Tell its pools that something about it has changed."""
        for pool in self.pools:
            pool.settle(self)

    def is_fresh(self, now: float) -> bool:
        """Heard of lately. When a whole pool pauses, a step does not go from silent to silent."""
        if not self.is_quiet and now - self.seen_at >= self.fresh_s:
            self.is_quiet = True
            self.settle()
        return not self.is_quiet

    def hear(self, now: float) -> None:
        """It gave a sign of life."""
        self.seen_at = now
        if self.is_quiet:
            self.is_quiet = False
            self.settle()

    def is_stuck(self, now: float, patience_s: float) -> bool:
        """Whether a step has been here for so long that new ones better go elsewhere."""
        oldest = self.oldest
        return oldest is not None and now - oldest.sent_at >= patience_s


class ServicePool:
    """Who serves one part of one model in one precision, and what waits for that."""

    def __init__(self, key: ServiceKey, goals: Goals = DEFAULT_GOALS) -> None:
        self.key = key
        self.demand = Demand(goals)
        self.workers: dict[str, Worker] = {}
        self.waiting = FairQueue()  # for whoever has room
        self.backlogs: dict[Worker, FairQueue] = {}  # for the worker that is warm for them
        self.retries: dict[StepKey, None] = {}  # steps that failed somewhere: few, if any
        self.gone_at: float | None = None  # when the last worker went
        self.waits = Histogram(SECONDS)  # of steps, until a worker got them
        self._usual_s: float | None = None  # of a step at a worker, lately
        self._shelves: list[dict[Worker, None]] = []  # by the number of steps in flight
        self._load: dict[Worker, int] = {}  # of those on a shelf
        self._lowest = 0  # no shelf below has anybody
        self._late: dict[Worker, Flight] = {}  # with the step that takes so long

    def count_queued(self) -> int:
        backlogs = sum(len(queue) for queue in self.backlogs.values())
        return len(self.waiting) + backlogs + len(self.retries)

    def queued(self) -> Iterator[StepKey]:
        """The steps that wait here."""
        yield from self.retries
        yield from self.waiting
        for queue in self.backlogs.values():
            yield from queue

    # --- workers

    def add(self, worker: Worker) -> None:
        self.workers[worker.name] = worker
        worker.pools.append(self)
        self.settle(worker)

    def remove(self, worker: Worker) -> list[StepKey]:
        """A worker does not serve this any more; what waited for it alone, to be queued anew."""
        self._put(worker, -1)
        self._late.pop(worker, None)
        self.workers.pop(worker.name, None)
        worker.pools.remove(self)
        return self.take_backlog(worker)

    def take_backlog(self, worker: Worker) -> list[StepKey]:
        """What waits for a worker, which is not to be waited for."""
        return list(self.backlogs.pop(worker, ()))

    def backlog_of(self, worker: Worker) -> FairQueue:
        queue = self.backlogs.get(worker)
        if queue is None:
            queue = self.backlogs[worker] = FairQueue()
        return queue

    def queues_for(self, worker: Worker) -> list[FairQueue]:
        """What a worker may take from: its own backlog, and what waits for anybody."""
        own = self.backlogs.get(worker)
        if own is not None and not own:
            del self.backlogs[worker]
        return [queue for queue in (own, self.waiting) if queue]

    def first_backlog(self) -> FairQueue | None:
        """One that has something in it."""
        while self.backlogs:
            worker, queue = next(iter(self.backlogs.items()))
            if queue:
                return queue
            del self.backlogs[worker]
        return None

    def settle(self, worker: Worker) -> None:
        """Put a worker on the shelf where it belongs now."""
        late = self._late.get(worker)
        if late is not None and late is not worker.oldest:
            del self._late[worker]
            late = None
        self._put(worker, len(worker.in_flight) if late is None and worker.is_open else -1)

    def _put(self, worker: Worker, load: int) -> None:
        before = self._load.get(worker, -1)
        if load == before:
            return
        if before >= 0:
            del self._shelves[before][worker]
        if load < 0:
            del self._load[worker]
            return
        while len(self._shelves) <= load:
            self._shelves.append({})
        self._shelves[load][worker] = None
        self._load[worker] = load
        self._lowest = min(self._lowest, load)

    @property
    def least_load(self) -> int:
        """Of the least busy worker; more than any has if nobody has room."""
        while self._lowest < len(self._shelves) and not self._shelves[self._lowest]:
            self._lowest += 1
        return self._lowest

    def find(
        self, account: Account, is_alone: bool, now: float, only_idle: bool = False, but: str = ""
    ) -> Worker | None:
        """The least busy worker that takes a step of an edge now, `but` one."""
        looked_at = 0
        load = self.least_load
        while load < len(self._shelves) and not (only_idle and load):
            for worker in self._shelves[load]:
                if self._sets_aside(worker, now):
                    break
                if worker.name != but and worker.has_place_for(account, is_alone):
                    return worker
                looked_at += 1
                if looked_at == LOOK_AT:
                    return None
            else:
                load += 1
        if only_idle:
            return None
        late = [w for w in self._late if w.is_open and w.is_fresh(now)]
        free = [w for w in late if w.name != but and w.has_place_for(account, is_alone)]
        return min(free, key=lambda w: len(w.in_flight), default=None)

    def _sets_aside(self, worker: Worker, now: float) -> bool:
        """Take a worker off its shelf if it is silent or late."""
        if not worker.is_fresh(now):
            return True
        oldest = worker.oldest
        if oldest is None or now - oldest.sent_at < self.patience_s:
            return False
        self._late[worker] = oldest
        self.settle(worker)
        return True

    def idle(self, now: float) -> Iterator[Worker]:
        """Workers that have nothing to do."""
        return (w for w in list(self._shelves[0] if self._shelves else ()) if w.is_fresh(now))

    # --- how long steps take

    def learn_time(self, taken_s: float) -> None:
        if self._usual_s is None:
            self._usual_s = taken_s
        self._usual_s += (taken_s - self._usual_s) / 8

    @property
    def patience_s(self) -> float:
        """After how long a step at a worker is late."""
        return max(HAND_OVER_S, HAND_OVER_TIMES * (self._usual_s or 0.0))


def service_key(service: Service) -> ServiceKey:
    return service.model, service.part, service.precision


def describe_service(service: Service) -> str:
    """`stories-llama 2-6 (fingerprint 0123456789abcdef) in float32`"""
    precision = f" in {service.precision}" if service.precision else ""
    return f"{service.name} {service.part} (fingerprint {service.model}){precision}"
