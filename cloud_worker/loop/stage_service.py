"""What serving text and serving images have in common: the way of a step through its stage.

A step finds the stage of its session, waits until that has every item it needs (in memory, from
the store, else the edge is asked), is computed in a batch with others, and answered. A step that
comes again keeps its place or has the last reply again; a newer one puts an older one aside.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic

from msgspec import structs

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.precision import check_precision, tell_precision
from cloud_worker.state.blobs import Blobs
from cloud_worker.state.row_seals import Checksum, KvCipher, RowSeal
from cloud_worker.state.stage_cache import CacheBudget, S, StageCache
from cloud_worker.state.store import KvStore, StoreEvent
from common.errors import MidspanError, SettingsError
from common.metrics.histogram import SECONDS, STEPS, Histogram
from common.protocol.messages import Need, Service, StepKey, StepReply
from common.security.keys import KeyPair
from common.security.sealing import open_sealed

COUNTERS = ("loads_given_up", "commits_over_share", "body_bytes_in", "body_bytes_out")
ROWS = "rows"  # the item of a stage that grows; a need of it has no name


@dataclass(slots=True)
class Loading:
    """A step that waits for items of its stage from the store."""

    task: Task
    items: set[str]


class StageService(ABC, Generic[S]):
    """One part of one model. What differs between kinds is below, under "what a kind does"."""

    kind: ClassVar[str]  # of work, for its share of the worker's time
    counters: ClassVar[Sequence[str]]
    keep_reply_bytes: ClassVar[int]

    def __init__(
        self,
        service: Service,
        store: KvStore,
        outbox: Outbox,
        *,
        batcher: Batcher,
        budget: CacheBudget,
        pool_key: KeyPair | None,
    ) -> None:
        self.service = service
        self.stats = dict.fromkeys((*COUNTERS, *self.counters), 0)
        self.batch_steps, self.batch_seconds = Histogram(STEPS), Histogram(SECONDS)
        self._store = store
        self._outbox = outbox
        self._batcher = batcher
        self._budget = budget
        self._pool_key = pool_key
        self._stages: StageCache[S] = StageCache(budget, self._find_busy)
        self._loading: dict[bytes, Loading] = {}
        self._blobs = Blobs(
            store, f"{service.model} {service.part} blob", outbox.worker_id, self.stats
        )

    # --- what the worker asks

    def check_ready(self, is_over: Callable[[], bool]) -> None:
        """Compute a step of its own, store what that leaves, read it back. Raises MidspanError.

        StoreUnavailable if only the store is at fault.
        """
        self._blobs.check(self._compute_test_step(), is_over)

    def has_batch(self) -> bool:
        """Whether a step is ready to be computed."""
        return len(self._batcher) > 0

    def count_ready(self) -> int:
        """Steps that could be in a batch now, or in the next ones."""
        return len(self._batcher)

    def is_settled(self) -> bool:
        """Whether all that came is answered and stored."""
        return not len(self._batcher) and not self._loading and self._blobs.is_settled()

    def why_unfit(self) -> str:
        """Why it can compute no step any more; empty as long as it can."""
        return ""

    def warm_bytes(self) -> int:
        """Of all stages in memory."""
        return self._stages.used_bytes()

    def count_uncommitted(self) -> int:
        """Rows in memory that the store does not have yet."""
        return 0

    def tidy(self) -> None:
        """Forget the stages that were longest not used, when they are too many or too large."""
        self._budget.evict()

    def on_store_event(self, event: StoreEvent) -> None:
        """Something the store did, perhaps for another service."""
        self._blobs.on_event(event)

    def on_end(self, session_key: bytes) -> None:
        """A session is over: whatever is here of it goes, and what is in the store."""
        self._put_aside(session_key)
        self._stages.drop(session_key)
        self._forget_stored(session_key)

    def on_cancel(self, session_key: bytes, key: StepKey) -> None:
        """Forget a step that waits here."""
        loading = self._loading.get(session_key)
        if loading is not None and loading.task.step.key == key:
            del self._loading[session_key]
        self._batcher.drop_step(session_key, key)

    def on_step(self, task: Task) -> None:
        """Take a step; answers at once if it cannot be computed, or was."""
        try:
            check_precision(task, self.service)
            self._check(task)
            stage = self._open_stage(task)
            said = stage.reply_to(task.step.key)
            if said is not None:
                self._outbox.answer(task, structs.replace(said[0], attempt=task.attempt), said[1])
                return
            if self._is_waiting(task):
                return
            stage.account = task.account
            self._take(task, stage)
        except MidspanError as error:
            self._outbox.fail(task, str(error))
            return
        self.stats["body_bytes_in"] += len(task.body)
        self._put_aside(task.session_key)
        self._prepare(task, stage)

    def run_batch(self) -> None:
        """Compute the next batch, if a step is ready."""
        started_at = time.monotonic()
        pairs = []
        for task in self._batcher.pick():
            stage = self._open_stage(task)
            if self._lacking(task, stage):  # something has happened since
                task.was_looked_up = False
                self._prepare(task, stage)
            else:
                pairs.append((task, stage))
        if pairs:
            self._compute(pairs, started_at)
            self.batch_steps.observe(len(pairs))
            self.batch_seconds.observe(time.monotonic() - started_at)

    # --- what a kind does

    @abstractmethod
    def _compute_test_step(self) -> bytes:
        """Compute a step; bytes of what it would leave in the store. Raises MidspanError."""

    @abstractmethod
    def _check(self, task: Task) -> None:
        """Raise a MidspanError for a step that nobody can compute, before anything is decoded."""

    @abstractmethod
    def _new_stage(self, task: Task, seal: RowSeal) -> S:
        """An empty stage for a session that is new here."""

    @abstractmethod
    def _take(self, task: Task, stage: S) -> None:
        """Put what came with a step into the stage. Raises a MidspanError if it does not fit."""

    @abstractmethod
    def _lacking(self, task: Task, stage: S) -> list[str]:
        """Items that the step needs and the stage does not have."""

    @abstractmethod
    def _load(self, task: Task, stage: S, item: str) -> None:
        """Begin to read an item from the store; say what became of it with `_on_item_read`."""

    @abstractmethod
    def _compute(self, pairs: Sequence[tuple[Task, S]], started_at: float) -> None:
        """Compute steps and answer them."""

    @abstractmethod
    def _forget_stored(self, session_key: bytes) -> None:
        """Delete what the store has of a session at this part."""

    def _rows_in(self, stage: S) -> int:
        """How many rows a stage has, for the edge to go on from there."""
        return 0

    # --- a step and its stage

    def _open_stage(self, task: Task) -> S:
        """The stage of a step, most recently used from now on; empty if it is new here."""
        key = task.session_key
        return self._stages.use(key, lambda: self._new_stage(task, self._make_seal(task)))

    def _make_seal(self, task: Task) -> RowSeal:
        sealed_key = task.opening.sealed_key
        if not sealed_key:
            return Checksum(task.session_key)
        if self._pool_key is None:
            raise SettingsError(
                "the session wants what it leaves in the store encrypted, and this worker has no "
                "--pool-key"
            )
        return KvCipher(open_sealed(sealed_key, self._pool_key), task.session_key)

    def _prepare(self, task: Task, stage: S) -> None:
        """Make a step ready, look for what it lacks in the store, or ask the edge for that."""
        items = self._lacking(task, stage)
        if not items:
            self._batcher.add(task)
        elif task.was_looked_up:
            self._ask_edge(task, stage, items)
        else:
            task.was_looked_up = True
            self._loading[task.session_key] = Loading(task, set(items))
            for item in items:
                self._load(task, stage, item)

    def _on_item_read(self, session_key: bytes, item: str) -> None:
        """The store was asked for an item; whatever it had is in the stage."""
        loading, stage = self._loading.get(session_key), self._stages.find(session_key)
        if loading is None or stage is None:
            return
        loading.items.discard(item)
        if not loading.items:
            del self._loading[session_key]
            self._prepare(loading.task, stage)

    def _ask_edge(self, task: Task, stage: S, items: list[str]) -> None:
        names = [item for item in items if item != ROWS]
        need = Need(
            *task.step.key, task.attempt, self._rows_in(stage), names, self._outbox.worker_id,
            tell_precision(task, self.service),
        )  # fmt: skip
        self._outbox.answer(task, need)

    def _is_waiting(self, task: Task) -> bool:
        """Whether a step that was sent again is here already; it keeps its place."""
        loading = self._loading.get(task.session_key)
        if loading is not None and loading.task.step.key == task.step.key:
            task.was_looked_up = True
            loading.task = task
            return True
        return self._batcher.renew(task)

    def _put_aside(self, session_key: bytes) -> None:
        """Steps of a session that a newer one or the end has overtaken; brokers are told."""
        loading = self._loading.pop(session_key, None)
        waiting = [loading.task] if loading is not None else []
        for task in [*self._batcher.drop_session(session_key), *waiting]:
            self._outbox.drop(task)

    def _find_busy(self) -> set[bytes]:
        """Sessions whose stages must stay."""
        return self._batcher.session_keys() | self._loading.keys()

    def _reply(
        self, task: Task, stage: S, body: bytes, started_at: float, *, rows: int, committed: int
    ) -> None:
        """Answer a step that was begun to be computed at `started_at` and is done now."""
        reply = StepReply(
            *task.step.key,
            attempt=task.attempt,
            rows=rows,
            committed=committed,
            worker_id=self._outbox.worker_id,
            queue_us=task.broker_queue_us + round((started_at - task.arrived_at) * 1e6),
            compute_us=task.earlier_us + round((time.monotonic() - started_at) * 1e6),
            precision=tell_precision(task, self.service),
        )
        self.stats["body_bytes_out"] += len(body)
        stage.last_reply = (reply, body) if len(body) <= self.keep_reply_bytes else None
        self._outbox.answer(task, reply, body)
