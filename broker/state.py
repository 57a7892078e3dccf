"""What the broker knows and decides: state in, actions out. No sockets, no clock, no torch.

The broker keeps nothing that it could not lose. Workers say everything about themselves again and
again, edges ask again when they hear nothing, so a broker that was restarted knows all it needs
after a moment. Each step is in one of three places: queued for its service, in flight at one
worker, or answered and forgotten. What a step costs here does not depend on how many workers,
sessions or services there are (`broker/pools.py`); only steps that fail look at all workers.

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

from collections import Counter, OrderedDict
from collections.abc import Iterable
from itertools import islice

from msgspec import structs

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
    PassOn,
    Refuse,
    TellBusy,
    TellJoined,
    TellNotJoined,
    TellPending,
)
from broker.fair_queue import FairQueue
from broker.ledger import Account, Ledger, Limits
from broker.peer import Peer
from broker.pools import (
    HAND_OVER_S,
    LOOK_AT,
    ServiceKey,
    ServicePool,
    Worker,
    describe_service,
    service_key,
)
from broker.records import SEND_AGAIN_S, SessionRecord, StepRecord
from common.protocol.messages import (
    Alive,
    Announce,
    AnyOpening,
    AskAgain,
    Need,
    Opening,
    Part,
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
        self.pools: dict[ServiceKey, ServicePool] = {}
        self._pools_of_part: dict[tuple[str, str], list[ServicePool]] = {}  # in all precisions
        self.sessions: OrderedDict[bytes, SessionRecord] = OrderedDict()  # the most silent first
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.is_full = False  # the process has all the memory that it may have
        self._settling: dict[StepKey, StepRecord] = {}  # not to be handed out yet

    # --- what arrives from edges

    def on_step(
        self,
        step: Step,
        opening: AnyOpening | None,
        edge: Peer,
        body_bytes: int,
        now: float,
        opening_frame: bytes = b"",
    ) -> list[Action]:
        """A step arrived, for the first time or again, with its session's opening or without.

        `opening_frame` is the opening as it came, to be passed on.
        """
        key = step.key
        session = self.sessions.get(step.session_id)
        if session is not None and session.edge.key != edge.key:
            why = "the session belongs to another edge"
            return [Refuse(edge.address, key, "invalid", why), self._note_foreign(edge)]
        record = self.steps.get(key)
        if record is not None:
            return self._hear_again(record, edge, now)
        self.counters["steps"] += 1
        if session is not None and key[1:] < session.newest[1:]:
            why = "a newer step of this session has arrived"
            return [Refuse(edge.address, key, "stale", why)]
        if opening is None:
            if session is None:
                return [AskOpening(edge.address, key)]
            opening, opening_frame = session.opening, session.opening_frame
        why = _why_wrong(step, opening)
        if why:
            self.counters["refused"] += 1
            return [Refuse(edge.address, key, "invalid", why)]
        actions = self._abandon_older(session)
        precision = opening.precision or (session.precision if session is not None else "")
        pools = self._pools_on(opening, precision)
        account = self._account_of(session, edge)
        refusal = self._refuse_at_once(key, session is None, pools, edge, account, body_bytes, now)
        if refusal is not None:
            return [*actions, refusal]
        pool = self._pool_of(pools[0].key)
        if session is None:
            session = SessionRecord(opening, edge, account, key, now, opening_frame, precision)
            self.sessions[step.session_id] = session
            self._ledger.add_session(account)
        else:
            self._renew(session, step, edge, account, now)
            session.opening, session.opening_frame = opening, opening_frame
            session.precision = precision
        deadline_at = now + min(step.deadline_ms / 1000, MAX_DEADLINE_S)
        record = StepRecord(step, pool, edge, account, body_bytes, now, now, deadline_at)
        self.steps[key] = record
        self._ledger.add_step(account, body_bytes)
        return actions + self._route(record, now)

    def _account_of(self, session: SessionRecord | None, edge: Peer) -> Account:
        name = edge.account
        if session is not None and session.account.name == name:
            return session.account
        return self._ledger.open(name)

    def _renew(
        self, session: SessionRecord, step: Step, edge: Peer, account: Account, now: float
    ) -> None:
        """A session has its next step, perhaps over another connection."""
        if account is not session.account:
            self._ledger.add_session(account)
            self._ledger.drop_session(session.account)
            session.account = account
        session.edge, session.newest = edge, step.key
        if step.shun:
            session.leave(step.shun)
        self._see(step.session_id, session, now)

    def _see(self, session_id: bytes, session: SessionRecord, now: float) -> None:
        session.seen_at = now
        self.sessions.move_to_end(session_id)

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
            self._see(record.step.session_id, session, now)
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
        actions = self._abandon_older(session)
        anybody = next(iter(self.workers.values()), None)
        parts_of: dict[str, list[str]] = {}
        for hop, part in enumerate(session.opening.route):
            target = session.warm_worker(hop) or anybody
            if target is not None:
                parts_of.setdefault(target.name, []).append(part)
        for name, parts in parts_of.items():
            actions.append(ForwardEnd(name, session_id, edge.key, parts))
        return actions

    def _forget_session(self, session_id: bytes) -> None:
        self._ledger.drop_session(self.sessions.pop(session_id).account)

    def _note_foreign(self, edge: Peer) -> Note:
        self.counters["foreign_sessions"] += 1
        return Note(f"edge {edge.key} named a session of another edge: refused", is_warning=True)

    # --- what arrives from workers

    def on_announce(self, announce: Announce, peer: Peer, now: float) -> list[Action]:
        """A worker describes itself: a new one, a known one, or one that has connected anew."""
        name = announce.worker_id
        worker = self.workers.get(name)
        if worker is None:
            return self._join(announce, peer, now)
        if not worker.is_same(announce, peer):
            why = (
                f"a worker {name!r} is here already (process {worker.announce.pid} on "
                f"{worker.announce.host}); choose another --id"
            )
            return [self._note_forged(name, peer), TellNotJoined(peer.address, why)]
        actions: list[Action] = []
        if worker.peer.address != peer.address:
            actions.append(TellJoined(peer.address))
        before, worker.announce, worker.peer = worker.announce, announce, peer
        worker.fresh_s = FRESH_PART * self._silence_limit_s(worker)
        worker.hear(now)
        if announce.services != before.services:
            actions += self._leave_pools(worker, now) + self._join_pools(worker, now)
        elif (announce.capacity, announce.ready) != (before.capacity, before.ready):
            worker.settle()
        return actions + self._dispatch_to(worker, now)

    def _join(self, announce: Announce, peer: Peer, now: float) -> list[Action]:
        name = announce.worker_id
        if len(self.workers) >= MAX_WORKERS:
            why = f"{MAX_WORKERS} workers are known, and more are not taken"
            return [Note(f"worker {name} is one too many"), TellNotJoined(peer.address, why)]
        worker = self.workers[name] = Worker(announce, peer, now, fresh_s=0.0)
        worker.fresh_s = FRESH_PART * self._silence_limit_s(worker)
        serving = ", ".join(describe_service(s) for s in announce.services)
        actions: list[Action] = [
            Note(f"worker {name} joined, serving {serving}"),
            TellJoined(peer.address),
        ]
        actions += self._join_pools(worker, now)
        return actions + self._dispatch_to(worker, now)

    def _join_pools(self, worker: Worker, now: float) -> list[Action]:
        actions: list[Action] = []
        for service in dict.fromkeys(map(service_key, worker.announce.services)):
            pool = self._pool_of(service)
            pool.gone_at = None
            pool.add(worker)
            for other in self._pools_of_part[service[:2]]:
                actions += self._rehome(other, now)
        return actions

    def _leave_pools(self, worker: Worker, now: float) -> list[Action]:
        """A worker serves nothing any more; what waited for it is queued for the others."""
        actions: list[Action] = []
        for pool in list(worker.pools):
            self._queue_for_all(pool, pool.remove(worker))
            if not pool.workers:
                pool.gone_at = now
            actions += self._rehome(pool, now) + self._dispatch_from(pool, now)
        return actions

    def on_alive(self, alive: Alive, peer: Peer, now: float) -> list[Action]:
        """A heartbeat, over a connection of its own."""
        worker = self.workers.get(alive.worker_id)
        if worker is None:
            return []
        if (worker.peer.key, worker.announce.pulse) != (peer.key, alive.pulse):
            return [self._note_forged(alive.worker_id, peer)]
        was_quiet = worker.is_quiet
        worker.hear(now)
        return self._dispatch_to(worker, now) if was_quiet else []

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

    def on_answer(self, answer: StepReply | Need, now: float, body_bytes: int = 0) -> list[Action]:
        """A worker answered a step. Answers of any but the latest attempt are dropped."""
        worker = self._hear_worker(answer.worker_id, now)
        record = self._take_in_flight(answer.key, worker, answer.attempt)
        if worker is None or record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_to(worker, now)
        if answer.precision not in ("", record.pool.key[2]):
            why = f"answers in {answer.precision}, which it does not serve"
            return self._fail(record, worker, why, now)
        session = self.sessions[record.step.session_id]
        if isinstance(answer, StepReply) and record.hop + 1 < len(session.opening.route):
            if answer.rows != record.step.rows:
                why = f"answers {answer.rows} rows of {record.step.rows}; the next part needs all"
                return self._fail(record, worker, why, now)
            cancelled = self._count_answer(record, session, worker, now)
            next_actions = self._pass_on(record, session, answer, body_bytes, now)
        else:
            cancelled = self._count_answer(record, session, worker, now)
            self._drop_record(record)
            next_actions = [Answer(record.edge.address, answer.key), Forget(answer.key)]
        return [*next_actions, *cancelled, *self._dispatch_to(worker, now)]

    def _count_answer(
        self, record: StepRecord, session: SessionRecord, worker: Worker, now: float
    ) -> list[Action]:
        """A worker has computed a step, or said what it lacks: no other need do it."""
        self.counters["answers"] += 1
        worker.steps_done += 1
        session.workers[record.hop], session.precision = worker, record.pool.key[2]
        self._see(record.step.session_id, session, now)
        if record.worker is None:  # it had been taken back, and an earlier worker was first
            self._take_from_queue(record)
        record.pool.learn_time(now - record.sent_at)
        if record.late_on or record.worker is not worker:
            return self._cancel_at_all(record, but=worker.name)
        return []

    def _pass_on(
        self,
        record: StepRecord,
        session: SessionRecord,
        answer: StepReply,
        body_bytes: int,
        now: float,
    ) -> list[Action]:
        """What one part has computed is a step for the next, before steps that are new."""
        opening = session.opening
        assert isinstance(opening, Opening)
        rows = [Part(opening.between, [answer.rows], body_bytes)]
        self._ledger.drop_step(record.account, record.body_bytes)
        self._ledger.add_step(record.account, body_bytes)
        record.pass_on(structs.replace(record.step, parts=rows), answer, body_bytes, now)
        record.pool = self._pool_of(self._choose_anew(record).key)
        return [PassOn(record.step), *self._route(record, now, has_waited=True)]

    def on_dropped(self, dropped: StepDropped, now: float) -> list[Action]:
        """A worker confirms that it does not compute a step (any more): it has room again."""
        worker = self._hear_worker(dropped.worker_id, now)
        record = self._take_in_flight(dropped.key, worker, dropped.attempt)
        if record is None or record.late_on.pop(dropped.worker_id, None) is not None:
            return self._dispatch_to(worker, now)
        self._drop_record(record)  # a newer step of the session reached it by another broker
        return [Forget(dropped.key), *self._dispatch_to(worker, now)]

    def on_failed(self, failed: StepFailed, now: float) -> list[Action]:
        """A worker could not compute a step: another one tries, up to `max_attempts` in all."""
        worker = self._hear_worker(failed.worker_id, now)
        record = self._take_in_flight(failed.key, worker, failed.attempt)
        if worker is None or record is None:
            self.counters["late_answers"] += 1
            return self._dispatch_to(worker, now)
        return self._fail(record, worker, failed.reason, now)

    def _fail(self, record: StepRecord, worker: Worker, reason: str, now: float) -> list[Action]:
        """A worker's answer is no good: another one tries, unless one is at it already."""
        actions: list[Action] = []
        if record.late_on.pop(worker.name, None) is None:
            record.failures.append((worker.name, reason))
            self._take_back(record, now)
            actions = self._try_elsewhere(record, now)
        return actions + self._dispatch_to(worker, now)

    def on_drain(self, worker_id: str, peer: Peer, now: float) -> list[Action]:
        """A worker wants to leave: it gets nothing new."""
        worker = self.workers.get(worker_id)
        accepted: list[Action] = [AcceptDrain(peer.address)]
        if worker is None or worker.draining:
            return accepted
        worker.draining = True
        worker.settle()
        rerouted = self._release_backlogs(worker, now)
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
        for worker in gone.values():
            worker.is_gone = True
            worker.settle()
        homeless: list[StepRecord] = []
        for name, worker in gone.items():
            for key in list(worker.in_flight):
                record = self.steps.get(key)
                if record is None or record.worker is not worker:
                    if record is not None:
                        record.late_on.pop(name, None)
                    continue
                self._take_back(record, now)
                homeless.append(record)
                if blame_steps:
                    # a pool that is killed as a whole does not end in one instant
                    record.wait_until = now + SETTLE_S if record.tries > 1 else 0.0
                    record.failures.append((name, reasons[name]))
                else:
                    record.attempts -= 1
        for record in homeless:
            if blame_steps:
                actions += self._try_elsewhere(record, now)
            else:
                actions += self._route(record, now, has_waited=True)
        for worker in gone.values():
            actions += self._leave_pools(worker, now)
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
        actions += self._look_after_late_workers(now)
        for key, record in list(self._settling.items()):
            if now >= record.wait_until:
                del self._settling[key]
                record.wait_until = 0.0
                actions += self._route(record, now, has_waited=True)
        for service, pool in list(self.pools.items()):
            if not pool.workers:
                actions += self._look_after_lost(service, pool, now)
        self._forget_silent_sessions(now)
        return actions

    def _forget_silent_sessions(self, now: float) -> None:
        while self.sessions:
            session_id, session = next(iter(self.sessions.items()))
            if now - session.seen_at <= SESSION_MEMORY_S:
                return
            if session.newest in self.steps:
                self._see(session_id, session, now)
            else:
                self._forget_session(session_id)

    # --- decisions

    def _silence_limit_s(self, worker: Worker) -> float:
        """A worker that beats slowly, as it says, is not taken for dead between two beats."""
        wanted_s = MISSED_AT_LEAST * worker.announce.heartbeat_ms / 1000
        return max(self.silence_s, min(wanted_s, SILENCE_AT_MOST_S))

    def _send_again(self, record: StepRecord, now: float) -> list[Action]:
        """A step in flight for long may have been lost on its way; a worker takes it twice."""
        if record.worker is None or now - record.asked_at < record.again_after_s:
            return []
        record.asked_at = now
        record.again_after_s *= 2
        return [Dispatched(record.worker.name, record.step.key, record.attempts, 0)]

    def _refuse_at_once(
        self,
        key: StepKey,
        is_new: bool,
        pools: list[ServicePool],
        edge: Peer,
        account: Account,
        body_bytes: int,
        now: float,
    ) -> Action | None:
        for pool in pools:
            if not pool.workers and not self._may_return(pool, now):
                self.counters["refused"] += 1
                return Refuse(edge.address, key, "no_worker", self._why_no_worker(pool.key))
        if is_new and self._ledger.has_all_sessions(account):
            self.counters["refused"] += 1
            limit = self._ledger.limits.sessions_per_edge
            why = f"this edge has {limit} sessions open; end some first"
            return Refuse(edge.address, key, "invalid", why)
        if self.is_full or not self._ledger.has_room(account, body_bytes):
            self.counters["busy"] += 1
            return TellBusy(edge.address, key, BUSY_RETRY_MS)
        return None

    def _may_return(self, pool: ServicePool, now: float) -> bool:
        """Workers that go are mostly replaced; a service that nobody has had is a mistake."""
        if now - self.started_at < max(self.silence_s, START_S):
            return True
        wanted = pool.key[2]
        return any(
            other.gone_at is not None and now - other.gone_at < WORKER_RETURN_S
            for other in self._pools_of_part.get(pool.key[:2], ())
            if wanted in ("", other.key[2])
        )

    def _look_after_lost(self, service: ServiceKey, pool: ServicePool, now: float) -> list[Action]:
        """Nobody serves this: what waits here has waited long enough when nobody comes."""
        if self._may_return(pool, now):
            return []
        actions: list[Action] = []
        for key in list(pool.queued()):
            actions += self._refuse(self.steps[key], "no_worker", self._why_no_worker(service))
        del self.pools[service]
        self._pools_of_part[service[:2]].remove(pool)
        if not self._pools_of_part[service[:2]]:
            del self._pools_of_part[service[:2]]
        return actions

    def _why_no_worker(self, service: ServiceKey) -> str:
        model, part, precision = service
        wanted = f"{part} of the model with fingerprint {model}"
        if precision:
            wanted += f" in {precision}, in which this session is computed"
        return f"no worker serves {wanted}; {self.describe_serving()}"

    def describe_serving(self) -> str:
        """One line about what the workers serve."""
        services = {s for w in self.workers.values() for s in w.announce.services}
        if not services:
            return "there are no workers at all"
        listed = ", ".join(sorted(describe_service(s) for s in services))
        return f"being served: {listed}"

    def _why_late(self, record: StepRecord, now: float) -> str:
        where = f"in flight on worker {record.worker_id}" if record.worker else "still queued"
        failures = "".join(f"; worker {w}: {reason}" for w, reason in record.failures)
        return (
            f"the step's deadline passed after {now - record.arrived_at:.1f} s, {where}{failures}"
        )

    def _abandon_older(self, session: SessionRecord | None) -> list[Action]:
        """The edge has moved on: older steps of its session need no answer."""
        record = self.steps.get(session.newest) if session is not None else None
        return self._remove(record) if record is not None else []

    def _remove(self, record: StepRecord) -> list[Action]:
        self._drop_record(record)
        if record.worker is None:
            self._take_from_queue(record)
        return [Forget(record.step.key), *self._cancel_at_all(record)]

    def _cancel_at_all(self, record: StepRecord, but: str = "") -> list[Action]:
        """Whoever has a step that is over shall drop it, and counts as busy until then."""
        holders = dict(record.late_on)
        if record.worker is not None:
            holders[record.worker.name] = record.attempts
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

    def _hear_worker(self, worker_id: str, now: float) -> Worker | None:
        worker = self.workers.get(worker_id)
        if worker is not None:
            worker.hear(now)  # an answer is a sign of life
        return worker

    def _take_in_flight(
        self, key: StepKey, worker: Worker | None, attempt: int
    ) -> StepRecord | None:
        """The record of a step that this worker was asked for in this attempt, else None."""
        if worker is None:
            return None
        record = self.steps.get(key)
        # a worker may have the same step in a later attempt: that one is not over
        is_current = record is not None and (
            (record.worker is worker and record.attempts == attempt)
            or record.late_on.get(worker.name) == attempt
        )
        if record is None or is_current or record.worker is not worker:
            worker.drop(key)
        return record if is_current else None

    # --- queues

    def _route(self, record: StepRecord, now: float, has_waited: bool = False) -> list[Action]:
        """Hand a step out if a worker takes it, else queue it, before others if it `has_waited`."""
        record.pool = self._home_of(record)
        key, pool, account = record.step.key, record.pool, record.account
        if now < record.wait_until:
            self._settling[key] = record
            return []
        if record.failures:
            untried = self._pick_untried(record, now)
            if untried is not None:
                return [self._assign(record, untried, now)]
            pool.retries[key] = None
            return []
        is_alone = self._ledger.is_alone(account)
        warm = self._warm_worker_of(record)
        queue = pool.waiting
        if warm is not None and not warm.is_stuck(now, pool.patience_s):
            if warm.is_open and warm.has_place_for(account, is_alone) and warm.is_fresh(now):
                return [self._assign(record, warm, now)]
            worker = pool.find(account, is_alone, now, only_idle=True, but=record.step.shun)
            queue = pool.backlog_of(warm)
        else:
            but = record.step.shun if len(pool.workers) > 1 else ""
            worker = pool.find(account, is_alone, now, but=but)
        if worker is not None:
            return [self._assign(record, worker, now)]
        record.queue = queue
        if has_waited:
            queue.add_first(account, key)
        else:
            queue.add(account, key)
        return []

    def _warm_worker_of(self, record: StepRecord) -> Worker | None:
        """Who is warm for a step's session and may have the step."""
        session = self.sessions.get(record.step.session_id)
        warm = session.warm_worker(record.hop) if session is not None else None
        if warm is None or warm.draining or warm.name not in record.pool.workers:
            return None
        return warm

    def _assign(self, record: StepRecord, worker: Worker, now: float) -> Dispatched:
        key = record.step.key
        record.worker, record.queue = worker, None
        record.late_on.pop(worker.name, None)  # what it may still say of that attempt is late
        record.attempts += 1
        record.sent_at = record.asked_at = now
        record.again_after_s = SEND_AGAIN_S
        worker.take(key, record.account, now)
        queue_us = record.earlier_queue_us + max(0, round((now - record.queued_at) * 1e6))
        return Dispatched(worker.name, key, record.attempts, queue_us)

    def _take_from_queue(self, record: StepRecord) -> None:
        """A step waits no longer, wherever it did."""
        if record.queue is not None:
            record.queue.remove(record.account, record.step.key)
            record.queue = None
        record.pool.retries.pop(record.step.key, None)
        self._settling.pop(record.step.key, None)

    def _take_back(self, record: StepRecord, now: float) -> None:
        """A step's worker does not have it any more."""
        if record.worker is not None:
            record.worker.drop(record.step.key)
        record.worker = None
        record.queued_at = now

    def _try_elsewhere(self, record: StepRecord, now: float) -> list[Action]:
        """Route a step that a worker failed, or refuse it after too many."""
        if record.tries >= self.max_attempts:
            reasons = dict.fromkeys(f"worker {w}: {why}" for w, why in record.failures)
            tried = f"failed {record.tries} times: {'; '.join(reasons)}"
            return self._refuse(record, "failed", tried)
        self.counters["redispatched"] += 1
        return self._route(record, now, has_waited=True)

    def _dispatch_to(self, worker: Worker | None, now: float) -> list[Action]:
        """A worker may have room: give it what waits for it, or for anybody."""
        actions: list[Action] = []
        if worker is None:
            return actions
        for pool in worker.pools:
            if pool.retries:
                actions += self._retry_at(worker, pool, now)
        while (key := self._next_for(worker, now)) is not None:
            actions.append(self._assign(self.steps[key], worker, now))
        return actions

    def _next_for(self, worker: Worker, now: float) -> StepKey | None:
        """Take the step that a worker should have next from its queue."""
        pools = [pool for pool in worker.pools if pool.waiting or pool.backlogs]
        if not pools or not worker.is_open or not worker.is_fresh(now):
            return None
        queues = [queue for pool in pools for queue in pool.queues_for(worker)]
        if queues:  # in turn, or those who wait for this one would always be first
            worker.turn = (worker.turn + 1) % len(queues)
            queues = queues[worker.turn :] + queues[: worker.turn]
        if not worker.in_flight:  # it may help others
            queues += [queue for pool in pools if (queue := pool.first_backlog()) is not None]
        for queue in queues:
            key = self._take_for(worker, queue)
            if key is not None:
                return key
        return None

    def _take_for(self, worker: Worker, queue: FairQueue) -> StepKey | None:
        """The first step in turn that a worker may have and that does not shun it."""
        for _ in range(LOOK_AT):
            may = (  # few fill their share of one worker
                account
                for account in queue.accounts()
                if worker.has_place_for(account, self._ledger.is_alone(account))
            )
            account = next(may, None)
            if account is None:
                return None
            key = queue.take(account)
            record = self.steps[key]
            if record.step.shun != worker.name or len(record.pool.workers) < 2:
                return key
            queue.add(account, key)  # behind its others
        return None

    def _dispatch_from(self, pool: ServicePool, now: float) -> list[Action]:
        """Much may have changed in a pool: hand out what waits for anybody there."""
        actions = self._try_again(pool, now)
        is_anything_placed = True
        while is_anything_placed:
            is_anything_placed = False
            for account in list(pool.waiting.accounts()):
                worker = pool.find(account, self._ledger.is_alone(account), now)
                if worker is not None:
                    record = self.steps[pool.waiting.take(account)]
                    actions.append(self._assign(record, worker, now))
                    is_anything_placed = True
        return actions

    def _queue_for_all(self, pool: ServicePool, keys: Iterable[StepKey]) -> None:
        """What waited for one worker waits for any."""
        for key in keys:
            record = self.steps[key]
            record.queue = pool.waiting
            pool.waiting.add(record.account, key)

    def _release_backlogs(self, worker: Worker, now: float) -> list[Action]:
        """A worker is not waited for any more."""
        actions: list[Action] = []
        for pool in worker.pools:
            self._queue_for_all(pool, pool.take_backlog(worker))
            actions += self._dispatch_from(pool, now)
        return actions

    # --- steps that failed somewhere: few, so all workers may be looked at

    def _retry_at(self, worker: Worker, pool: ServicePool, now: float) -> list[Action]:
        """A worker may have room: for steps that it has not failed, or that all have."""
        actions: list[Action] = []
        for key in list(islice(pool.retries, LOOK_AT)):
            if not worker.is_open or not worker.is_fresh(now):
                break
            record = self.steps[key]
            is_tried = record.failed_on(worker.name)
            if is_tried and len({name for name, _ in record.failures}) < len(pool.workers):
                continue
            if worker.has_place_for(record.account, self._ledger.is_alone(record.account)):
                del pool.retries[key]
                actions.append(self._assign(record, worker, now))
        return actions

    def _try_again(self, pool: ServicePool, now: float) -> list[Action]:
        """The workers of a pool are others than before."""
        actions: list[Action] = []
        for key in list(pool.retries):
            record = self.steps[key]
            worker = self._pick_untried(record, now)
            if worker is not None:
                del pool.retries[key]
                actions.append(self._assign(record, worker, now))
        return actions

    def _pick_untried(self, record: StepRecord, now: float) -> Worker | None:
        """A worker that has not failed the step; one that has, if there is no other."""
        is_alone = self._ledger.is_alone(record.account)
        workers = [w for w in record.pool.workers.values() if not (w.draining or w.is_gone)]
        able = [w for w in workers if w.announce.ready and w.is_fresh(now)]
        untried = [w for w in able if not record.failed_on(w.name)]
        candidates = [
            worker
            for worker in untried or workers
            if worker.is_open
            and worker.is_fresh(now)
            and worker.has_place_for(record.account, is_alone)
        ]
        moving = [w for w in candidates if not w.is_stuck(now, record.pool.patience_s)]
        warm = self._warm_worker_of(record)
        if warm in moving and not record.failed_on(warm.name if warm else ""):
            return warm
        return min(moving or candidates, key=lambda w: len(w.in_flight), default=None)

    # --- steps that take long

    def _look_after_late_workers(self, now: float) -> list[Action]:
        actions: list[Action] = []
        for worker in self.workers.values():
            if not worker.is_stuck(now, HAND_OVER_S):
                continue
            for key, flight in list(worker.in_flight.items()):
                if now - flight.sent_at < HAND_OVER_S:
                    break
                record = self.steps.get(key)
                if record is not None and record.worker is worker:
                    actions += self._hand_over(record, worker, now)
            if any(worker.is_stuck(now, pool.patience_s) for pool in worker.pools):
                actions += self._release_backlogs(worker, now)
        return actions

    def _hand_over(self, record: StepRecord, late: Worker, now: float) -> list[Action]:
        """Give a step that is late to an idle worker too, each time with twice the patience."""
        if now - record.sent_at < record.pool.patience_s * 2**record.moves:
            return []
        idle = next(
            (
                worker
                for worker in record.pool.idle(now)
                if worker.name not in record.late_on and not record.failed_on(worker.name)
            ),
            None,
        )
        if idle is None:
            return []
        record.late_on[late.name] = late_attempt = record.attempts
        record.moves += 1
        self.counters["handed_over"] += 1
        return [
            Note(f"a step is late on worker {late.name}: {idle.name} too"),
            self._assign(record, idle, now),
            Cancel(late.name, record.step.key, late_attempt, record.edge.key),
        ]

    # --- precisions

    def _home_of(self, record: StepRecord) -> ServicePool:
        """Where a step waits: where it did, unless nobody serves that and its session may move."""
        if record.pool.workers:
            return record.pool
        return self._pool_of(self._choose_anew(record).key)

    def _choose_anew(self, record: StepRecord) -> ServicePool:
        session = self.sessions[record.step.session_id]
        precision = session.opening.precision or session.precision
        return self._pools_on(session.opening, precision)[record.hop]

    def _pool_of(self, service: ServiceKey) -> ServicePool:
        pool = self.pools.get(service)
        if pool is None:
            pool = self.pools[service] = ServicePool(service)
            self._pools_of_part.setdefault(service[:2], []).append(pool)
        return pool

    def _pools_on(self, opening: AnyOpening, precision: str) -> list[ServicePool]:
        """Who serves each part of a session's route: as it was begun, else who has least to do.

        In one precision for all parts. A pool that nobody is in, and no step yet, is not kept.
        """
        if not precision:
            precision = self._choose_precision(opening)
        services = [(opening.model, part, precision) for part in opening.route]
        return [self.pools.get(service) or ServicePool(service) for service in services]

    def _choose_precision(self, opening: AnyOpening) -> str:
        """In which most of a route is served, and its first part by whoever has least to do."""
        pools_of = [
            [pool for pool in self._pools_of_part.get((opening.model, part), ()) if pool.workers]
            for part in opening.route
        ]
        served = Counter(pool.key[2] for pools in pools_of for pool in pools)
        load = {pool.key[2]: pool.least_load for pool in pools_of[0]}
        return min(served, key=lambda name: (-served[name], load.get(name, 0), name), default="")

    def _rehome(self, pool: ServicePool, now: float) -> list[Action]:
        """Steps of sessions that nobody has answered yet need not wait for one precision."""
        actions: list[Action] = []
        if pool.workers:
            return actions
        for key in list(pool.queued()):
            record = self.steps[key]
            if self._choose_anew(record).workers:
                self._take_from_queue(record)
                actions += self._route(record, now)
        return actions


def _why_wrong(step: Step, opening: AnyOpening) -> str:
    """What no worker could make sense of; empty if nothing is wrong."""
    if isinstance(opening, Opening):
        if step.rows > MAX_STEP_ROWS:
            return f"the step has {step.rows} rows; at most {MAX_STEP_ROWS}"
        if len(opening.route) > 1 and opening.between >= len(opening.codecs):
            return f"the route has a codec beyond the {len(opening.codecs)} that it opened"
    return ""
