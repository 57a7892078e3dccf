"""What the broker remembers of steps and sessions. Workers are in broker/pools.py."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from broker.fair_queue import FairQueue
from broker.ledger import Account
from broker.peer import Peer
from broker.pools import ServicePool, Worker
from common.protocol.messages import AnyOpening, Step, StepKey, StepReply

SEND_AGAIN_S = 1.0
EDGE_RETURN_S = 5.0  # how long the steps of an edge that has gone are kept for its return
MOST_US = 3600 * 10**6  # that a worker is believed to have taken


@dataclass(frozen=True, slots=True)
class Suspect:
    """Whose rows of a step nobody at the next part could use."""

    key: StepKey
    hop: int
    worker_id: str


@dataclass(slots=True, eq=False)
class StepRecord:
    """A step between its arrival and its answer, on its way along its session's route."""

    step: Step  # as it goes to the part whose turn it is
    pool: ServicePool
    edge: Peer
    account: Account  # of the edge when it came; it may have connected anew since
    body_bytes: int
    arrived_at: float
    queued_at: float
    deadline_at: float
    worker: Worker | None = None  # that has it now
    queue: FairQueue | None = None  # in which it waits
    hop: int = 0  # index of that part
    units: list[int] = field(default_factory=list)  # of rows, as the edge sent them; if exact
    attempts: int = 0
    earlier_attempts: int = 0  # at the parts that it has passed
    earlier_queue_us: int = 0
    earlier_compute_us: int = 0
    sent_at: float = 0.0
    asked_at: float = 0.0  # the worker, for the last time
    failures: list[tuple[str, str]] = field(default_factory=list)  # worker, reason
    late_on: dict[str, int] = field(default_factory=dict)  # worker -> attempt that may still answer
    moves: int = 0  # attempts that were made because another took long
    again_after_s: float = SEND_AGAIN_S
    edge_gone_at: float | None = None
    wait_until: float = 0.0  # before it is handed out again
    is_held: bool = False  # until the step that it goes on from has passed the part

    @property
    def tries(self) -> int:
        """Attempts at this part that count against the step."""
        return self.attempts - self.earlier_attempts - self.moves

    @property
    def worker_id(self) -> str | None:
        return self.worker.name if self.worker is not None else None

    def is_left(self, now: float) -> bool:
        """Whether its edge has not come back in the time that it has for that."""
        return self.edge_gone_at is not None and now - self.edge_gone_at >= EDGE_RETURN_S

    def blame(self, suspect: Suspect | None) -> None:
        """Rather not who is suspected, at the part where it is."""
        if suspect is not None and (suspect.key, suspect.hop) == (self.step.key, self.hop):
            self.failures.append((suspect.worker_id, "the next part could not use its rows"))

    def learn_demand(self, answer: StepReply) -> None:
        """How long it waited at this part and was computed, which is the worker's word."""
        wait_us = min(answer.queue_us, MOST_US) - self.earlier_queue_us
        compute_us = min(answer.compute_us, MOST_US) - self.earlier_compute_us
        self.pool.demand.observe(max(0, wait_us) / 1e6, max(0, compute_us) / 1e6)

    def failed_on(self, worker_id: str) -> bool:
        return any(failed == worker_id for failed, _ in self.failures)

    def pass_on(self, step: Step, answer: StepReply, body_bytes: int, now: float) -> None:
        """A part has computed the step: what it said goes to the next one as `step`."""
        self.step, self.body_bytes = step, body_bytes
        self.hop += 1
        self.earlier_attempts = self.attempts
        self.earlier_queue_us = min(answer.queue_us, MOST_US)
        self.earlier_compute_us = min(answer.compute_us, MOST_US)
        self.worker, self.moves, self.queued_at, self.wait_until = None, 0, now, 0.0
        self.failures.clear()
        self.late_on.clear()


@dataclass(slots=True, eq=False)
class SessionRecord:
    """How a session was opened, where each part of its KV is warm, and its steps.

    `steps` are not answered yet; each goes on where the one before it ends, and waits at a part of
    the route until that one has passed it.
    """

    opening: AnyOpening
    edge: Peer
    account: Account
    newest: StepKey
    seen_at: float
    opening_frame: bytes = b""  # as it came
    precision: str = ""  # of the workers that have answered
    workers: dict[int, Worker] = field(default_factory=dict)  # by hop: who answered last there
    steps: deque[StepRecord] = field(default_factory=deque)
    suspect: Suspect | None = None  # because of whom a step was asked for anew

    @property
    def last(self) -> StepRecord | None:
        """The newest step that is not answered yet."""
        return self.steps[-1] if self.steps else None

    def release(self) -> list[StepRecord]:
        """Steps that are held and need not be any more: nobody is before them at their part."""
        released, before = [], None
        for record in self.steps:
            if record.is_held and (before is None or before.hop > record.hop):
                record.is_held = False
                released.append(record)
            before = record
        return released

    def warm_worker(self, hop: int) -> Worker | None:
        """Who has its KV of a part in memory, if it is still here."""
        worker = self.workers.get(hop)
        return worker if worker is not None and not worker.is_gone else None

    def leave(self, worker_id: str) -> None:
        """A worker is warm no more."""
        for hop in [hop for hop, worker in self.workers.items() if worker.name == worker_id]:
            del self.workers[hop]
