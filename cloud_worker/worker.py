"""The worker's loop: take steps, make their KV reach their position, compute, answer, commit.

One thread does everything but heartbeats; it polls the brokers' sockets and the store's. A reply
is sent before its KV is committed, and a store that does not answer holds nothing up but
takeovers, which then ask the edge for its rows.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import socket as host_info
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import zmq

from cloud_worker.batcher import Batcher, Task
from cloud_worker.executor import Computed, TextExecutor
from cloud_worker.heartbeat import Heartbeat
from cloud_worker.store import (
    Commit,
    CommitFailed,
    CommitRefused,
    Committed,
    KvStore,
    Load,
    Loaded,
    StoreEvent,
    chunk_rows,
)
from cloud_worker.warm_cache import WarmCache, WarmSession
from common.errors import MidspanError, ProtocolError
from common.messages import (
    Announce,
    Dispatch,
    Drain,
    DrainAccepted,
    EndSession,
    Leave,
    Message,
    NeedRows,
    Opening,
    Service,
    Step,
    StepFailed,
    StepReply,
)
from common.settings import HEARTBEAT_S
from common.sockets import Context, Socket, connect_dealer, has_message
from common.wire import check_frames, decode_header, encode_header

log = logging.getLogger("midspan.worker")

IDLE_POLL_S = 0.1
DRAIN_LIMIT_S = 10.0
KEEP_REPLY_BYTES = 1 << 20
RECOMMIT_S = 1.0  # how often sessions whose commit failed are tried again


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the command line decides about a worker."""

    brokers: Sequence[str]
    max_batch_rows: int = 512
    max_batch_steps: int = 32
    capacity: int = 64  # steps that a broker may have in flight here
    cache_bytes: int = 1 << 30
    heartbeat_s: float = HEARTBEAT_S


# sessions that are set up alike open with the same bytes
decode_opening = functools.lru_cache(maxsize=64)(decode_header)


class Worker:
    """Serves one span of one model until it is told to drain."""

    def __init__(
        self,
        executor: TextExecutor,
        service: Service,
        store: KvStore,
        settings: WorkerSettings,
        worker_id: str = "",
    ) -> None:
        self.worker_id = worker_id or f"w-{uuid.uuid4().hex[:8]}"
        self._executor = executor
        self._service = service
        self._store = store
        self._settings = settings
        layout = executor.model.layout
        self._row_bytes = layout.row_bytes
        first, last = service.span
        self._shape = f"{service.model} {first}-{last} {layout.dtype} {self._row_bytes}"
        self._warm = WarmCache(executor.model.new_kv, settings.cache_bytes)
        self._batcher = Batcher(settings.max_batch_rows, settings.max_batch_steps)
        self._loading: dict[bytes, Task] = {}  # steps that wait for rows from the store
        self._drain_requested = False
        self._drain_accepted: set[int] = set()
        self._recommit_at = 0.0
        self._stats = {
            "batches": 0, "steps": 0, "rows": 0, "takeovers": 0, "rows_pulled": 0, "rows_asked": 0,
            "failed": 0, "bad_messages": 0,
        }  # fmt: skip
        self._context: Context = zmq.Context()
        self._sockets = [
            connect_dealer(
                self._context, broker, identity=self.worker_id.encode(), keep_unsent=True
            )
            for broker in settings.brokers
        ]
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._polled_store_fd: int | None = None
        self._heartbeat = Heartbeat(
            self._context, settings.brokers, self._describe, settings.heartbeat_s
        )

    def _describe(self) -> Announce:
        return Announce(
            worker_id=self.worker_id,
            services=[self._service],
            capacity=self._settings.capacity,
            heartbeat_ms=round(self._settings.heartbeat_s * 1000),
            ready=not self._drain_requested,
            pid=os.getpid(),
            host=host_info.gethostname(),
            stats={
                **self._stats,
                "warm_bytes": self._warm.used_bytes(),
                "store_up": self._store.is_up(),
            },
        )

    def request_drain(self) -> None:
        """Finish and commit what is here, then make `run` return. For signal handlers."""
        self._drain_requested = True

    def run(self) -> None:
        """Serve until drained."""
        for socket in self._sockets:
            socket.send(encode_header(self._describe()))
        self._heartbeat.start()
        try:
            while not self._drain_requested:
                self._turn(IDLE_POLL_S)
            self._drain()
        finally:
            self._heartbeat.stop()
            for socket in self._sockets:
                socket.send(encode_header(Leave(self.worker_id)))
            self._store.close()
            self._context.destroy(linger=1000)

    def _drain(self) -> None:
        """Go on until nothing more can come and all that is here is answered and committed."""
        log.info("draining")
        for socket in self._sockets:
            socket.send(encode_header(Drain(self.worker_id)))
        give_up_at = time.monotonic() + DRAIN_LIMIT_S
        while time.monotonic() < give_up_at:
            self._turn(0.01)
            accepted = len(self._drain_accepted) == len(self._sockets)
            open_steps = len(self._batcher) + len(self._loading)
            uncommitted = self._store.is_up() and any(s.is_dirty for s in self._warm)
            if accepted and not open_steps and not uncommitted:
                return
        log.warning("gave up draining after %s s", DRAIN_LIMIT_S)

    # --- the loop

    def _turn(self, wait_s: float) -> None:
        self._wait(0.0 if len(self._batcher) else wait_s)
        for index, socket in enumerate(self._sockets):
            self._receive(index, socket)
        for event in self._store.poll():
            self._on_store_event(event)
        batch = self._batcher.pick()
        if batch:
            self._run_batch(batch)
        now = time.monotonic()
        if now >= self._recommit_at:
            self._recommit_at = now + RECOMMIT_S
            for session in self._warm:
                self._commit(session)

    def _wait(self, wait_s: float) -> None:
        store_fd = self._store.fileno()
        if store_fd != self._polled_store_fd:  # the store has connected anew
            if self._polled_store_fd is not None:
                self._poller.unregister(self._polled_store_fd)
            if store_fd is not None:
                self._poller.register(store_fd, zmq.POLLIN)
            self._polled_store_fd = store_fd
        self._poller.poll(round(wait_s * 1000))

    def _receive(self, source: int, socket: Socket) -> None:
        while has_message(socket):
            frames = socket.recv_multipart()
            try:
                check_frames(frames)
                self._on_message(source, decode_header(frames[0]), frames)
            except ProtocolError as error:
                self._stats["bad_messages"] += 1
                log.warning("dropped a message: %s", error)

    def _on_message(self, source: int, message: Message, frames: list[bytes]) -> None:
        if isinstance(message, Dispatch):
            if len(frames) != 4:
                raise ProtocolError(f"dispatch has {len(frames) - 1} further frames; expected 3")
            step, opening = decode_header(frames[1]), decode_opening(frames[3])
            if not isinstance(step, Step) or not isinstance(opening, Opening):
                raise ProtocolError(f"dispatch carries {step.kind!r} and {opening.kind!r}")
            now = time.monotonic()
            task = Task(step, opening, frames[2], message.attempt, source, message.queue_us, now)
            self._on_step(task)
        elif isinstance(message, EndSession):
            self._loading.pop(message.session_id, None)
            self._batcher.drop_session(message.session_id)
            self._warm.drop(message.session_id)
            self._store.begin_delete(message.session_id)
        elif isinstance(message, DrainAccepted):
            self._drain_accepted.add(source)
        else:
            raise ProtocolError(f"a broker may not send {message.kind!r}")

    def _on_step(self, task: Task) -> None:
        step, opening = task.step, task.opening
        try:
            if (opening.model, opening.span) != (self._service.model, self._service.span):
                raise ProtocolError(
                    f"step is for {opening.model} {opening.span}, not for this worker"
                )
            self._executor.check(task)
        except MidspanError as error:
            self._fail(task, str(error))
            return
        except Exception as error:  # a step must never end a worker
            log.exception("a step could not be checked")
            self._fail(task, f"{type(error).__name__}: {error}")
            return
        session = self._warm.open(step)
        if session.last_reply is not None and session.last_reply[0].key == step.key:
            last, body = session.last_reply
            again = dataclasses.replace(last, attempt=task.attempt)
            self._sockets[task.source].send_multipart([encode_header(again), body])
            return
        if not session.adjust_to(step):
            self._fail(task, "the session has a newer generation")
            return
        self._loading.pop(step.session_id, None)
        self._batcher.drop_session(step.session_id)
        self._prepare(task, session)

    def _prepare(self, task: Task, session: WarmSession) -> None:
        """Make a step ready, or begin to load the rows that it needs."""
        step = task.step
        if session.kv.length == step.position:
            self._batcher.add(task)
        else:
            self._loading[step.session_id] = task
            self._stats["takeovers"] += 1
            self._store.begin_load(
                Load(
                    step.session_id, self._shape, step.generation, step.fork,
                    session.kv.length, step.position, self._row_bytes,
                )
            )  # fmt: skip

    # --- the store's answers

    def _on_store_event(self, event: StoreEvent) -> None:
        session = self._warm.find(event.session_id)
        if isinstance(event, Loaded):
            self._on_loaded(event, session)
            return
        if session is None:
            return
        session.commit_in_flight = False
        if event.generation != session.generation:
            self._commit(session)
        elif isinstance(event, Committed):
            session.committed = min(event.position, session.kv.length)
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
            session.committed = session.kv.length  # another worker went on; the store has more

    def _on_loaded(self, event: Loaded, session: WarmSession | None) -> None:
        task = self._loading.get(event.session_id)
        if task is None or session is None or task.step.generation != event.generation:
            return
        if event.rows and session.kv.length == event.start:
            session.kv.write_bytes(event.start, event.rows)
            rows = len(event.rows) // self._row_bytes
            session.kv.length += rows
            if session.committed == event.start:
                session.committed += rows
            self._stats["rows_pulled"] += rows
        del self._loading[event.session_id]
        step = task.step
        if session.kv.length >= step.position:
            session.cut_back(step.position)
            self._batcher.add(task)
            return
        self._stats["rows_asked"] += step.position - session.kv.length
        need = NeedRows(*step.key, task.attempt, session.kv.length, self.worker_id)
        self._sockets[task.source].send(encode_header(need))

    # --- computing

    def _run_batch(self, batch: list[Task]) -> None:
        started_at = time.monotonic()
        pairs = []
        for task in batch:
            session = self._warm.open(task.step)
            if session.kv.length == task.step.position:
                pairs.append((task, session))
            else:
                self._prepare(task, session)
        if not pairs:
            return
        results = self._executor.run(pairs)
        done_at = time.monotonic()
        self._stats["batches"] += 1
        for (task, session), computed in zip(pairs, results, strict=True):
            if computed.failure:
                self._fail(task, computed.failure)
                continue
            session.last_step = task.step.step
            self._stats["steps"] += 1
            self._stats["rows"] += task.step.rows
            self._reply(task, computed, session, started_at, done_at)
        for _, session in pairs:
            self._commit(session)
        just_run = {session.session_id for _, session in pairs}
        self._warm.evict(just_run | self._batcher.session_ids() | self._loading.keys())

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
            rows=step.reply_rows,
            committed=session.committed,
            worker_id=self.worker_id,
            queue_us=task.broker_queue_us + round((started_at - task.arrived_at) * 1e6),
            compute_us=round((done_at - started_at) * 1e6),
        )
        keep = len(computed.body) <= KEEP_REPLY_BYTES
        session.last_reply = (reply, computed.body) if keep else None
        self._sockets[task.source].send_multipart([encode_header(reply), computed.body])

    def _fail(self, task: Task, reason: str) -> None:
        self._stats["failed"] += 1
        log.warning("step failed: %s", reason)
        failed = StepFailed(*task.step.key, task.attempt, self.worker_id, reason[:1000])
        self._sockets[task.source].send(encode_header(failed))

    def _commit(self, session: WarmSession) -> None:
        """Begin to commit the next piece that the store does not have, unless one is under way."""
        if not session.is_dirty or session.commit_in_flight or not self._store.is_up():
            return
        start = session.committed
        rows_per_chunk = chunk_rows(self._row_bytes)
        end = min(session.kv.length, (start // rows_per_chunk + 1) * rows_per_chunk)
        session.commit_in_flight = True
        continues = session.pieces_of_step == session.last_step
        session.pieces_of_step = session.last_step
        self._store.begin_commit(
            Commit(
                session.session_id, self._shape, session.generation, session.fork,
                session.last_step, self.worker_id, start, end, continues,
                session.kv.read_bytes(start, end), self._row_bytes,
            )
        )  # fmt: skip
