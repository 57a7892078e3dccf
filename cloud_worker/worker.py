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

from cloud_worker.batcher import Batcher, Task, make_session_key
from cloud_worker.executor import Computed, TextExecutor
from cloud_worker.heartbeat import Heartbeat
from cloud_worker.kv_cipher import ROW_OVERHEAD, ForgedRows, KvCipher
from cloud_worker.self_test import check_executor, check_store
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
from common.errors import MidspanError, ProtocolError, SettingsError, StoreUnavailable
from common.keys import ClientKeys, KeyPair
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
from common.sealing import open_sealed
from common.settings import HEARTBEAT_S
from common.sockets import Context, Socket, connect_dealer, has_message, receive_frames
from common.wire import check_frames, decode_header, encode_header

log = logging.getLogger("midspan.worker")

IDLE_POLL_S = 0.1
DRAIN_LIMIT_S = 10.0
KEEP_REPLY_BYTES = 1 << 20
STORE_RETRY_S = 0.5
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
    keys: ClientKeys | None = None
    pool_key: KeyPair | None = None  # opens the keys of sessions whose KV is encrypted at rest


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
        self._announce_at = 0.0
        self._stats = {
            "batches": 0, "steps": 0, "rows": 0, "takeovers": 0, "rows_pulled": 0,
            "bytes_pulled": 0, "rows_asked": 0, "failed": 0, "bad_messages": 0,
        }  # fmt: skip
        self._context: Context = zmq.Context()
        self._sockets = [
            connect_dealer(self._context, broker, settings.keys) for broker in settings.brokers
        ]
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._polled_store_fd: int | None = None
        self._heartbeat = Heartbeat(
            self._context, settings.brokers, self.worker_id, settings.heartbeat_s, settings.keys
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
        """Prove to be able to serve, then announce and serve until drained.

        Raises MidspanError if this worker cannot compute.
        """
        self._prove_ready()
        self._heartbeat.start()
        try:
            while not self._drain_requested:
                self._turn(IDLE_POLL_S)
            self._drain()
        finally:
            self._heartbeat.stop()
            for index in range(len(self._sockets)):
                self._send(index, Leave(self.worker_id))
            self._store.close()
            self._context.destroy(linger=1000)

    def _prove_ready(self) -> None:
        """A worker that a broker hears of has computed a step, stored its KV and read it back.

        A store that does not do that is waited for: it may be full or paused.
        """
        session = check_executor(self._executor, self._service)
        while not self._drain_requested:
            try:
                check_store(
                    self._store, session, self._shape, self._row_bytes,
                    lambda: self._drain_requested,
                )  # fmt: skip
            except StoreUnavailable as error:
                log.warning("not ready: %s; trying again", error)
                time.sleep(STORE_RETRY_S)
            else:
                return

    def _drain(self) -> None:
        """Go on until nothing more can come and all that is here is answered and committed."""
        log.info("draining")
        self._announce_at = 0.0
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
        now = time.monotonic()
        if now >= self._announce_at:
            self._announce_at = now + self._settings.heartbeat_s
            self._announce()
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
            self._evict(set())

    def _announce(self) -> None:
        """Tell all brokers what there is here, over the connections that take the steps."""
        for index in range(len(self._sockets)):
            self._send(index, self._describe())
            if self._drain_requested and index not in self._drain_accepted:
                self._send(index, Drain(self.worker_id))

    def _send(self, index: int, message: Message, *bodies: bytes) -> None:
        """To one broker. What cannot be sent now is dropped: the edge will ask again."""
        try:
            self._sockets[index].send_multipart([encode_header(message), *bodies], zmq.NOBLOCK)
        except zmq.Again:
            log.debug("no broker takes a %s", message.kind)

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
            frames = receive_frames(socket)
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
            task = Task(
                step, opening, frames[2], message.attempt, source, message.queue_us, now,
                message.owner,
            )  # fmt: skip
            self._on_step(task)
        elif isinstance(message, EndSession):
            session_key = make_session_key(message.session_id, message.owner)
            self._loading.pop(session_key, None)
            self._batcher.drop_session(session_key)
            self._warm.drop(session_key)
            self._store.begin_delete(session_key)
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
            cipher = self._open_cipher(task)
        except MidspanError as error:
            self._fail(task, str(error))
            return
        except Exception as error:  # a step must never end a worker
            log.exception("a step could not be checked")
            self._fail(task, f"{type(error).__name__}: {error}")
            return
        session = self._warm.open(task.session_key, step)
        if session.last_reply is not None and session.last_reply[0].key == step.key:
            last, body = session.last_reply
            again = dataclasses.replace(last, attempt=task.attempt)
            self._send(task.source, again, body)
            return
        if not session.adjust_to(step):
            self._fail(task, "the session has a newer generation")
            return
        if session.cipher is None:
            session.cipher = cipher
        self._loading.pop(task.session_key, None)
        self._batcher.drop_session(task.session_key)
        self._prepare(task, session)

    def _prepare(self, task: Task, session: WarmSession) -> None:
        """Make a step ready, or begin to load the rows that it needs."""
        step = task.step
        if session.kv.length == step.position:
            self._batcher.add(task)
        else:
            self._loading[task.session_key] = task
            self._stats["takeovers"] += 1
            self._store.begin_load(
                Load(
                    task.session_key, self._shape_of(session), step.generation, step.fork,
                    session.kv.length, step.position, self._stored_row_bytes(session),
                )
            )  # fmt: skip

    # --- the store's answers

    def _on_store_event(self, event: StoreEvent) -> None:
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
        task = self._loading.get(event.session_key)
        if task is None or session is None or task.step.generation != event.generation:
            return
        plain = self._decrypt(session, event)
        if plain and session.kv.length == event.start:
            session.kv.write_bytes(event.start, plain)
            rows = len(plain) // self._row_bytes
            session.kv.length += rows
            if session.committed == event.start:
                session.committed += rows
            self._stats["rows_pulled"] += rows
            self._stats["bytes_pulled"] += len(event.rows)
        del self._loading[event.session_key]
        step = task.step
        if session.kv.length >= step.position:
            session.cut_back(step.position)
            self._batcher.add(task)
            return
        self._stats["rows_asked"] += step.position - session.kv.length
        need = NeedRows(*step.key, task.attempt, session.kv.length, self.worker_id)
        self._send(task.source, need)

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
        self._evict({session.session_key for _, session in pairs})

    def _evict(self, just_run: set[bytes]) -> None:
        self._warm.evict(just_run | self._batcher.session_keys() | self._loading.keys())

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
        self._send(task.source, reply, computed.body)

    def _fail(self, task: Task, reason: str) -> None:
        self._stats["failed"] += 1
        log.warning("step failed: %s", reason)
        failed = StepFailed(*task.step.key, task.attempt, self.worker_id, reason[:1000])
        self._send(task.source, failed)

    def _commit(self, session: WarmSession) -> None:
        """Begin to commit the next piece that the store does not have, unless one is under way."""
        if not session.is_dirty or session.commit_in_flight or not self._store.is_up():
            return
        start = session.committed
        row_bytes = self._stored_row_bytes(session)
        rows_per_chunk = chunk_rows(row_bytes)
        end = min(session.kv.length, (start // rows_per_chunk + 1) * rows_per_chunk)
        session.commit_in_flight = True
        continues = session.pieces_of_step == session.last_step
        session.pieces_of_step = session.last_step
        rows = session.kv.read_bytes(start, end)
        if session.cipher is not None:
            rows = session.cipher.encrypt(rows, start, self._row_bytes)
        self._store.begin_commit(
            Commit(
                session.session_key, self._shape_of(session), session.generation, session.fork,
                session.last_step, self.worker_id, start, end, continues, rows, row_bytes,
            )
        )  # fmt: skip

    # --- encryption at rest

    def _open_cipher(self, task: Task) -> KvCipher | None:
        sealed = task.opening.sealed_key
        known = self._warm.find(task.session_key)
        if not sealed or (known is not None and known.cipher is not None):
            return None
        if self._settings.pool_key is None:
            raise SettingsError(
                "the session wants its KV encrypted, and this worker has no --pool-key"
            )
        return KvCipher(open_sealed(sealed, self._settings.pool_key), task.session_key)

    def _stored_row_bytes(self, session: WarmSession) -> int:
        return self._row_bytes + (ROW_OVERHEAD if session.cipher is not None else 0)

    def _shape_of(self, session: WarmSession) -> str:
        return f"{self._shape} encrypted" if session.cipher is not None else self._shape

    def _decrypt(self, session: WarmSession, event: Loaded) -> bytes:
        """The rows as they were; nothing if they are not what this session wrote."""
        if session.cipher is None or not event.rows:
            return event.rows
        try:
            return session.cipher.decrypt(event.rows, event.start, self._row_bytes)
        except ForgedRows:
            log.warning("the store holds rows of a session that its key does not open")
            return b""
