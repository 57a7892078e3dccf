"""What the broker knows and decides: state in, actions out. No sockets, no clock, no torch.

The broker keeps nothing that it could not lose. Workers say everything about themselves in every
heartbeat, edges ask again when they hear nothing, so a broker that was restarted knows all it
needs after one heartbeat. Each step is in one of three places: queued for its service, in flight
at one worker, or answered and forgotten.

A step goes to the worker that is warm for its session (it computed the session's last step), as
long as that worker has room; when it has not, the step waits for it unless another worker is
idle. Without a warm worker the least loaded one with room gets it. A session has one step here at
most, its newest, so that the queue goes round all sessions: a long prompt, which comes in many
steps, holds up the others for one of them at a time. Edges are taken in turn, and while several
have sessions none fills more than half of a worker.

A worker counts as busy with a step until it answers or confirms to have dropped it, also when
nobody waits for the step any more. A step that takes much longer than its service usually does
(three times, and 2 s at least) goes to an idle worker as well; whoever answers first is believed,
and meanwhile the late worker gets nothing new if another can take it.

A session stays with workers of the precision that has answered it first.

A peer is known by its connection. A worker's id belongs to whoever announced it as long as that
one is alive; a session belongs to the edge, by its key, that opened it.
"""

from __future__ import annotations

from broker.actions import (
    AcceptDrain,
    Action,
    Answer,
    AskOpening,
    AskStep,
    Cancel,
    Dispatched,
    Forget,
    ForwardEnd,
    Note,
    Refuse,
    TellBusy,
    TellJoined,
    TellNotJoined,
    TellPending,
)
from broker.fair_queue import FairQueue
from broker.ledger import Ledger, Limits
from broker.records import (
    SEND_AGAIN_S,
    Flight,
    Peer,
    ServiceKey,
    SessionRecord,
    StepRecord,
    Worker,
    describe_service,
    service_key,
)
from common.messages import (
    Alive,
    Announce,
    AnyOpening,
    AnyStep,
    AskAgain,
    NeedRows,
    NeedTensors,
    Opening,
    Service,
    Step,
    StepDropped,
    StepFailed,
    StepKey,
    StepReply,
)
from common.settings import (
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    MAX_ATTEMPTS,
    MAX_DEADLINE_S,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
    MAX_STEP_ROWS,
)

SESSION_MEMORY_S = 600.0  # how long the warm worker of a silent session is remembered
BUSY_RETRY_MS = 200
HAND_OVER_S, HAND_OVER_TIMES = 2.0, 3.0  # of what the service's steps usually take
SETTLE_S = 1.0  # between the second worker that died with a step and the third that gets it
EDGE_RETURN_S = 5.0  # how long the steps of an edge that has gone are kept for its return
WORKER_RETURN_S = 30.0  # how long steps wait for a service whose last worker has gone
START_S = 3.0  # a broker that has just started does not know its workers yet
FRESH_PART = 0.6  # of the time after which a silent worker is dead
SILENCE_AT_MOST_S = 30.0
MAX_WORKERS = 4096
MISSED_AT_LEAST = 3  # heartbeats of a worker that announces slower ones than we expect


COUNTERS = (
    "steps", "answers", "redispatched", "refused", "busy", "late_answers", "dead_workers",
    "foreign_sessions", "forged_workers", "handed_over", "cancelled",
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
        self.max_attempts = max_attempts
        self._ledger = Ledger(Limits(max_queued_steps, max_queued_bytes, max_sessions_per_edge))
        self.workers: dict[str, Worker] = {}
        self.steps: dict[StepKey, StepRecord] = {}
        self.queues: dict[ServiceKey, FairQueue] = {}
        self.sessions: dict[bytes, SessionRecord] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.is_full = False  # the process has all the memory that it may have
        self._usual_s: dict[ServiceKey, float] = {}  # of a step at a worker, lately
        self._gone_at: dict[ServiceKey, float] = {}  # when its last worker went

    # --- what arrives from edges

    def on_step(
        self,
        step: AnyStep,
        opening: AnyOpening | None,
        edge: Peer,
        body_bytes: int,
        now: float,
        opening_frame: bytes = b"",
    ) -> list[Action]:
        """A step arrived, for the first time or again, with its session's opening or without.

        `opening_frame` is the opening as it came, to be passed on.
        """
        session = self.sessions.get(step.session_id)
        if session is not None and session.edge.key != edge.key:
            why = "the session belongs to another edge"
            return [Refuse(edge.address, step.key, "invalid", why), self._note_foreign(edge)]
        record = self.steps.get(step.key)
        if record is not None:
            return self._hear_again(record, edge, now)
        self.counters["steps"] += 1
        if session is not None and step.key[1:] < session.newest[1:]:
            why = "a newer step of this session has arrived"
            return [Refuse(edge.address, step.key, "stale", why)]
        if opening is None:
            if session is None:
                return [AskOpening(edge.address, step.key)]
            opening, opening_frame = session.opening, session.opening_frame
        why = _why_wrong(step, opening)
        if why:
            self.counters["refused"] += 1
            return [Refuse(edge.address, step.key, "invalid", why)]
        actions = self._abandon_older(step)
        precision = opening.precision or (session.precision if session is not None else "")
        service = self._choose_service(opening, precision)
        refusal = self._refuse_at_once(step, service, edge, body_bytes, now)
        if refusal is not None:
            return [*actions, refusal]
        warm_worker = None
        if session is not None:
            warm_worker = session.worker_id if session.worker_id != step.shun else None
            self._forget_session(step.session_id)
        self.sessions[step.session_id] = SessionRecord(
            opening, edge, warm_worker, step.key, now, opening_frame, precision
        )
        self._ledger.add_session(edge.account)
        deadline_at = now + min(step.deadline_ms / 1000, MAX_DEADLINE_S)
        record = StepRecord(step, service, edge, edge.account, body_bytes, now, now, deadline_at)
        if step.shun:
            record.failures.append((step.shun, "its answer could not be used"))
        self.steps[step.key] = record
        self._ledger.add_step(record.account, body_bytes)
        self._queue_of(service).add(record.account, step.key)
        return [*actions, *self._dispatch(service, now)]

    def on_ask_again(self, message: AskAgain, edge: Peer, now: float) -> list[Action]:
        """An edge waits for a step that it has sent. It sends it anew if that is not here."""
        record = self.steps.get(message.key)
        if record is None:
            return [AskStep(edge.address, message.key)]
        if record.edge.key != edge.key:
            why = "the session belongs to another edge"
            return [Refuse(edge.address, message.key, "invalid", why), self._note_foreign(edge)]
        return self._hear_again(record, edge, now)

    def _hear_again(self, record: StepRecord, edge: Peer, now: float) -> list[Action]:
        record.edge, record.edge_gone_at = edge, None
        session = self.sessions.get(record.step.session_id)
        if session is not None:
            session.seen_at = now
        return [TellPending(edge.address, record.step.key), *self._send_again(record, now)]

    def on_edges_disconnected(self, connections: set[int], now: float) -> list[Action]:
        """Connections of edges ended. They may come back; their steps are kept for a while."""
        for record in self.steps.values():
            if record.edge.connection in connections:
                record.edge_gone_at = now
        return []

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
        self._ledger.drop_session(self.sessions.pop(session_id).edge.account)

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
            why = f"{MAX_WORKERS} workers are known, and more are not taken"
            return [Note(f"worker {name} is one too many"), TellNotJoined(peer.address, why)]
        if worker is None:
            worker = self.workers[name] = Worker(announce, peer, now)
            serving = ", ".join(describe_service(s) for s in announce.services)
            actions.append(Note(f"worker {name} joined, serving {serving}"))
            actions.append(TellJoined(peer.address))
            joined = {(service.model, service.part) for service in announce.services}
            for waiting in [queued for queued in self.queues if queued[:2] in joined]:
                actions += self._rehome(waiting, now)
        elif not worker.is_same(announce, peer):
            why = (
                f"a worker {name!r} is here already (process {worker.announce.pid} on "
                f"{worker.announce.host}); choose another --id"
            )
            return [self._note_forged(name, peer), TellNotJoined(peer.address, why)]
        elif worker.peer.address != peer.address:
            actions.append(TellJoined(peer.address))
        worker.announce, worker.peer, worker.seen_at = announce, peer, now
        return actions + self._dispatch_for(name, now)

    def on_alive(self, alive: Alive, peer: Peer, now: float) -> list[Action]:
        """A heartbeat, over a connection of its own."""
        worker = self.workers.get(alive.worker_id)
        if worker is None:
            return []
        if (worker.peer.key, worker.announce.pulse) != (peer.key, alive.pulse):
            return [self._note_forged(alive.worker_id, peer)]
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

    def on_disconnected(self, connections: set[int], now: float) -> list[Action]:
        """Connections of the workers' side ended: whoever was behind them is gone."""
        gone = {
            name: "lost its connection"
            for name, worker in self.workers.items()
            if worker.peer.connection in connections
        }
        self.counters["dead_workers"] += len(gone)
        return self._drop_workers(gone, now, blame_steps=True)

    def on_answer(self, answer: StepReply | NeedRows | NeedTensors, now: float) -> list[Action]:
        """A worker answered a step. Answers of any but the latest attempt are dropped."""
        record = self._take_in_flight(answer.key, answer.worker_id, answer.attempt, now)
        if record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_for(answer.worker_id, now)
        if answer.precision not in ("", record.service[2]):
            why = f"answers in {answer.precision}, which it does not serve"
            return self._fail(record, answer.worker_id, why, now)
        self.counters["answers"] += 1
        self.workers[answer.worker_id].steps_done += 1
        session = self.sessions.get(record.step.session_id)
        if session is not None:
            session.worker_id, session.seen_at = answer.worker_id, now
            session.precision = record.service[2]
        if record.worker_id is None:  # it had been taken back, and an earlier worker was first
            self.queues[record.service].remove(record.account, record.step.key)
        self._learn_time(record.service, now - record.sent_at)
        self._drop_record(record)
        actions: list[Action] = [Answer(record.edge.address, answer.key), Forget(answer.key)]
        actions += self._cancel_at_all(record, but=answer.worker_id)
        return actions + self._dispatch_for(answer.worker_id, now)

    def on_dropped(self, dropped: StepDropped, now: float) -> list[Action]:
        """A worker confirms that it does not compute a step (any more): it has room again."""
        record = self._take_in_flight(dropped.key, dropped.worker_id, dropped.attempt, now)
        if record is None or record.late_on.pop(dropped.worker_id, None) is not None:
            return self._dispatch_for(dropped.worker_id, now)
        self._drop_record(record)  # a newer step of the session reached it by another broker
        return [Forget(dropped.key), *self._dispatch_for(dropped.worker_id, now)]

    def on_failed(self, failed: StepFailed, now: float) -> list[Action]:
        """A worker could not compute a step: another one tries, up to `max_attempts` in all."""
        record = self._take_in_flight(failed.key, failed.worker_id, failed.attempt, now)
        if record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_for(failed.worker_id, now)
        return self._fail(record, failed.worker_id, failed.reason, now)

    def _fail(self, record: StepRecord, worker_id: str, reason: str, now: float) -> list[Action]:
        """A worker's answer is no good: another one tries, unless one is at it already."""
        actions: list[Action] = []
        if record.late_on.pop(worker_id, None) is None:
            actions = self._requeue_failed(record, worker_id, reason, now)
            actions += self._dispatch(record.service, now)
        return actions + self._dispatch_for(worker_id, now)

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
                if record is not None:
                    record.late_on.pop(name, None)
                if record is None or record.worker_id != name:
                    continue
                if blame_steps:
                    # a pool that is killed as a whole does not end in one instant
                    record.wait_until = now + SETTLE_S if record.tries > 1 else 0.0
                    actions += self._requeue_failed(record, name, reasons[name], now)
                else:
                    self._requeue_unsent(record, now)
        for worker in gone.values():
            for service in worker.announce.services:
                self._gone_at[service_key(service)] = now
                actions += self._rehome(service_key(service), now)
            actions += self._dispatch_all(worker.announce.services, now)
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
        for record in [r for r in self.steps.values() if r.edge_gone_at is not None]:
            if now - (record.edge_gone_at or now) >= EDGE_RETURN_S:
                actions += self._remove(record)
        actions += self._hand_over_late_steps(now)
        actions += self._refuse_what_waits_in_vain(now)
        for record in [r for r in self.steps.values() if 0.0 < r.wait_until <= now]:
            record.wait_until = 0.0
            actions += self._dispatch(record.service, now)
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
        if record.worker_id is None or now - record.asked_at < record.again_after_s:
            return []
        record.asked_at = now
        record.again_after_s *= 2
        return [Dispatched(record.worker_id, record.step.key, record.attempts, 0)]

    def _refuse_at_once(
        self, step: AnyStep, service: ServiceKey, edge: Peer, body_bytes: int, now: float
    ) -> Action | None:
        if not self._is_or_will_be_served(service, now):
            self.counters["refused"] += 1
            return Refuse(edge.address, step.key, "no_worker", self._why_no_worker(service))
        is_new = step.session_id not in self.sessions
        if is_new and self._ledger.has_all_sessions(edge.account):
            self.counters["refused"] += 1
            limit = self._ledger.limits.sessions_per_edge
            why = f"this edge has {limit} sessions open; end some first"
            return Refuse(edge.address, step.key, "invalid", why)
        if self.is_full or not self._ledger.has_room(edge.account, body_bytes):
            self.counters["busy"] += 1
            return TellBusy(edge.address, step.key, BUSY_RETRY_MS)
        return None

    def _is_or_will_be_served(self, service: ServiceKey, now: float) -> bool:
        """Workers that go are mostly replaced; a service that none has had is a mistake."""
        model, part, precision = service
        if now - self.started_at < max(self.silence_s, START_S):
            return True
        return any(w.serves(service) for w in self.workers.values()) or any(
            now - gone_at < WORKER_RETURN_S
            for gone, gone_at in self._gone_at.items()
            if gone[:2] == (model, part) and precision in ("", gone[2])
        )

    def _refuse_what_waits_in_vain(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for service, queue in list(self.queues.items()):
            if not queue:
                del self.queues[service]
            elif not self._is_or_will_be_served(service, now):
                for key in list(queue):
                    why = self._why_no_worker(service)
                    actions += self._refuse(self.steps[key], "no_worker", why)
        for service, gone_at in list(self._gone_at.items()):
            if now - gone_at >= WORKER_RETURN_S:
                del self._gone_at[service]
        return actions

    def _why_no_worker(self, service: ServiceKey) -> str:
        model, part, precision = service
        wanted = f"{part} of the model with fingerprint {model}"
        if precision:
            wanted += f" in {precision}, in which this session was begun"
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
            self.queues[record.service].remove(record.account, record.step.key)
        return [Forget(record.step.key), *self._cancel_at_all(record)]

    def _cancel_at_all(self, record: StepRecord, but: str = "") -> list[Action]:
        """Whoever has a step that is over shall drop it, and counts as busy until then."""
        holders = dict(record.late_on)
        if record.worker_id is not None:
            holders[record.worker_id] = record.attempts
        holders.pop(but, None)
        self.counters["cancelled"] += len(holders)
        return [
            Cancel(worker_id, record.step.key, attempt, record.edge.key)
            for worker_id, attempt in holders.items()
            if worker_id in self.workers
        ]

    def _refuse(self, record: StepRecord, code: str, reason: str) -> list[Action]:
        self.counters["refused"] += 1
        return [*self._remove(record), Refuse(record.edge.address, record.step.key, code, reason)]

    def _drop_record(self, record: StepRecord) -> None:
        del self.steps[record.step.key]
        self._ledger.drop_step(record.account, record.body_bytes)

    def _take_in_flight(
        self, key: StepKey, worker_id: str, attempt: int, now: float
    ) -> StepRecord | None:
        """The record of a step that this worker was asked for in this attempt, else None."""
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.seen_at = now  # an answer is a sign of life
        record = self.steps.get(key)
        is_current = record is not None and (
            (record.worker_id == worker_id and record.attempts == attempt)
            or record.late_on.get(worker_id) == attempt
        )
        if worker is not None and (record is None or is_current or record.worker_id != worker_id):
            worker.in_flight.pop(key, None)
        return record if worker is not None and is_current else None

    def _requeue(self, record: StepRecord, now: float) -> None:
        """Take a step back from its worker, to the front of its queue."""
        worker = self.workers.get(record.worker_id or "")
        if worker is not None:
            worker.in_flight.pop(record.step.key, None)
        record.worker_id = None
        record.queued_at = now
        self._queue_of(record.service).add_first(record.account, record.step.key)

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
        if record.tries >= self.max_attempts:
            reasons = dict.fromkeys(f"worker {w}: {why}" for w, why in record.failures)
            tried = f"failed {record.tries} times: {'; '.join(reasons)}"
            return self._refuse(record, "failed", tried)
        self.counters["redispatched"] += 1
        return []

    def _dispatch_for(self, worker_id: str, now: float) -> list[Action]:
        """A worker's room may have changed: look at the queues it serves."""
        worker = self.workers.get(worker_id)
        return self._dispatch_all(worker.announce.services, now) if worker else []

    def _dispatch_all(self, services: list[Service], now: float) -> list[Action]:
        actions: list[Action] = []
        for service in services:
            actions += self._dispatch(service_key(service), now)
        return actions

    def _dispatch(self, service: ServiceKey, now: float) -> list[Action]:
        """Hand out what is queued for a service, edges in turn, while there is room."""
        queue = self.queues.get(service)
        if not queue:
            return []
        workers = [w for w in self.workers.values() if w.serves(service)]
        actions: list[Action] = []
        placed = True
        while placed:
            placed = False
            for account in queue.accounts():
                with_room = [w for w in workers if w.room > 0 and self._is_fresh(w, now)]
                if not with_room:
                    return actions
                dispatched = self._dispatch_first(queue, account, workers, with_room, now)
                placed = placed or bool(dispatched)
                actions += dispatched
        return actions

    def _dispatch_first(
        self,
        queue: FairQueue,
        account: bytes,
        workers: list[Worker],
        with_room: list[Worker],
        now: float,
    ) -> list[Action]:
        """Hand out one step of an edge, its first that needs not wait for a worker of its own."""
        if not self._ledger.is_alone(account):
            with_room = [w for w in with_room if w.count_of(account) < _share(w)]
        for key in queue.first(account) if with_room else ():
            record = self.steps[key]
            if now < record.wait_until:
                continue
            worker = self._pick_worker(record, workers, with_room, now)
            if worker is None:
                continue
            queue.remove(account, key)
            queue.served(account)
            return [self._assign(record, worker, now)]
        return []

    def _assign(self, record: StepRecord, worker: Worker, now: float) -> Dispatched:
        record.worker_id = worker.announce.worker_id
        record.attempts += 1
        record.sent_at = record.asked_at = now
        record.again_after_s = SEND_AGAIN_S
        worker.in_flight[record.step.key] = Flight(record.account, now)
        queue_us = max(0, round((now - record.queued_at) * 1e6))
        return Dispatched(record.worker_id, record.step.key, record.attempts, queue_us)

    def _is_fresh(self, worker: Worker, now: float) -> bool:
        """Heard of lately. When a whole pool pauses, a step does not go from silent to silent."""
        return now - worker.seen_at < FRESH_PART * self._silence_limit_s(worker)

    def _pick_worker(
        self, record: StepRecord, workers: list[Worker], with_room: list[Worker], now: float
    ) -> Worker | None:
        session = self.sessions.get(record.step.session_id)
        warm = self.workers.get(session.worker_id) if session and session.worker_id else None
        candidates = with_room
        untried = [w for w in candidates if not record.failed_on(w.announce.worker_id)]
        if untried:
            candidates = untried
        elif any(not record.failed_on(w.announce.worker_id) for w in workers if not w.draining):
            return None  # wait for room at a worker that has not failed it yet
        patience_s = self._patience_s(record.service)
        moving = [w for w in candidates if not w.is_stuck(now, patience_s)]
        candidates = moving or candidates
        if warm is not None and not record.failed_on(warm.announce.worker_id):
            if warm in candidates:
                return warm
            if not warm.draining and warm in workers and not warm.is_stuck(now, patience_s):
                candidates = [w for w in candidates if not w.in_flight]
        return min(candidates, key=lambda w: len(w.in_flight), default=None)

    # --- steps that take long

    def _learn_time(self, service: ServiceKey, taken_s: float) -> None:
        usual_s = self._usual_s.get(service, taken_s)
        self._usual_s[service] = usual_s + (taken_s - usual_s) / 8

    def _patience_s(self, service: ServiceKey) -> float:
        """After how long a step at a worker is late."""
        return max(HAND_OVER_S, HAND_OVER_TIMES * self._usual_s.get(service, 0.0))

    def _hand_over_late_steps(self, now: float) -> list[Action]:
        """Give a step that is late to an idle worker too, each time with twice the patience."""
        actions: list[Action] = []
        for record in self.steps.values():
            if record.worker_id is None:
                continue
            patience_s = self._patience_s(record.service) * 2**record.moves
            if now - record.sent_at < patience_s:
                continue
            idle = self._find_idle(record, now)
            late = self.workers.get(record.worker_id)
            if idle is None or late is None:
                continue
            record.late_on[record.worker_id] = record.attempts
            record.moves += 1
            self.counters["handed_over"] += 1
            actions.append(
                Note(f"a step is late on worker {record.worker_id}: {idle.announce.worker_id} too")
            )
            owner, late_attempt = record.edge.key, record.attempts
            actions.append(self._assign(record, idle, now))
            actions.append(Cancel(late.announce.worker_id, record.step.key, late_attempt, owner))
        return actions

    def _find_idle(self, record: StepRecord, now: float) -> Worker | None:
        for worker in self.workers.values():
            name = worker.announce.worker_id
            untried = name not in record.late_on and not record.failed_on(name)
            idle = worker.room > 0 and not worker.in_flight and self._is_fresh(worker, now)
            if untried and idle and worker.serves(record.service):
                return worker
        return None

    # --- precisions

    def _queue_of(self, service: ServiceKey) -> FairQueue:
        return self.queues.setdefault(service, FairQueue())

    def _choose_service(self, opening: AnyOpening, precision: str) -> ServiceKey:
        """The service of a session: as it was begun, else where there is most room."""
        model, part = opening.model, opening.part
        if precision:
            return model, part, precision
        room: dict[str, int] = {}
        for worker in self.workers.values():
            for service in worker.announce.services:
                if (service.model, service.part) == (model, part):
                    room[service.precision] = room.get(service.precision, 0) + worker.room
        return model, part, max(room, key=lambda name: (room[name], name), default="")

    def _rehome(self, service: ServiceKey, now: float) -> list[Action]:
        """Steps of sessions that nobody has answered yet need not wait for one precision."""
        if any(w.serves(service) for w in self.workers.values()):
            return []
        homes: set[ServiceKey] = set()
        for key in list(self.queues.get(service, ())):
            record, session = self.steps[key], self.sessions[key[0]]
            chosen = self._choose_service(
                session.opening, session.opening.precision or session.precision
            )
            if chosen[2] and chosen != service:
                self.queues[service].remove(record.account, key)
                record.service = chosen
                self._queue_of(chosen).add(record.account, key)
                homes.add(chosen)
        return [action for home in homes for action in self._dispatch(home, now)]


def _share(worker: Worker) -> int:
    """How many steps one edge may have at a worker while others have sessions, too."""
    return max(1, worker.announce.capacity // 2)


def _why_wrong(step: AnyStep, opening: AnyOpening) -> str:
    """What no worker could make sense of; empty if nothing is wrong."""
    if isinstance(step, Step) != isinstance(opening, Opening):
        return f"a step of kind {step.kind!r} does not go with an opening of kind {opening.kind!r}"
    if isinstance(step, Step) and step.rows > MAX_STEP_ROWS:
        return f"the step has {step.rows} rows; at most {MAX_STEP_ROWS}"
    return ""
