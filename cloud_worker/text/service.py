"""Text sessions on a worker: a stage is KV rows, committed behind the reply.

And a state, where layers keep one of the whole text. It is saved now and then, for it has the same
size after any number of tokens: a worker that takes over goes on from the last one that was, and
has the rows after it computed again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.stage_service import ROWS, StageService
from cloud_worker.state.blobs import LARGEST, STATE, item_key
from cloud_worker.state.row_seals import RowSeal
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.state.store import (
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    KvStore,
    Load,
    Loaded,
    Part,
    StoreEvent,
    chunk_rows,
)
from cloud_worker.text.executor import TextExecutor
from cloud_worker.text.self_test import compute_test_rows
from cloud_worker.text.stage import TextStage
from common.errors import ProtocolError
from common.protocol.messages import Service
from common.security.keys import KeyPair

log = logging.getLogger("midspan.worker")

LEAST_ROWS_PER_STATE = 32  # between two states in the store
STATE_BYTES_PER_ROW = 128 << 10  # and at least so many that states take no more than this for each
OVER_SHARE_S = 30.0  # until a session is tried again whose edge has its share of the store


class TextService(StageService[TextStage]):
    """One span of one language model."""

    kind = "text"
    counters = (
        "batches", "steps", "rows", "takeovers", "rows_pulled", "bytes_pulled", "rows_asked",
        "rows_refused",
    )  # fmt: skip
    keep_reply_bytes = 32 << 20

    def __init__(
        self,
        executor: TextExecutor,
        service: Service,
        store: KvStore,
        outbox: Outbox,
        *,
        batcher: Batcher,
        budget: CacheBudget,
        pool_key: KeyPair | None,
    ) -> None:
        super().__init__(service, store, outbox, batcher=batcher, budget=budget, pool_key=pool_key)
        self._executor = executor
        layout = executor.model.layout
        self._row_bytes = layout.row_bytes
        self._shape = f"{service.model} {service.part} {layout.dtype} {self._row_bytes}"
        self._pool = executor.model.new_pool(budget.limit_bytes)
        state_bytes = executor.model.states_layout.state_bytes
        self._rows_per_state = max(LEAST_ROWS_PER_STATE, state_bytes // STATE_BYTES_PER_ROW)
        self._saves_states = executor.model.keeps_states and state_bytes < LARGEST

    # --- what the worker asks

    def why_unfit(self) -> str:
        stream = self._executor.model.stream
        return "" if stream is None else stream.failure

    def is_settled(self) -> bool:
        now = time.monotonic()
        uncommitted = self._store.is_up() and any(
            stage.is_dirty and stage.commit_at <= now for stage in self._stages
        )
        return super().is_settled() and not uncommitted

    def count_uncommitted(self) -> int:
        return sum(stage.final - stage.committed for stage in self._stages if stage.is_dirty)

    def tidy(self) -> None:
        """Commit what failed to be committed, and forget what is too much."""
        for stage in self._stages:
            self._commit(stage)
        super().tidy()
        if self._pool is not None:  # what is ready for KV counts, too
            others = self._budget.used_bytes() - self._stages.used_bytes()
            self._pool.limit(max(0, self._budget.limit_bytes - others))

    def on_store_event(self, event: StoreEvent) -> None:
        super().on_store_event(event)
        stage = self._stages.find(event.session_key)
        if stage is None:
            return
        if isinstance(event, Loaded):
            self._on_loaded(event)
            return
        stage.commit_in_flight = False
        if event.generation != stage.generation:
            self._commit(stage)
        elif isinstance(event, Committed):
            stage.committed = min(event.position, stage.final)
            self._commit(stage)
        elif isinstance(event, CommitRefused):
            self._on_refused(event, stage)
        elif isinstance(event, CommitFailed):
            log.debug("commit failed, will be tried again: %s", event.reason)

    # --- a step and its rows

    def _compute_test_step(self) -> bytes:
        return compute_test_rows(self._executor, self.service)

    def _check(self, task: Task) -> None:
        self._executor.check(task)

    def _new_stage(self, task: Task, seal: RowSeal) -> TextStage:
        kv = self._executor.model.new_kv(self._pool)
        return TextStage(task.session_key, seal, kv, task.step.generation, task.step.fork)

    def _take(self, task: Task, stage: TextStage) -> None:
        if not stage.adjust_to(task.step):
            raise ProtocolError("the session has a newer generation")

    def _lacking(self, task: Task, stage: TextStage) -> list[str]:
        return [] if stage.kv.goes_on_at(task.step.position) else [ROWS]

    def _rows_in(self, stage: TextStage) -> int:
        return stage.kv.length

    def _forget_stored(self, session_key: bytes) -> None:
        self._store.begin_delete(session_key)
        if self._saves_states:
            self._blobs.forget(item_key(session_key, STATE))

    def _load(self, task: Task, stage: TextStage, item: str) -> None:
        self.stats["takeovers"] += 1
        if stage.kv.states is None:
            self._load_rows(task, stage, task.step.position)
            return
        key, generation = stage.key, task.step.generation
        self._blobs.load(
            item_key(key, STATE), generation, stage.seal,
            lambda blob: self._on_state_read(key, generation, blob),
        )  # fmt: skip

    def _load_rows(self, task: Task, stage: TextStage, end: int) -> None:
        step = task.step
        self._store.begin_load(
            Load(
                stage.key, self._shape_of(stage), step.generation, step.fork, stage.kv.length,
                end, self._stored_row_bytes(stage),
                lambda part: self._take_rows(stage.key, step.generation, part),
            )
        )  # fmt: skip

    def _on_state_read(self, session_key: bytes, generation: int, blob: bytes) -> None:
        """Go on from a state of the store, if it is newer than ours; its rows are read next."""
        loading, stage = self._loading.get(session_key), self._stages.find(session_key)
        if loading is None or stage is None or stage.generation != generation:
            return
        kv, states = stage.kv, stage.kv.states
        assert states is not None
        state = states.unpack(blob)
        if state is None or not kv.length < state.position <= loading.task.step.position:
            self._count_lacking(loading.task, stage)
            self._on_item_read(session_key, ROWS)
            return
        states.adopt(state)
        stage.saved, stage.save_from = state.position, state.position + self._rows_per_state
        if self._row_bytes:
            self._load_rows(loading.task, stage, state.position)
            return
        kv.reserve(state.position)  # rows without bytes
        kv.length = stage.final = state.position
        self._count_lacking(loading.task, stage)
        self._on_item_read(session_key, ROWS)

    def _count_lacking(self, task: Task, stage: TextStage) -> None:
        """What the store did not have the edge is asked for."""
        self.stats["rows_asked"] += task.step.position - stage.kv.length

    def _take_rows(self, session_key: bytes, generation: int, part: Part) -> bool:
        """Put rows of a load into the stage that waits for them; whether it wants the next."""
        loading, stage = self._loading.get(session_key), self._stages.find(session_key)
        if loading is None or stage is None or loading.task.step.generation != generation:
            return False
        kv, seal, stored_row_bytes = stage.kv, stage.seal, self._stored_row_bytes(stage)
        known = kv.length - part.start  # rows that an earlier load has brought meanwhile
        count = len(part.rows) // stored_row_bytes - known
        if known < 0 or count <= 0:
            return known >= 0
        start, rows = kv.length, part.rows[known * stored_row_bytes :]
        step = loading.task.step
        try:
            kv.reserve(step.end if part.end >= step.position else part.end)
            taken = kv.take_rows(
                start, count, lambda into: seal.open_rows(rows, start, part.written_in, into)
            )
        except (MemoryError, RuntimeError) as error:  # what torch raises for a full device
            log.warning("no memory for the rows of a session: %s", error)
            return False
        kv.length += taken
        stage.final = kv.length
        holds = seal.outlives_generation or part.written_in == stage.generation
        if holds and stage.committed == start:
            stage.committed += taken
        self.stats["rows_pulled"] += taken
        self.stats["bytes_pulled"] += taken * stored_row_bytes
        if taken < count:
            self.stats["rows_refused"] += 1
            log.warning(
                "row %d in the store is damaged or not this session's; computing from there again",
                kv.length,
            )
        return taken == count

    def _on_loaded(self, event: Loaded) -> None:
        loading, stage = self._loading.get(event.session_key), self._stages.find(event.session_key)
        if loading is None or stage is None:
            return
        step = loading.task.step
        if step.generation != event.generation:
            return
        self.stats["loads_given_up"] += event.given_up
        stage.cut_back(step.position)
        self._count_lacking(loading.task, stage)
        self._on_item_read(event.session_key, ROWS)

    # --- computing

    def _compute(self, pairs: Sequence[tuple[Task, TextStage]], started_at: float) -> None:
        # those that are not exact share a pass
        pairs = sorted(pairs, key=lambda pair: pair[0].text_opening.exact)
        results = self._executor.run(pairs)
        self.stats["batches"] += 1
        for (task, stage), body in zip(pairs, results, strict=True):
            if isinstance(body, str):
                self._outbox.fail(task, body)
                continue
            stage.last_step = task.step.step
            stage.final = task.step.final
            self.stats["steps"] += 1
            self.stats["rows"] += task.step.rows
            self._reply(
                task, stage, body, started_at,
                rows=task.reply_rows, committed=stage.stored,
            )  # fmt: skip
        self._outbox.when_answered(lambda: self._commit_all([stage for _, stage in pairs]))
        self._budget.evict(keep={stage.key for _, stage in pairs})

    # --- committing

    def _commit_all(self, stages: Sequence[TextStage]) -> None:
        for stage in stages:
            if self._stages.find(stage.key) is stage:  # it may have been evicted
                self._save_state(stage)
                self._commit(stage)

    def _save_state(self, stage: TextStage) -> None:
        """Begin to save the last final state, if it is worth it by now."""
        states, key = stage.kv.states, item_key(stage.key, STATE)
        if states is None or not self._saves_states or not self._store.is_up():
            return
        state = states.newest(stage.final)
        if state.position < stage.save_from or self._blobs.is_saving(key):
            return
        generation = stage.generation

        def note() -> None:
            if stage.generation == generation:
                stage.saved = state.position

        stage.save_from = state.position + self._rows_per_state
        self._blobs.save(
            key, generation, stage.last_step, states.pack(state), stage.seal, stage.account, note
        )

    def _commit(self, stage: TextStage) -> None:
        """Begin to commit the next piece that the store does not have, unless one is under way."""
        if not stage.is_dirty or stage.commit_in_flight or not self._store.is_up():
            return
        if stage.commit_at > time.monotonic() or stage.key in self._loading:
            return
        start = stage.committed
        row_bytes = self._stored_row_bytes(stage)
        rows_per_chunk = chunk_rows(row_bytes)
        end = min(stage.final, (start // rows_per_chunk + 1) * rows_per_chunk)
        stage.commit_in_flight = True
        continues = stage.pieces_of_step == stage.last_step
        stage.pieces_of_step = stage.last_step
        rows = stage.kv.read_bytes(start, end)
        rows = stage.seal.seal(rows, start, self._row_bytes, stage.generation)
        self._store.begin_commit(
            Commit(
                stage.key, self._shape_of(stage), stage.generation, stage.fork, stage.last_step,
                self._outbox.worker_id, start, end, continues, rows, row_bytes, stage.account,
            )
        )  # fmt: skip

    def _on_refused(self, event: CommitRefused, stage: TextStage) -> None:
        if event.code == "gap" and event.position < stage.committed:
            log.info("the store lost rows of a session; committing them again")
            stage.committed = event.position
            stage.pieces_of_step = None
            self._commit(stage)
        elif event.code == "stale":
            stage.committed = stage.final  # another worker went on; the store has more
        elif event.code == "over":
            self.stats["commits_over_share"] += 1
            stage.commit_at = time.monotonic() + OVER_SHARE_S
            stage.pieces_of_step = None

    def _stored_row_bytes(self, stage: TextStage) -> int:
        return self._row_bytes + stage.seal.overhead

    def _shape_of(self, stage: TextStage) -> str:
        return f"{self._shape} {stage.seal.name}"
