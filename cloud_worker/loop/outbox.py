"""How services answer steps, and what the worker's loop asks of a service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cloud_worker.loop.batcher import Task
from cloud_worker.state.store import StoreEvent
from common.protocol.messages import Need, Service, StepKey, StepReply


class Outbox(Protocol):
    """Takes answers on their way to the broker that a step came from."""

    worker_id: str

    def answer(self, task: Task, message: StepReply | Need, *bodies: bytes) -> None: ...

    def fail(self, task: Task, reason: str) -> None: ...

    def drop(self, task: Task) -> None:
        """Say that a step is not computed here: nobody waits for it."""
        ...

    def is_cancelled(self, task: Task) -> bool:
        """Whether a broker has said so while something was computed."""
        ...


class StepService(Protocol):
    """Sessions of one kind: it takes their steps and answers them through an Outbox."""

    kind: str  # of work, for its share of the worker's time
    service: Service
    stats: dict[str, int]

    def check_ready(self, is_over: Callable[[], bool]) -> None:
        """Compute and store a step of its own. Raises MidspanError."""
        ...

    def on_step(self, task: Task) -> None: ...

    def on_end(self, session_key: bytes) -> None: ...

    def on_cancel(self, session_key: bytes, key: StepKey) -> None:
        """Forget a step that waits here."""
        ...

    def on_store_event(self, event: StoreEvent) -> None:
        """Something the store did, perhaps for another service."""
        ...

    def has_batch(self) -> bool: ...

    def count_ready(self) -> int:
        """Steps that could be in a batch now, or in the next ones."""
        ...

    def run_batch(self) -> None: ...

    def tidy(self) -> None: ...

    def is_settled(self) -> bool: ...

    def warm_bytes(self) -> int: ...
