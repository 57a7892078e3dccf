"""What the broker knows and decides: state in, actions out. No sockets, no clock, no torch.

The broker keeps nothing that it could not lose. Workers say everything about themselves in every
heartbeat, edges ask again when they hear nothing, so a broker that was restarted knows all it
needs after one heartbeat. Each step is in one of three places: queued for its service, in flight
at one worker, or answered and forgotten.

A step goes to the worker that is warm for its session (it computed the session's last step), as
long as that worker has room; when it has not, the step waits for it unless another worker is
idle. Without a warm worker the least loaded one with room gets it. A session has one step here at
most, its newest, so that the queue goes round all sessions: a long prompt, which comes in many
steps, holds up the others for one of them at a time.

A peer is known by its connection. A worker's id belongs to whoever announced it as long as that
one is alive; a session belongs to the edge, by its key, that opened it.
"""

from __future__ import annotations

from collections import Counter, deque

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
from broker.records import (
    Peer,
    ServiceKey,
    SessionRecord,
    StepRecord,
    Worker,
    describe_service,
)
from common.messages import (
    Announce,
    AnyOpening,
    AnyStep,
    NeedRows,
    NeedTensors,
    Service,
    StepFailed,
    StepKey,
    StepReply,
)
from common.settings import (
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    MAX_ATTEMPTS,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
)

SESSION_MEMORY_S = 600.0  # how long the warm worker of a silent session is remembered
BUSY_RETRY_MS = 200
SEND_AGAIN_S = 1.0
FRESH_PART = 0.6  # of the time after which a silent worker is dead
SILENCE_AT_MOST_S = 30.0
MAX_WORKERS = 4096
MISSED_AT_LEAST = 3  # heartbeats of a worker that announces slower ones than we expect


COUNTERS = (
    "steps", "answers", "redispatched", "refused", "busy", "late_answers", "dead_workers",
    "foreign_sessions", "forged_workers",
)  # fmt: skip


class BrokerState:
    """Everything the broker knows. `now` is in monotonic seconds throughout."""

    def __init__(
        self,
        started_at: float = 0.0,
        silence_s: float = HEARTBEAT_S * HEARTBEATS_MISSED,
        max_queued_steps: int = MAX_QUEUED_STEPS,
        max_attempts: int = MAX_ATTEMPTS,
        max_queued_bytes: int = MAX_QUEUED_BYTES,
        max_sessions_per_edge: int = MAX_SESSIONS_PER_EDGE,
    ) -> None:
        self.started_at = started_at
        self.silence_s = silence_s
        self.max_queued_steps = max_queued_steps
        self.max_attempts = max_attempts
        self.max_queued_bytes = max_queued_bytes
        self.max_sessions_per_edge = max_sessions_per_edge
        self.workers: dict[str, Worker] = {}
        self.steps: dict[StepKey, StepRecord] = {}
        self.queues: dict[ServiceKey, deque[StepKey]] = {}
        self.sessions: dict[bytes, SessionRecord] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self._queued_bytes = 0
        self._sessions_of: Counter[bytes] = Counter()

    # --- what arrives from edges

    def on_step(
        self, step: AnyStep, opening: AnyOpening | None, edge: Peer, body_bytes: int, now: float
    ) -> list[Action]:
        """A step arrived, for the first time or again, with its session's opening or without."""
        session = self.sessions.get(step.session_id)
        if session is not None and session.edge.key != edge.key:
            why = "the session belongs to another edge"
            return [Refuse(edge.address, step.key, "invalid", why), self._note_foreign(edge)]
        record = self.steps.get(step.key)
        if record is not None:
            record.edge = edge
            if session is not None:
                session.seen_at = now
            return [TellPending(edge.address, step.key), *self._send_again(record, now)]
        self.counters["steps"] += 1
        if session is not None and step.key[1:] < session.newest[1:]:
            why = "a newer step of this session has arrived"
            return [Refuse(edge.address, step.key, "stale", why)]
        if opening is None:
            if session is None:
                return [AskOpening(edge.address, step.key)]
            opening = session.opening
        actions = self._abandon_older(step)
        service = (opening.model, opening.part)
        refusal = self._refuse_at_once(step, service, edge, body_bytes, now)
        if refusal is not None:
            return [*actions, refusal]
        warm_worker = None
        if session is not None:
            warm_worker = session.worker_id if session.worker_id != step.shun else None
            self._forget_session(step.session_id)
        self.sessions[step.session_id] = SessionRecord(opening, edge, warm_worker, step.key, now)
        self._sessions_of[edge.account] += 1
        deadline_at = now + step.deadline_ms / 1000
        record = StepRecord(step, service, edge, body_bytes, now, now, deadline_at)
        if step.shun:
            record.failures.append((step.shun, "its answer could not be used"))
        self.steps[step.key] = record
        self._queued_bytes += body_bytes
        self.queues.setdefault(service, deque()).append(step.key)
        return [*actions, *self._dispatch(service, now)]

    def on_end(self, session_id: bytes, edge: Peer) -> list[Action]:
        """An edge says that a session is over."""
        session = self.sessions.get(session_id)
        if session is None:
            return []
        if session.edge.key != edge.key:
            return [self._note_foreign(edge)]
        self._forget_session(session_id)
        actions: list[Action] = []
        record = self.steps.get(session.newest)
        if record is not None:
            actions += self._remove(record)
        target = session.worker_id
        if target is None or target not in self.workers:
            target = next(iter(self.workers), None)
        return [*actions, ForwardEnd(target, session_id, edge.key)] if target else actions

    def _forget_session(self, session_id: bytes) -> None:
        account = self.sessions.pop(session_id).edge.account
        self._sessions_of[account] -= 1
        if not self._sessions_of[account]:
            del self._sessions_of[account]

    def _note_foreign(self, edge: Peer) -> Note:
        self.counters["foreign_sessions"] += 1
        return Note(f"edge {edge.key} named a session of another edge: refused", is_warning=True)

    # --- what arrives from workers

    def on_announce(self, announce: Announce, peer: Peer, now: float) -> list[Action]:
        """A worker describes itself: a new one, a known one, or one that has connected anew."""
        name = announce.worker_id
        worker = self.workers.get(name)
        actions: list[Action] = []
        if worker is None and len(self.workers) >= MAX_WORKERS:
            return [Note(f"worker {name} is one too many: {MAX_WORKERS} are known")]
        if worker is None:
            worker = self.workers[name] = Worker(announce, peer, now)
            serving = ", ".join(describe_service(s) for s in announce.services)
            actions.append(Note(f"worker {name} joined, serving {serving}"))
        elif worker.claim != (peer.key, announce.host, announce.pid):
            return [self._note_forged(name, peer)]
        worker.announce, worker.peer, worker.seen_at = announce, peer, now
        return actions + self._dispatch_for(name, now)

    def on_alive(self, worker_id: str, peer: Peer, now: float) -> list[Action]:
        """A heartbeat, over a connection of its own."""
        worker = self.workers.get(worker_id)
        if worker is None:
            return []
        if worker.peer.key != peer.key:
            return [self._note_forged(worker_id, peer)]
        worker.seen_at = now
        return []

    def check_sender(self, worker_id: str, peer: Peer) -> Note | None:
        """None if a message comes from the worker that it names, or if nobody has that name."""
        worker = self.workers.get(worker_id)
        if worker is None or worker.peer.address == peer.address:
            return None
        return self._note_forged(worker_id, peer)

    def _note_forged(self, worker_id: str, peer: Peer) -> Note:
        self.counters["forged_workers"] += 1
        who = f"the worker with key {peer.key}" if peer.key else "another connection"
        return Note(f"{who} claims to be worker {worker_id}, which it is not", is_warning=True)

    def on_disconnected(self, connection: int, now: float) -> list[Action]:
        """A connection of the workers' side ended: whoever was behind it is gone."""
        gone = {
            name: "lost its connection"
            for name, worker in self.workers.items()
            if worker.peer.connection == connection
        }
        self.counters["dead_workers"] += len(gone)
        return self._drop_workers(gone, now, blame_steps=True)

    def on_answer(self, answer: StepReply | NeedRows | NeedTensors, now: float) -> list[Action]:
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
        self._drop_record(record)
        actions: list[Action] = [Answer(record.edge.address, answer.key), Forget(answer.key)]
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

    def on_drain(self, worker_id: str, peer: Peer, now: float) -> list[Action]:
        """A worker wants to leave: it gets nothing new."""
        worker = self.workers.get(worker_id)
        accepted: list[Action] = [AcceptDrain(peer.address)]
        if worker is None or worker.draining:
            return accepted
        worker.draining = True
        rerouted = self._dispatch_for(worker_id, now)
        return [Note(f"worker {worker_id} is draining"), *accepted, *rerouted]

    def on_worker_gone(self, worker_id: str, why: str, now: float) -> list[Action]:
        """A worker left or cannot be reached: its steps go to others, and are not to blame."""
        return self._drop_workers({worker_id: why}, now, blame_steps=False)

    def _drop_workers(self, reasons: dict[str, str], now: float, blame_steps: bool) -> list[Action]:
        """Forget workers that are gone, all before any of their steps is handed out again.

        A step whose workers fall silent or die one after another may be what kills them: that
        counts as an attempt. A worker that leaves says nothing about its steps.
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
            if now - session.seen_at > SESSION_MEMORY_S and session.newest not in self.steps:
                self._forget_session(session_id)
        return actions

    # --- decisions

    def _silence_limit_s(self, worker: Worker) -> float:
        """A worker that beats slowly, as it says, is not taken for dead between two beats."""
        wanted_s = MISSED_AT_LEAST * worker.announce.heartbeat_ms / 1000
        return max(self.silence_s, min(wanted_s, SILENCE_AT_MOST_S))

    def _send_again(self, record: StepRecord, now: float) -> list[Action]:
        """A step in flight for long may have been lost on its way; a worker takes it twice."""
        if record.worker_id is None or now - record.sent_at < SEND_AGAIN_S:
            return []
        record.sent_at = now
        return [Dispatched(record.worker_id, record.step.key, record.attempts, 0)]

    def _refuse_at_once(
        self, step: AnyStep, service: ServiceKey, edge: Peer, body_bytes: int, now: float
    ) -> Action | None:
        settled = now - self.started_at >= self.silence_s
        if settled and not any(w.serves(service) for w in self.workers.values()):
            self.counters["refused"] += 1
            return Refuse(edge.address, step.key, "no_worker", self._why_no_worker(service))
        is_new = step.session_id not in self.sessions
        if is_new and self._sessions_of[edge.account] >= self.max_sessions_per_edge:
            self.counters["refused"] += 1
            why = f"this edge has {self.max_sessions_per_edge} sessions open; end some first"
            return Refuse(edge.address, step.key, "invalid", why)
        too_large = self.steps and self._queued_bytes + body_bytes > self.max_queued_bytes
        if len(self.steps) >= self.max_queued_steps or too_large:
            self.counters["busy"] += 1
            return TellBusy(edge.address, step.key, BUSY_RETRY_MS)
        return None

    def _why_no_worker(self, service: ServiceKey) -> str:
        model, part = service
        wanted = f"{part} of the model with fingerprint {model}"
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

    def _abandon_older(self, step: AnyStep) -> list[Action]:
        """The edge has moved on: older steps of its session need no answer."""
        session = self.sessions.get(step.session_id)
        record = self.steps.get(session.newest) if session else None
        return self._remove(record) if record else []

    def _remove(self, record: StepRecord) -> list[Action]:
        self._drop_record(record)
        if record.worker_id is None:
            self.queues[record.service].remove(record.step.key)
        elif record.worker_id in self.workers:
            self.workers[record.worker_id].in_flight.discard(record.step.key)
        return [Forget(record.step.key)]

    def _refuse(self, record: StepRecord, code: str, reason: str) -> list[Action]:
        self.counters["refused"] += 1
        return [*self._remove(record), Refuse(record.edge.address, record.step.key, code, reason)]

    def _drop_record(self, record: StepRecord) -> None:
        del self.steps[record.step.key]
        self._queued_bytes -= record.body_bytes

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
            actions += self._dispatch((service.model, service.part), now)
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
