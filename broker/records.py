"""What the broker remembers of steps and sessions. Workers are in broker/pools.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from broker.fair_queue import FairQueue
from broker.ledger import Account
from broker.peer import Peer
from broker.pools import ServicePool, Worker
from common.protocol.messages import AnyOpening, AnyStep, StepKey

SEND_AGAIN_S = 1.0


@dataclass(slots=True, eq=False)
class StepRecord:
    """A step between its arrival and its answer."""

    step: AnyStep
    pool: ServicePool
    edge: Peer
    account: Account  # of the edge when it came; it may have connected anew since
    body_bytes: int
    arrived_at: float
    queued_at: float
    deadline_at: float
    worker: Worker | None = None  # that has it now
    queue: FairQueue | None = None  # in which it waits
    attempts: int = 0
    sent_at: float = 0.0
    asked_at: float = 0.0  # the worker, for the last time
    failures: list[tuple[str, str]] = field(default_factory=list)  # worker, reason
    late_on: dict[str, int] = field(default_factory=dict)  # worker -> attempt that may still answer
    moves: int = 0  # attempts that were made because another took long
    again_after_s: float = SEND_AGAIN_S
    edge_gone_at: float | None = None
    wait_until: float = 0.0  # before it is handed out again

    @property
    def tries(self) -> int:
        """Attempts that count against the step."""
        return self.attempts - self.moves

    @property
    def worker_id(self) -> str | None:
        return self.worker.name if self.worker is not None else None

    def failed_on(self, worker_id: str) -> bool:
        return any(failed == worker_id for failed, _ in self.failures)


@dataclass(slots=True, eq=False)
class SessionRecord:
    """How a session was opened, where its KV is warm, and its newest step."""

    opening: AnyOpening
    edge: Peer
    account: Account
    newest: StepKey
    seen_at: float
    opening_frame: bytes = b""  # as it came
    precision: str = ""  # of the workers that have answered
    worker: Worker | None = None  # that answered last

    @property
    def warm_worker(self) -> Worker | None:
        """Who has its KV in memory, if it is still here."""
        return self.worker if self.worker is not None and not self.worker.is_gone else None

    @property
    def worker_id(self) -> str | None:
        worker = self.warm_worker
        return worker.name if worker is not None else None
