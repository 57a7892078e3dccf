"""The worker's loop: take steps, hand them to their services, let those compute, answer, commit.

One thread does everything but heartbeats; it polls the brokers' sockets and the store's. A reply
is sent before its state is committed, and a store that does not answer holds nothing up but
takeovers, which then ask the edge for what is missing.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import secrets
import socket as host_info
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cloud_worker.loop.batcher import Task, make_session_key
from cloud_worker.loop.broker_links import BrokerLinks
from cloud_worker.loop.metrics import list_families
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.stage_service import StageService
from cloud_worker.loop.time_shares import TimeShares
from cloud_worker.state.blobs import item_keys
from cloud_worker.state.store import KvStore
from common.console.log_limit import LogLimit
from common.errors import CheckpointError, ProtocolError, StoreUnavailable
from common.metrics.page import MetricsPage
from common.protocol.messages import (
    Alive,
    Announce,
    CancelStep,
    Dispatch,
    DrainAccepted,
    EndSession,
    ImageOpening,
    Joined,
    Message,
    Need,
    NotJoined,
    Opening,
    Step,
    StepDropped,
    StepFailed,
    StepKey,
    StepReply,
)
from common.protocol.wire import check_frames, decode_header, is_of_other_protocol
from common.security.keys import ClientKeys
from common.settings import HEARTBEAT_S

log = logging.getLogger("midspan.worker")

IDLE_POLL_S = 0.1
HELD_BACK_POLL_S = 0.005
DRAIN_LIMIT_S = 10.0
# how long the steps are waited for that were in a batch together before: as long as more come,
QUIET_S, QUIET_PART = 0.001, 0.04  # or this part of a batch's time, whichever is more
GATHER_S, GATHER_PART = 0.0015, 0.25  # and not longer than this, or this part of a batch's time
SAY_AGAIN_S = 30.0  # why a broker does not take this worker
ANSWERS_GO_S = 0.002  # which answers have the cores for, before what nobody waits for is done
TIDY_S = 1.0  # how often commits that failed are tried again


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What the command line decides about a worker, whatever it serves."""

    brokers: Sequence[str]
    capacity: int = 64  # steps that a broker may have in flight here
    heartbeat_s: float = HEARTBEAT_S
    keys: ClientKeys | None = None
    spin_s: float = 0.0  # of waiting without sleeping, after something has come


# sessions that are set up alike open with the same bytes
decode_opening = functools.lru_cache(maxsize=64)(decode_header)


class Worker:
    """Serves parts of models until it is told to drain."""

    def __init__(
        self,
        store: KvStore,
        make_services: Callable[[Outbox], Sequence[StageService[Any]]],
        settings: WorkerSettings,
        worker_id: str = "",
        on_ready: Callable[[str], None] = lambda _: None,
        metrics: MetricsPage | None = None,
    ) -> None:
        """`on_ready` is told the address of each broker that has taken the announcement.

        What it does is published on the page `metrics`.
        """
        self._metrics = metrics
        self.worker_id = worker_id or f"w-{uuid.uuid4().hex[:8]}"
        self._store = store
        self._settings = settings
        self._services = {(s.service.model, s.service.part): s for s in make_services(self)}
        self._shares = TimeShares({s.kind for s in self._services.values()})
        self._pulse = secrets.token_bytes(16)
        self._inbox: deque[tuple[int, list[bytes]]] = deque()  # read, not handled yet
        self._cancelled: set[StepKey] = set()
        self._when_answered: deque[Callable[[], None]] = deque()
        self._held_back = False
        self._answered: set[bytes] = set()  # sessions, in the last batch
        self._answered_before: set[bytes] = set()  # in the one before
        self._batch_s = 0.0  # that the last batch took
        self._drain_requested = False
        self._tidy_at = 0.0
        self._announce_at = 0.0
        self._failed = 0
        self._complaints = LogLimit(log)
        self._bad_messages = 0
        self._links = BrokerLinks(
            settings.brokers, settings.keys, settings.spin_s, Alive(self.worker_id, self._pulse),
            settings.heartbeat_s, on_ready,
        )  # fmt: skip

    @property
    def serving(self) -> str:
        """What is served, for people."""
        services = (service.service for service in self._services.values())
        return ", ".join(f"{service.name} {service.part}" for service in services)

    def _describe(self) -> Announce:
        stats: Counter[str] = Counter(failed=self._failed, bad_messages=self._bad_messages)
        for service in self._services.values():
            stats.update(service.stats)
            stats["warm_bytes"] += service.warm_bytes()
        return Announce(
            worker_id=self.worker_id,
            services=[service.service for service in self._services.values()],
            capacity=self._settings.capacity,
            heartbeat_ms=round(self._settings.heartbeat_s * 1000),
            ready=not self._drain_requested,
            pid=os.getpid(),
            host=host_info.gethostname(),
            stats={
                **stats,
                "store_up": self._store.is_up(),
                "store_id": self._store.identity,
                "store_policy": self._store.eviction_policy,
            },
            pulse=self._pulse,
        )

    def _publish(self, page: MetricsPage) -> None:
        why_not_ready = "" if self._links.has_joined() else "no broker has taken it yet"
        if self._drain_requested:
            why_not_ready = "it is draining"
        events = {"failed": self._failed, "bad_messages": self._bad_messages}
        services = list(self._services.values())
        page.publish(list_families(services, self._store, events), why_not_ready)

    def request_drain(self) -> None:
        """Finish and commit what is here, then make `run` return. For signal handlers."""
        self._drain_requested = True

    def run(self) -> None:
        """Prove to be able to serve, then announce and serve until drained.

        Raises MidspanError if this worker cannot compute, or no longer, when others have taken
        over, or a broker's address is not for workers.
        """
        unfit = ""
        for service in self._services.values():
            self._prove_ready(service)
        self._links.start()
        try:
            while not self._drain_requested:
                self._turn(IDLE_POLL_S)
                if self._links.refusal is not None:
                    raise self._links.refusal
                unfit = self._find_unfit()
                self._drain_requested |= bool(unfit)
            self._drain()
            if unfit:
                raise CheckpointError(unfit)
        finally:
            self._links.close()
            self._store.close()

    def _find_unfit(self) -> str:
        """Of the first service that can compute no step any more, which and why."""
        for service in self._services.values():
            if why := service.why_unfit():
                log.error("%s %s: %s; leaving", service.service.name, service.service.part, why)
                return why
        return ""

    def _prove_ready(self, service: StageService[Any]) -> None:
        """A worker that a broker hears of has computed a step, stored what it left and read that.

        It serves without a store that does not do that, which may be full or paused: sessions are
        then recomputed from their edges. Its announcements say so.
        """
        try:
            service.check_ready(lambda: self._drain_requested)
        except StoreUnavailable as error:
            log.warning("serving without a store: %s", error)

    def _drain(self) -> None:
        """Go on until nothing more can come and all that is here is answered and committed."""
        log.info("draining")
        self._announce_at = 0.0
        give_up_at = time.monotonic() + DRAIN_LIMIT_S
        while time.monotonic() < give_up_at:
            self._turn(0.01)
            is_settled = all(service.is_settled() for service in self._services.values())
            if is_settled and self._links.have_let_go():
                return
        log.warning("gave up draining after %s s", DRAIN_LIMIT_S)

    # --- the loop

    def _turn(self, wait_s: float) -> None:
        now = time.monotonic()
        if now >= self._announce_at:
            self._announce_at = now + self._settings.heartbeat_s
            self._links.announce(self._describe())
        services = self._services.values()
        if any(service.has_batch() for service in services):
            wait_s = HELD_BACK_POLL_S if self._held_back else 0.0
        elif self._when_answered:
            wait_s = ANSWERS_GO_S
        self._links.wait(wait_s, self._store)
        while self._when_answered:
            self._guard(self._when_answered.popleft())
        self._receive()
        for event in self._store.poll():
            for service in services:
                self._guard(service.on_store_event, event)
        self._gather()
        self._run_next()
        if self._metrics is not None and self._metrics.is_due():
            self._publish(self._metrics)
        now = time.monotonic()
        if now >= self._tidy_at:
            self._tidy_at = now + TIDY_S
            for service in services:
                service.tidy()

    def _gather(self) -> None:
        """Steps that were answered together are followed by others that come nearly together.

        They are waited for as long as more come. A batch that begins without some of them costs
        nearly as much as the whole, and those get a batch of their own, this time and the next.
        """
        if max(len(self._answered), len(self._answered_before)) < 2:
            return
        expected = len(self._answered | self._answered_before)
        quiet_ms = math.ceil(1000 * max(QUIET_S, QUIET_PART * self._batch_s))
        until = time.monotonic() + max(GATHER_S, GATHER_PART * self._batch_s)
        while 0 < (ready := self._count_ready()) < expected and time.monotonic() < until:
            self._links.wait_for_steps(quiet_ms)
            self._receive()
            if self._count_ready() <= ready:
                return

    def _count_ready(self) -> int:
        return sum(service.count_ready() for service in self._services.values())

    def _run_next(self) -> None:
        """Compute a batch of each service of the kind of work whose turn it is."""
        ready = [service for service in self._services.values() if service.has_batch()]
        begun_at = time.monotonic()
        kind = self._shares.pick({service.kind for service in ready}, begun_at)
        self._held_back = bool(ready) and kind is None
        if kind is None:
            return
        self._answered_before, self._answered = self._answered, set()
        for service in ready:
            if service.kind == kind:
                self._guard(service.run_batch)
        ended_at = time.monotonic()
        self._batch_s = ended_at - begun_at
        self._shares.charge(kind, self._batch_s, ended_at)

    def _guard(self, work: Callable[..., None], *arguments: object) -> None:
        """Whatever a step or the store brings about, a worker lives on; edges ask again."""
        try:
            work(*arguments)
        except Exception:
            log.exception("a service failed")

    def _receive(self) -> None:
        for source, frames in self._links.read():
            self._inbox.append((source, frames))
        while self._inbox:
            source, frames = self._inbox.popleft()
            try:
                check_frames(frames)
                self._on_message(source, decode_header(frames[0]), frames)
            except ProtocolError as error:
                self._bad_messages += 1
                self._complaints.warning("dropped a message: %s", error)
                if is_of_other_protocol(frames[0]):
                    self._links.on_other_protocol(source, str(error))

    def _on_message(self, source: int, message: Message, frames: list[bytes]) -> None:
        if isinstance(message, Dispatch):
            self._on_dispatch(source, message, frames)
        elif isinstance(message, EndSession):
            for part in message.route:
                self._end(make_session_key(message.session_id, message.owner, part), part)
        elif isinstance(message, CancelStep):
            self._cancelled.discard(message.key)
            for (_, part), service in self._services.items():
                session_key = make_session_key(message.session_id, message.owner, part)
                service.on_cancel(session_key, message.key)
            self._links.send(source, StepDropped(*message.key, message.attempt, self.worker_id))
        elif isinstance(message, DrainAccepted):
            self._links.on_drain_accepted(source)
        elif isinstance(message, Joined):
            self._links.on_joined(source)
        elif isinstance(message, NotJoined):
            self._links.on_not_joined(source, message)
        else:
            raise ProtocolError(f"a broker may not send {message.kind!r}")

    def _end(self, session_key: bytes, part: str) -> None:
        """A session is over at a part of its model, which another worker may have served."""
        services = [s for (_, served), s in self._services.items() if served == part]
        for service in services:
            service.on_end(session_key)
        if not services:  # nor do we know whether it was text or an image
            for key in (session_key, *item_keys(session_key)):
                self._store.begin_delete(key)

    def _on_dispatch(self, source: int, dispatch: Dispatch, frames: list[bytes]) -> None:
        if len(frames) != 4:
            raise ProtocolError(f"dispatch has {len(frames) - 1} further frames; expected 3")
        step = decode_header(frames[1])
        if not isinstance(step, Step):
            raise ProtocolError(f"dispatch carries {step.kind!r}; expected a step")
        try:
            opening = _read_opening(dispatch.hop, frames[3])
        except ProtocolError as error:  # whoever can be answered is
            self._fail(source, step.key, dispatch.attempt, str(error))
            return
        task = Task(
            step, opening, frames[2], dispatch.attempt, source, dispatch.queue_us,
            time.monotonic(), dispatch.owner, dispatch.edge,
            opening.precision or dispatch.precision, dispatch.compute_us, dispatch.hop,
            dispatch.units,
        )  # fmt: skip
        service = self._services.get((opening.model, task.part))
        if service is None:
            self.fail(task, f"step is for {opening.model} {task.part}, not for this worker")
            return
        try:
            service.on_step(task)
        except Exception as error:  # a step must never end a worker
            log.exception("a step could not be taken")
            self.fail(task, f"{type(error).__name__}: {error}")

    # --- the services' outbox

    def answer(self, task: Task, message: StepReply | Need, *bodies: bytes) -> None:
        """Answer a step to the broker that it came from."""
        self._answered.add(task.session_key)
        self._links.expect()
        self._links.send(task.source, message, *bodies)

    def fail(self, task: Task, reason: str) -> None:
        """Say that a step could not be computed here."""
        self._fail(task.source, task.step.key, task.attempt, reason)

    def _fail(self, source: int, key: StepKey, attempt: int, reason: str) -> None:
        self._failed += 1
        self._complaints.warning("step failed: %s", reason)
        self._links.send(source, StepFailed(*key, attempt, self.worker_id, reason[:1000]))

    def drop(self, task: Task) -> None:
        """Say that a step is not computed here: nobody waits for it."""
        self._links.send(task.source, StepDropped(*task.step.key, task.attempt, self.worker_id))

    def when_answered(self, work: Callable[[], None]) -> None:
        """Do something before the next steps are read, but let the answers go first."""
        self._when_answered.append(work)

    def is_cancelled(self, task: Task) -> bool:
        """Whether a broker has cancelled a step since this worker began to compute."""
        for source, frames in self._links.read():
            self._inbox.append((source, frames))
            with contextlib.suppress(ProtocolError):
                message = decode_header(frames[0])
                if isinstance(message, CancelStep):
                    self._cancelled.add(message.key)
        return task.step.key in self._cancelled


def _read_opening(hop: int, frame: bytes) -> Opening | ImageOpening:
    """The opening of a step's session. Raises ProtocolError unless it goes as far as `hop`."""
    opening = decode_opening(frame)
    if not isinstance(opening, Opening | ImageOpening):
        raise ProtocolError(f"dispatch carries {opening.kind!r}; expected an opening")
    if hop >= len(opening.route):
        raise ProtocolError(f"step is at hop {hop}; its route has {len(opening.route)}")
    return opening
