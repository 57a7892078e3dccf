"""Which of the steps that are ready go into the next batch. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from common.errors import ProtocolError
from common.protocol.messages import AnyOpening, Opening, Step, StepKey


@dataclass(slots=True)
class Task:
    """A step at a worker."""

    step: Step
    opening: AnyOpening
    body: bytes
    attempt: int
    source: int  # index of the broker it came from
    broker_queue_us: int
    arrived_at: float
    owner: str = ""  # the edge's public key
    edge: int = 0  # the broker's number for it
    precision: str = ""  # in which the session was begun, if somebody knows
    earlier_us: int = 0  # that other workers took for the parts before this one
    hop: int = 0  # index of this one on the session's route
    units: Sequence[int] = ()  # rows of each part that the edge sent, where the step does not say
    was_looked_up: bool = False  # what it lacks: it is not in the store either

    @property
    def text_opening(self) -> Opening:
        """Raises ProtocolError for an image's."""
        if not isinstance(self.opening, Opening):
            raise ProtocolError(f"a text's step comes with {self.opening.kind!r}")
        return self.opening

    @property
    def session_key(self) -> bytes:
        """Names the session at this part, here and in the store.

        Two edges that choose one id share nothing.

        In the store it is also the right to touch the session, see cloud_worker/state/store.py.
        """
        return make_session_key(self.step.session_id, self.owner, self.part)

    @property
    def part(self) -> str:
        """Of the model, whose turn it is."""
        return self.opening.route[self.hop]

    @property
    def is_last(self) -> bool:
        """Whether the edge gets what comes out, and not the next part."""
        return self.hop + 1 == len(self.opening.route)

    @property
    def reply_rows(self) -> int:
        """Of text: how many of its last rows to answer with."""
        return self.step.reply_rows if self.is_last else self.step.rows

    @property
    def reply_codec(self) -> str:
        """Of text: in which to answer."""
        opening = self.text_opening
        return opening.codecs[self.step.reply_codec if self.is_last else opening.between]

    @property
    def account(self) -> str:
        """The edge whose share of the store the session takes: its key, else a number for it."""
        return self.owner or str(self.edge)


def make_session_key(session_id: bytes, owner: str, part: str) -> bytes:
    """An edge's session at one part of its model: its id, the edge's key, the part."""
    return session_id + f"{owner}/{part}".encode()


class Batcher:
    """Edges in turn, up to `max_rows` rows and `max_steps` steps in a batch.

    Of one edge's steps the first that came goes first. A step with more rows than that has a batch
    of its own. A session is in a batch at most once: its second step needs the first one's KV.
    """

    def __init__(
        self,
        max_rows: int,
        max_steps: int,
        count_rows: Callable[[Task], int] = lambda task: task.step.rows,
        shape_of: Callable[[Task], object] = lambda task: None,
    ) -> None:
        """Steps of one shape only are in a batch together."""
        self._max_rows = max_rows
        self._max_steps = max_steps
        self._count_rows = count_rows
        self._shape_of = shape_of
        self._ready: deque[Task] = deque()
        self._last_edge = 0

    def __len__(self) -> int:
        return len(self._ready)

    def add(self, task: Task) -> None:
        self._ready.append(task)

    def renew(self, task: Task) -> bool:
        """Put a step that was sent again in its own place. False if it is not here."""
        for index, known in enumerate(self._ready):
            if known.session_key == task.session_key and known.step.key == task.step.key:
                self._ready[index] = task
                return True
        return False

    def drop_session(self, session_key: bytes) -> list[Task]:
        """Take out what is ready of a session: it is over, or a newer step has come."""
        dropped = [t for t in self._ready if t.session_key == session_key]
        if dropped:
            self._ready = deque(t for t in self._ready if t.session_key != session_key)
        return dropped

    def drop_step(self, session_key: bytes, key: StepKey) -> None:
        """Forget one step."""
        self._ready = deque(
            t for t in self._ready if t.session_key != session_key or t.step.key != key
        )

    def session_keys(self) -> set[bytes]:
        """Whose steps are ready: their KV must stay."""
        return {task.session_key for task in self._ready}

    def pick(self) -> list[Task]:
        """Take the next batch out of what is ready."""
        batch: list[Task] = []
        left: deque[Task] = deque()
        sessions: set[bytes] = set()
        rows, shape = 0, None
        for task in self._in_turn():
            own_rows, own_shape = self._count_rows(task), self._shape_of(task)
            fits = not batch or (rows + own_rows <= self._max_rows and own_shape == shape)
            if fits and len(batch) < self._max_steps and task.session_key not in sessions:
                batch.append(task)
                sessions.add(task.session_key)
                rows, shape = rows + own_rows, own_shape
            else:
                left.append(task)
        self._ready = left
        if batch:
            self._last_edge = batch[-1].edge
        return batch

    def _in_turn(self) -> list[Task]:
        """What is ready, one step of each edge after another, beginning behind the last served."""
        by_edge: dict[int, deque[Task]] = {}
        for task in self._ready:
            by_edge.setdefault(task.edge, deque()).append(task)
        if len(by_edge) < 2:
            return list(self._ready)
        edges = sorted(by_edge, key=lambda edge: (edge <= self._last_edge, edge))
        return [task for turn in zip_longest(*(by_edge[e] for e in edges)) for task in turn if task]
