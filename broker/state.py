"""What the broker knows and decides: state in, actions out. No sockets, no clock, no torch.

The broker keeps nothing that it could not lose. Workers say everything about themselves in every
heartbeat, edges ask again when they hear nothing, so a broker that was restarted knows all it
needs after one heartbeat. Each step is in one of three places: queued for its service, in flight
at one worker, or answered and forgotten.

A step goes to the worker that is warm for its session (it computed the session's last step), as
long as that worker has room; when it has not, the step waits for it unless another worker is
idle. Without a warm worker the least loaded one with room gets it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from broker.actions import (
    AcceptDrain,
    Action,
    Answer,
    AskOpening,
    Dispatched,
    Forget,
    ForwardEnd,
    Note,
    Refuse,
    TellBusy,
    TellPending,
)
from common.messages import (
    Announce,
    NeedRows,
    Opening,
    Service,
    Step,
    StepFailed,
    StepKey,
    StepReply,
)
from common.settings import HEARTBEAT_S, HEARTBEATS_MISSED, MAX_ATTEMPTS, MAX_QUEUED_STEPS

ServiceKey = tuple[str, tuple[int, int]]  # model fingerprint, span

SESSION_MEMORY_S = 600.0  # how long the warm worker of a silent session is remembered
BUSY_RETRY_MS = 200
SEND_AGAIN_S = 1.0
FRESH_PART = 0.6  # of the time after which a silent worker is dead
MISSED_AT_LEAST = 3  # heartbeats of a worker that announces slower ones than we expect


@dataclass(slots=True)
class Worker:
    """A worker as its last heartbeat described it."""

    announce: Announce
    seen_at: float
    draining: bool = False
    in_flight: set[StepKey] = field(default_factory=set)
    steps_done: int = 0

    @property
    def room(self) -> int:
        if self.draining or not self.announce.ready:
            return 0
        return self.announce.capacity - len(self.in_flight)

    def serves(self, service: ServiceKey) -> bool:
        return any((s.model, s.span) == service for s in self.announce.services)


@dataclass(slots=True)
class StepRecord:
    """A step between its arrival and its answer."""

    step: Step
    service: ServiceKey
    edge_id: bytes
    arrived_at: float
    queued_at: float
    deadline_at: float
    worker_id: str | None = None
    attempts: int = 0
    sent_at: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)  # worker, reason

    def failed_on(self, worker_id: str) -> bool:
        return any(failed == worker_id for failed, _ in self.failures)


@dataclass(slots=True)
class SessionRecord:
    """How a session was opened, where its KV is warm, and its newest step."""

    opening: Opening
    worker_id: str | None
    newest: StepKey
    seen_at: float


class BrokerState:
    """Everything the broker knows. `now` is in monotonic seconds throughout."""

    def __init__(
        self,
        started_at: float = 0.0,
        silence_s: float = HEARTBEAT_S * HEARTBEATS_MISSED,
        max_queued_steps: int = MAX_QUEUED_STEPS,
        max_attempts: int = MAX_ATTEMPTS,
    ) -> None:
        self.started_at = started_at
        self.silence_s = silence_s
        self.max_queued_steps = max_queued_steps
        self.max_attempts = max_attempts
        self.workers: dict[str, Worker] = {}
        self.steps: dict[StepKey, StepRecord] = {}
        self.queues: dict[ServiceKey, deque[StepKey]] = {}
        self.sessions: dict[bytes, SessionRecord] = {}
        self.counters = dict.fromkeys(
            ("steps", "answers", "redispatched", "refused", "busy", "late_answers", "dead_workers"),
            0,
        )

    # --- what arrives from edges

    def on_step(
        self, step: Step, opening: Opening | None, edge_id: bytes, now: float
    ) -> list[Action]:
        """A step arrived, for the first time or again, with its session's opening or without."""
        record = self.steps.get(step.key)
        if record is not None:
            record.edge_id = edge_id
            return [TellPending(edge_id, step.key), *self._send_again(record, now)]
        self.counters["steps"] += 1
        session = self.sessions.get(step.session_id)
        if session is not None and step.key[1:] < session.newest[1:]:
            return [Refuse(edge_id, step.key, "stale", "a newer step of this session has arrived")]
        if opening is None and session is None:
            return [AskOpening(edge_id, step.key)]
        actions = self._abandon_older(step)
        opening = opening or self.sessions[step.session_id].opening
        service = (opening.model, opening.span)
        refusal = self._refuse_at_once(step, service, edge_id, now)
        if refusal is not None:
            return [*actions, refusal]
        warm_worker = session.worker_id if session else None
        self.sessions[step.session_id] = SessionRecord(opening, warm_worker, step.key, now)
        deadline_at = now + step.deadline_ms / 1000
        self.steps[step.key] = StepRecord(step, service, edge_id, now, now, deadline_at)
        self.queues.setdefault(service, deque()).append(step.key)
        return [*actions, *self._dispatch(service, now)]

    def on_end(self, session_id: bytes) -> list[Action]:
        """An edge says that a session is over."""
        session = self.sessions.pop(session_id, None)
        if session is None:
            return []
        actions: list[Action] = []
        record = self.steps.get(session.newest)
        if record is not None:
            actions += self._remove(record)
        target = session.worker_id
        if target is None or target not in self.workers:
            target = next(iter(self.workers), None)
        return [*actions, ForwardEnd(target, session_id)] if target else actions

    # --- what arrives from workers

    def on_announce(self, announce: Announce, now: float) -> list[Action]:
        """A heartbeat: a new worker, or a known one that is alive."""
        worker = self.workers.get(announce.worker_id)
        actions: list[Action] = []
        if worker is None:
            worker = self.workers[announce.worker_id] = Worker(announce, now)
            serving = ", ".join(describe_service(s) for s in announce.services)
            actions.append(Note(f"worker {announce.worker_id} joined, serving {serving}"))
        worker.announce, worker.seen_at = announce, now
        return actions + self._dispatch_for(announce.worker_id, now)

    def on_answer(self, answer: StepReply | NeedRows, now: float) -> list[Action]:
        """A worker answered a step. Answers of any but the latest attempt are dropped."""
        record = self._take_in_flight(answer.key, answer.worker_id, answer.attempt, now)
        if record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_for(answer.worker_id, now)
        self.counters["answers"] += 1
        self.workers[answer.worker_id].steps_done += 1
        session = self.sessions.get(record.step.session_id)
        if session is not None:
            session.worker_id, session.seen_at = answer.worker_id, now
        del self.steps[answer.key]
        actions: list[Action] = [Answer(record.edge_id, answer.key), Forget(answer.key)]
        return actions + self._dispatch_for(answer.worker_id, now)

    def on_failed(self, failed: StepFailed, now: float) -> list[Action]:
        """A worker could not compute a step: another one tries, up to `max_attempts` in all."""
        record = self._take_in_flight(failed.key, failed.worker_id, failed.attempt, now)
        if record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_for(failed.worker_id, now)
        actions = self._requeue_failed(record, failed.worker_id, failed.reason, now)
        actions += self._dispatch(record.service, now)
        return actions + self._dispatch_for(failed.worker_id, now)

    def on_drain(self, worker_id: str, now: float) -> list[Action]:
        """A worker wants to leave: it gets nothing new."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return [AcceptDrain(worker_id)]
        worker.draining = True
        actions: list[Action] = [Note(f"worker {worker_id} is draining"), AcceptDrain(worker_id)]
        return actions + self._dispatch_for(worker_id, now)

    def on_worker_gone(self, worker_id: str, why: str, now: float) -> list[Action]:
        """A worker left or cannot be reached: its steps go to others, and are not to blame."""
        return self._drop_workers({worker_id: why}, now, blame_steps=False)

    def _drop_workers(self, reasons: dict[str, str], now: float, blame_steps: bool) -> list[Action]:
        """Forget workers that are gone, all before any of their steps is handed out again.

        A step whose workers fall silent one after another may be what kills them: that counts as
        an attempt. A worker that leaves or loses its connection says nothing about its steps.
        """
        gone = {name: self.workers.pop(name) for name in reasons if name in self.workers}
        actions: list[Action] = [Note(f"worker {name} {reasons[name]}") for name in gone]
        for session in self.sessions.values():
            if session.worker_id in gone:
                session.worker_id = None
        for name, worker in gone.items():
            for key in worker.in_flight:
                record = self.steps.get(key)
                if record is None or record.worker_id != name:
                    continue
                if blame_steps:
                    actions += self._requeue_failed(record, name, reasons[name], now)
                else:
                    self._requeue_unsent(record, now)
        for worker in gone.values():
            actions += self._dispatch_services(worker.announce.services, now)
        return actions

    def is_current(self, action: Dispatched) -> bool:
        """Whether the step is still that worker's: what was done since may have changed it."""
        record = self.steps.get(action.key)
        return (
            record is not None
            and record.worker_id == action.worker_id
            and record.attempts == action.attempt
        )

    def on_undeliverable(self, action: Dispatched, now: float) -> list[Action]:
        """A step could not be sent: no attempt was made, and the worker is gone."""
        if self.is_current(action):
            self._requeue_unsent(self.steps[action.key], now)
        return self.on_worker_gone(action.worker_id, "is not connected", now)

    # --- time

    def on_tick(self, now: float) -> list[Action]:
        """Time passed: find silent workers, missed deadlines and forgotten sessions."""
        silent = {
            worker_id: f"was silent for {(now - worker.seen_at) * 1000:.0f} ms"
            for worker_id, worker in self.workers.items()
            if now - worker.seen_at >= self._silence_limit_s(worker)
        }
        self.counters["dead_workers"] += len(silent)
        actions = self._drop_workers(silent, now, blame_steps=True)
        for record in [r for r in self.steps.values() if now >= r.deadline_at]:
            actions += self._refuse(record, "deadline", self._why_late(record, now))
        for session_id, session in list(self.sessions.items()):
            if now - session.seen_at > SESSION_MEMORY_S:
                del self.sessions[session_id]
        return actions

    # --- decisions

    def _silence_limit_s(self, worker: Worker) -> float:
        """A worker that beats slowly, as it says, is not taken for dead between two beats."""
        return max(self.silence_s, MISSED_AT_LEAST * worker.announce.heartbeat_ms / 1000)

    def _send_again(self, record: StepRecord, now: float) -> list[Action]:
        """A step in flight for long may have been lost on its way; a worker takes it twice."""
        if record.worker_id is None or now - record.sent_at < SEND_AGAIN_S:
            return []
        record.sent_at = now
        return [Dispatched(record.worker_id, record.step.key, record.attempts, 0)]

    def _refuse_at_once(
        self, step: Step, service: ServiceKey, edge_id: bytes, now: float
    ) -> Action | None:
        settled = now - self.started_at >= self.silence_s
        if settled and not any(w.serves(service) for w in self.workers.values()):
            self.counters["refused"] += 1
            return Refuse(edge_id, step.key, "no_worker", self._why_no_worker(service))
        if len(self.steps) >= self.max_queued_steps:
            self.counters["busy"] += 1
            return TellBusy(edge_id, step.key, BUSY_RETRY_MS)
        return None

    def _why_no_worker(self, service: ServiceKey) -> str:
        model, (first, last) = service
        wanted = f"span {first}-{last} of the model with fingerprint {model}"
        return f"no worker serves {wanted}; {self.describe_serving()}"

    def describe_serving(self) -> str:
        """One line about what the workers serve."""
        services = {s for w in self.workers.values() for s in w.announce.services}
        if not services:
            return "there are no workers at all"
        listed = ", ".join(sorted(describe_service(s) for s in services))
        return f"being served: {listed}"

    def _why_late(self, record: StepRecord, now: float) -> str:
        where = f"in flight on worker {record.worker_id}" if record.worker_id else "still queued"
        failures = "".join(f"; worker {w}: {reason}" for w, reason in record.failures)
        return (
            f"the step's deadline passed after {now - record.arrived_at:.1f} s, {where}{failures}"
        )

    def _abandon_older(self, step: Step) -> list[Action]:
        """The edge has moved on: older steps of its session need no answer."""
        session = self.sessions.get(step.session_id)
        record = self.steps.get(session.newest) if session else None
        return self._remove(record) if record else []

    def _remove(self, record: StepRecord) -> list[Action]:
        del self.steps[record.step.key]
        if record.worker_id is None:
            self.queues[record.service].remove(record.step.key)
        elif record.worker_id in self.workers:
            self.workers[record.worker_id].in_flight.discard(record.step.key)
        return [Forget(record.step.key)]

    def _refuse(self, record: StepRecord, code: str, reason: str) -> list[Action]:
        self.counters["refused"] += 1
        return [*self._remove(record), Refuse(record.edge_id, record.step.key, code, reason)]

    def _take_in_flight(
        self, key: StepKey, worker_id: str, attempt: int, now: float
    ) -> StepRecord | None:
        """The record of a step that this worker was asked for in this attempt, else None."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.seen_at = now  # an answer is a sign of life
        record = self.steps.get(key)
        is_current = (
            record is not None and record.worker_id == worker_id and record.attempts == attempt
        )
        if worker is not None and (record is None or is_current or record.worker_id != worker_id):
            worker.in_flight.discard(key)
        return record if worker is not None and is_current else None

    def _requeue(self, record: StepRecord, now: float) -> None:
        """Take a step back from its worker, to the front of its queue."""
        worker = self.workers.get(record.worker_id or "")
        if worker is not None:
            worker.in_flight.discard(record.step.key)
        record.worker_id = None
        record.queued_at = now
        self.queues[record.service].appendleft(record.step.key)

    def _requeue_unsent(self, record: StepRecord, now: float) -> None:
        """The same, as if it had never been sent: no attempt was made."""
        record.attempts -= 1
        self._requeue(record, now)

    def _requeue_failed(
        self, record: StepRecord, worker_id: str, reason: str, now: float
    ) -> list[Action]:
        """Put a step that a worker failed back into its queue, or refuse it after too many."""
        record.failures.append((worker_id, reason))
        self._requeue(record, now)
        if record.attempts >= self.max_attempts:
            reasons = dict.fromkeys(f"worker {w}: {why}" for w, why in record.failures)
            tried = f"failed {record.attempts} times: {'; '.join(reasons)}"
            return self._refuse(record, "failed", tried)
        self.counters["redispatched"] += 1
        return []

    def _dispatch_for(self, worker_id: str, now: float) -> list[Action]:
        """A worker's room may have changed: look at the queues it serves."""
        worker = self.workers.get(worker_id)
        return self._dispatch_services(worker.announce.services, now) if worker else []

    def _dispatch_services(self, services: list[Service], now: float) -> list[Action]:
        actions: list[Action] = []
        for service in services:
            actions += self._dispatch((service.model, service.span), now)
        return actions

    def _dispatch(self, service: ServiceKey, now: float) -> list[Action]:
        """Hand out what is queued for a service, oldest first, while there is room."""
        queue = self.queues.get(service)
        if not queue:
            return []
        workers = [w for w in self.workers.values() if w.serves(service)]
        actions: list[Action] = []
        for key in list(queue):
            with_room = [w for w in workers if w.room > 0 and self._is_fresh(w, now)]
            if not with_room:
                break
            record = self.steps[key]
            worker = self._pick_worker(record, workers, with_room)
            if worker is None:
                continue
            queue.remove(key)
            record.worker_id = worker.announce.worker_id
            record.attempts += 1
            record.sent_at = now
            worker.in_flight.add(key)
            queue_us = max(0, round((now - record.queued_at) * 1e6))
            actions.append(Dispatched(record.worker_id, key, record.attempts, queue_us))
        return actions

    def _is_fresh(self, worker: Worker, now: float) -> bool:
        """Heard of lately. When a whole pool pauses, a step does not go from silent to silent."""
        return now - worker.seen_at < FRESH_PART * self._silence_limit_s(worker)

    def _pick_worker(
        self, record: StepRecord, workers: list[Worker], with_room: list[Worker]
    ) -> Worker | None:
        session = self.sessions.get(record.step.session_id)
        warm = self.workers.get(session.worker_id) if session and session.worker_id else None
        candidates = with_room
        untried = [w for w in candidates if not record.failed_on(w.announce.worker_id)]
        if untried:
            candidates = untried
        elif any(not record.failed_on(w.announce.worker_id) for w in workers if not w.draining):
            return None  # wait for room at a worker that has not failed it yet
        if warm is not None and not record.failed_on(warm.announce.worker_id):
            if warm in candidates:
                return warm
            if not warm.draining and warm in workers:
                candidates = [w for w in candidates if not w.in_flight]
        return min(candidates, key=lambda w: len(w.in_flight), default=None)


def describe_service(service: Service) -> str:
    """`stories-llama 2-6 (fingerprint 0123456789abcdef)`"""
    first, last = service.span
    return f"{service.name} {first}-{last} (fingerprint {service.model})"
