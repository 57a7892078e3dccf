"""Text sessions on a worker: steps wait for their KV, are computed in batches, and committed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from msgspec import structs

from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.precision import check_precision, tell_precision
from cloud_worker.state.row_seals import Checksum, KvCipher, RowSeal
from cloud_worker.state.session_cache import CacheBudget
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
from cloud_worker.text.executor import Computed, TextExecutor
from cloud_worker.text.self_test import check_executor, check_store
from cloud_worker.text.warm_cache import WarmCache, WarmSession
from common.errors import MidspanError, SettingsError
from common.protocol.messages import Need, Service, StepKey, StepReply
from common.security.keys import KeyPair
from common.security.sealing import open_sealed

log = logging.getLogger("midspan.worker")

KEEP_REPLY_BYTES = 32 << 20
OVER_SHARE_S = 30.0  # until a session is tried again whose edge has its share of the store


class TextService:
    """One span of one language model."""

    kind = "text"

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
        self.service = service
        self.stats = dict.fromkeys(
            (
                "batches", "steps", "rows", "takeovers", "rows_pulled", "bytes_pulled",
                "rows_asked", "rows_refused", "loads_given_up",
                "commits_over_share",
            ),
            0,
        )  # fmt: skip
        self._executor = executor
        self._store = store
        self._outbox = outbox
        self._batcher = batcher
        self._pool_key = pool_key
        layout = executor.model.layout
        self._row_bytes = layout.row_bytes
        self._shape = f"{service.model} {service.part} {layout.dtype} {self._row_bytes}"
        self._budget = budget
        self._pool = executor.model.new_pool(budget.limit_bytes)
        self._warm = WarmCache(lambda: executor.model.new_kv(self._pool), budget, self._find_busy)
        self._loading: dict[bytes, Task] = {}  # steps that wait for rows from the store

    # --- what the worker asks

    def check_ready(self, is_over: Callable[[], bool]) -> None:
        """Compute a step, store its KV and read it back. Raises MidspanError.

        StoreUnavailable if only the store is at fault.
        """
        session = check_executor(self._executor, self.service)
        check_store(self._store, session, self._shape, self._row_bytes, is_over)

    def has_batch(self) -> bool:
        """Whether a step is ready to be computed."""
        return len(self._batcher) > 0

    def is_settled(self) -> bool:
        """Whether all that came is answered and committed."""
        now = time.monotonic()
        uncommitted = self._store.is_up() and any(
            session.is_dirty and session.commit_at <= now for session in self._warm
        )
        return not len(self._batcher) and not self._loading and not uncommitted

    def warm_bytes(self) -> int:
        return self._warm.used_bytes()

    def tidy(self) -> None:
        """Commit what failed to be committed, and forget what is too much."""
        for session in self._warm:
            self._commit(session)
        self._budget.evict()
        if self._pool is not None:  # what is ready for KV counts, too
            others = self._budget.used_bytes() - self._warm.used_bytes()
            self._pool.limit(max(0, self._budget.limit_bytes - others))

    def on_end(self, session_key: bytes) -> None:
        """A session is over. It may be one of another service."""
        self._drop_waiting(session_key)
        self._warm.drop(session_key)
        self._store.begin_delete(session_key)

    def on_cancel(self, session_key: bytes, key: StepKey) -> None:
        waiting = self._loading.get(session_key)
        if waiting is not None and waiting.step.key == key:
            del self._loading[session_key]
        self._batcher.drop_step(session_key, key)

    def _drop_waiting(self, session_key: bytes) -> None:
        """Steps of a session that a newer one or the end has overtaken; brokers are told."""
        loading = self._loading.pop(session_key, None)
        for task in [*self._batcher.drop_session(session_key), *([loading] if loading else [])]:
            self._outbox.drop(task)

    def count_ready(self) -> int:
        return len(self._batcher)

    def run_batch(self) -> None:
        """Compute the next batch, if a step is ready."""
        batch = self._batcher.pick()
        if batch:
            self._run_batch(batch)

    def on_step(self, task: Task) -> None:
        step = task.step
        try:
            check_precision(task, self.service)
            self._executor.check(task)
            seal = self._find_seal(task)
        except MidspanError as error:
            self._outbox.fail(task, str(error))
            return
        session = self._warm.open(task.session_key, step)
        if session.last_reply is not None and session.last_reply[0].key == step.key:
            last, body = session.last_reply
            again = structs.replace(last, attempt=task.attempt)
            self._outbox.answer(task, again, body)
            return
        if self._is_waiting(task):
            return
        session.seal, session.account = seal, task.account
        if not session.adjust_to(step):
            self._outbox.fail(task, "the session has a newer generation")
            return
        self._drop_waiting(task.session_key)
        self._prepare(task, session)

    def _is_waiting(self, task: Task) -> bool:
        """Whether a step that was sent again is here already; it keeps its place."""
        loading = self._loading.get(task.session_key)
        if loading is not None and loading.step.key == task.step.key:
            self._loading[task.session_key] = task
            return True
        return self._batcher.renew(task)

    def _prepare(self, task: Task, session: WarmSession) -> None:
        """Make a step ready, or begin to load the rows that it needs."""
        step = task.step
        if session.kv.length == step.position:
            self._batcher.add(task)
        else:
            self._loading[task.session_key] = task
            self.stats["takeovers"] += 1
            self._store.begin_load(
                Load(
                    task.session_key, self._shape_of(session), step.generation, step.fork,
                    session.kv.length, step.position, self._stored_row_bytes(session),
                    lambda part: self._take_rows(task.session_key, step.generation, part),
                )
            )  # fmt: skip

    # --- the store's answers

    def on_store_event(self, event: StoreEvent) -> None:
        session = self._warm.find(event.session_key)
        if isinstance(event, Loaded):
            self._on_loaded(event, session)
            return
        if session is None:
            return
        session.commit_in_flight = False
        if event.generation != session.generation:
            self._commit(session)
        elif isinstance(event, Committed):
            session.committed = min(event.position, session.final)
            self._commit(session)
        elif isinstance(event, CommitRefused):
            self._on_refused(event, session)
        elif isinstance(event, CommitFailed):
            log.debug("commit failed, will be tried again: %s", event.reason)

    def _on_refused(self, event: CommitRefused, session: WarmSession) -> None:
        if event.code == "gap" and event.position < session.committed:
            log.info("the store lost rows of a session; committing them again")
            session.committed = event.position
            session.pieces_of_step = None
            self._commit(session)
        elif event.code == "stale":
            session.committed = session.final  # another worker went on; the store has more
        elif event.code == "over":
            self.stats["commits_over_share"] += 1
            session.commit_at = time.monotonic() + OVER_SHARE_S
            session.pieces_of_step = None

    def _take_rows(self, session_key: bytes, generation: int, part: Part) -> bool:
        """Put rows of a load into the session that waits for them; whether it wants the next."""
        task, session = self._loading.get(session_key), self._warm.find(session_key)
        if task is None or session is None or task.step.generation != generation:
            return False
        kv, seal, stored_row_bytes = session.kv, session.seal, self._stored_row_bytes(session)
        assert seal is not None
        known = kv.length - part.start  # rows that an earlier load has brought meanwhile
        count = len(part.rows) // stored_row_bytes - known
        if known < 0 or count <= 0:
            return known >= 0
        start, rows = kv.length, part.rows[known * stored_row_bytes :]
        room = task.step.end if part.end >= task.step.position else part.end
        try:
            kv.reserve(room)
            taken = kv.take_rows(
                start, count, lambda into: seal.open_rows(rows, start, part.written_in, into)
            )
        except (MemoryError, RuntimeError) as error:  # what torch raises for a full device
            log.warning("no memory for the rows of a session: %s", error)
            return False
        kv.length += taken
        session.final = kv.length
        holds = seal.outlives_generation or part.written_in == session.generation
        if holds and session.committed == start:
            session.committed += taken
        self.stats["rows_pulled"] += taken
        self.stats["bytes_pulled"] += taken * stored_row_bytes
        if taken < count:
            self.stats["rows_refused"] += 1
            log.warning(
                "row %d in the store is damaged or not this session's; computing from there again",
                kv.length,
            )
        return taken == count

    def _on_loaded(self, event: Loaded, session: WarmSession | None) -> None:
        task = self._loading.get(event.session_key)
        if task is None or session is None or task.step.generation != event.generation:
            return
        self.stats["loads_given_up"] += event.given_up
        del self._loading[event.session_key]
        step = task.step
        if session.kv.length >= step.position:
            session.cut_back(step.position)
            self._batcher.add(task)
            return
        self.stats["rows_asked"] += step.position - session.kv.length
        need = Need(
            *step.key, task.attempt, session.kv.length, [], self._outbox.worker_id,
            tell_precision(task, self.service),
        )  # fmt: skip
        self._outbox.answer(task, need)

    # --- computing

    def _run_batch(self, batch: list[Task]) -> None:
        started_at = time.monotonic()
        pairs = []
        for task in batch:
            session = self._warm.open(task.session_key, task.step)
            if session.kv.length == task.step.position:
                pairs.append((task, session))
            else:
                self._prepare(task, session)
        if not pairs:
            return
        results = self._executor.run(pairs)
        done_at = time.monotonic()
        self.stats["batches"] += 1
        for (task, session), computed in zip(pairs, results, strict=True):
            if computed.failure:
                self._outbox.fail(task, computed.failure)
                continue
            session.last_step = task.step.step
            session.final = task.step.final
            self.stats["steps"] += 1
            self.stats["rows"] += task.step.rows
            self._reply(task, computed, session, started_at, done_at)
        for _, session in pairs:
            self._commit(session)
        self._budget.evict(keep={session.session_key for _, session in pairs})

    def _find_busy(self) -> set[bytes]:
        return self._batcher.session_keys() | self._loading.keys()

    def _reply(
        self,
        task: Task,
        computed: Computed,
        session: WarmSession,
        started_at: float,
        done_at: float,
    ) -> None:
        step = task.step
        reply = StepReply(
            *step.key,
            attempt=task.attempt,
            rows=task.reply_rows,
            committed=session.committed,
            worker_id=self._outbox.worker_id,
            queue_us=task.broker_queue_us + round((started_at - task.arrived_at) * 1e6),
            compute_us=task.earlier_us + round((done_at - started_at) * 1e6),
            precision=tell_precision(task, self.service),
        )
        keep = len(computed.body) <= KEEP_REPLY_BYTES
        session.last_reply = (reply, computed.body) if keep else None
        self._outbox.answer(task, reply, computed.body)

    def _commit(self, session: WarmSession) -> None:
        """Begin to commit the next piece that the store does not have, unless one is under way."""
        if not session.is_dirty or session.commit_in_flight or not self._store.is_up():
            return
        if session.commit_at > time.monotonic() or session.session_key in self._loading:
            return
        start = session.committed
        row_bytes = self._stored_row_bytes(session)
        rows_per_chunk = chunk_rows(row_bytes)
        end = min(session.final, (start // rows_per_chunk + 1) * rows_per_chunk)
        session.commit_in_flight = True
        continues = session.pieces_of_step == session.last_step
        session.pieces_of_step = session.last_step
        rows = session.kv.read_bytes(start, end)
        assert session.seal is not None
        rows = session.seal.seal(rows, start, self._row_bytes, session.generation)
        self._store.begin_commit(
            Commit(
                session.session_key, self._shape_of(session), session.generation, session.fork,
                session.last_step, self._outbox.worker_id, start, end, continues, rows, row_bytes,
                session.account,
            )
        )  # fmt: skip

    # --- what rows look like in the store

    def _find_seal(self, task: Task) -> RowSeal:
        sealed_key = task.opening.sealed_key
        known = self._warm.find(task.session_key)
        if known is not None and known.seal is not None:
            return known.seal
        if not sealed_key:
            return Checksum(task.session_key)
        if self._pool_key is None:
            raise SettingsError(
                "the session wants its KV encrypted, and this worker has no --pool-key"
            )
        return KvCipher(open_sealed(sealed_key, self._pool_key), task.session_key)

    def _stored_row_bytes(self, session: WarmSession) -> int:
        assert session.seal is not None
        return self._row_bytes + session.seal.overhead

    def _shape_of(self, session: WarmSession) -> str:
        assert session.seal is not None
        return f"{self._shape} {session.seal.name}"
