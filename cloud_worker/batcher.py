"""Which of the steps that are ready go into the next batch. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from common.messages import AnyOpening, AnyStep, Opening, Step


@dataclass(slots=True)
class Task:
    """A step at a worker."""

    step: AnyStep
    opening: AnyOpening
    body: bytes
    attempt: int
    source: int  # index of the broker it came from
    broker_queue_us: int
    arrived_at: float
    owner: str = ""  # the edge's public key

    @property
    def text_step(self) -> Step:
        assert isinstance(self.step, Step)
        return self.step

    @property
    def text_opening(self) -> Opening:
        assert isinstance(self.opening, Opening)
        return self.opening

    @property
    def session_key(self) -> bytes:
        """Names the session here and in the store: two edges that choose one id share nothing.

        In the store it is also the right to touch the session, see cloud_worker/store.py.
        """
        return make_session_key(self.step.session_id, self.owner)


def make_session_key(session_id: bytes, owner: str) -> bytes:
    """An edge's session: its id, then the edge's key."""
    return session_id + owner.encode()


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

    def drop_session(self, session_key: bytes) -> None:
        """Forget what is ready of a session: it is over, or a newer step has come."""
        self._ready = deque(t for t in self._ready if t.session_key != session_key)

    def session_keys(self) -> set[bytes]:
        """Whose steps are ready: their KV must stay."""
        return {task.session_key for task in self._ready}

    def pick(self) -> list[Task]:
        """Take the next batch out of what is ready."""
        batch: list[Task] = []
        left: deque[Task] = deque()
        sessions: set[bytes] = set()
        rows = 0
        for task in self._ready:
            fits = not batch or rows + task.text_step.rows <= self._max_rows
            if fits and len(batch) < self._max_steps and task.session_key not in sessions:
                batch.append(task)
                sessions.add(task.session_key)
                rows += task.text_step.rows
            else:
                left.append(task)
        self._ready = left
        return batch
