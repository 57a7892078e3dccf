"""How services answer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cloud_worker.loop.batcher import Task
from common.protocol.messages import Need, StepReply


class Outbox(Protocol):
    """Takes answers on their way to the broker that a step came from."""

    worker_id: str

    def answer(self, task: Task, message: StepReply | Need, *bodies: bytes) -> None: ...

    def fail(self, task: Task, reason: str) -> None: ...

    def drop(self, task: Task) -> None:
        """Say that a step is not computed here: nobody waits for it."""
        ...

    def when_answered(self, work: Callable[[], None]) -> None:
        """Do what nobody waits for when the answers are on their way, before any more is read."""
        ...

    def is_cancelled(self, task: Task) -> bool:
        """Whether a broker has said so while something was computed."""
        ...
