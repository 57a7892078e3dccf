"""Which of the steps that are ready go into the next batch. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from common.messages import Opening, Step


@dataclass(slots=True)
class Task:
    """A step at a worker."""

    step: Step
    opening: Opening
    body: bytes
    attempt: int
    source: int  # index of the broker it came from
    broker_queue_us: int
    arrived_at: float


class Batcher:
    """First come, first served, up to `max_rows` rows and `max_steps` steps in a batch.

    A step with more rows than that has a batch of its own. A session is in a batch at most once:
    its second step needs the first one's KV.
    """

    def __init__(self, max_rows: int, max_steps: int) -> None:
        self._max_rows = max_rows
        self._max_steps = max_steps
        self._ready: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, task: Task) -> None:
        self._ready.append(task)

    def drop_session(self, session_id: bytes) -> None:
        """Forget what is ready of a session: it is over, or a newer step has come."""
        self._ready = deque(t for t in self._ready if t.step.session_id != session_id)

    def session_ids(self) -> set[bytes]:
        """Whose steps are ready: their KV must stay."""
        return {task.step.session_id for task in self._ready}

    def pick(self) -> list[Task]:
        """Take the next batch out of what is ready."""
        batch: list[Task] = []
        left: deque[Task] = deque()
        sessions: set[bytes] = set()
        rows = 0
        for task in self._ready:
            fits = not batch or rows + task.step.rows <= self._max_rows
            if fits and len(batch) < self._max_steps and task.step.session_id not in sessions:
                batch.append(task)
                sessions.add(task.step.session_id)
                rows += task.step.rows
            else:
                left.append(task)
        self._ready = left
        return batch
