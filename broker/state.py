"""What the broker knows and decides: state in, actions out. No sockets, no clock, no torch.

The broker keeps nothing that it could not lose. Workers say everything about themselves again and
again, edges ask again when they hear nothing, so a broker that was restarted knows all it needs
after a moment. Each step is in one of three places: queued for its service, in flight at one
worker, or answered and forgotten. What a step costs here does not depend on how many workers,
sessions or services there are (`broker/pools.py`); only steps that fail look at all workers.

A step goes to the worker that is warm for its session (it computed the session's last step), as
long as that worker has room; when it has not, the step waits for it unless another worker is
idle. Without a warm worker the least loaded one with room gets it. Of a session one step at a time
is queued or in flight at each part of its route, so that the queue goes round all sessions: a long
prompt, which comes in many steps, holds up the others for one of them at a time. Steps that go on
where that one ends are held here until it has passed the part; any other newer step puts it aside.
Edges are taken in turn, and while several have sessions none fills more than half of a worker.

A worker counts as busy with a step until it answers or confirms to have dropped it, also when
nobody waits for the step any more. A step that takes much longer than its service usually does
(three times, and 2 s at least) goes to an idle worker as well; whoever answers first is believed,
and meanwhile the late worker gets nothing new if another can take it.

A session stays with workers of the precision that has answered it first.

A peer is known by its connection. A worker's id belongs to whoever announced it as long as that
one is alive; a session belongs to the edge, by its key, that opened it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import structs

from broker.actions import (
    AcceptDrain,
    Action,
    Answer,
    AskOpening,
    AskStep,
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
from broker.book import Book
from broker.demand import DEFAULT_GOALS, Goals
from broker.dispatcher import Dispatcher, Tell
from broker.ledger import Account, Limits
from broker.peer import Peer
from broker.pools import (
    Worker,
    describe_service,
    service_key,
)
from broker.records import SessionRecord, StepRecord, Suspect
from broker.unserved import START_S, Unserved
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
    MAX_EXACT_PARTS,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
    MAX_STEP_ROWS,
)
from common.spans.cut import are_joined, read_span

SESSION_MEMORY_S = 600.0  # how long the warm worker of a silent session is remembered
BUSY_RETRY_MS = 200
MAX_HELD = 8  # steps of one session behind the first that is not answered
SETTLE_S = 1.0  # between the second worker that died with a step and the third that gets it
FRESH_PART = 0.6  # of the time after which a silent worker is dead
SILENCE_AT_MOST_S = 30.0
MAX_WORKERS = 4096
MISSED_AT_LEAST = 3  # heartbeats of a worker that announces slower ones than we expect


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
        hold_s: float = 0.0,
        goals: Goals = DEFAULT_GOALS,
    ) -> None:
        self.started_at = started_at
        self.silence_s = silence_s
        limits = Limits(max_queued_steps, max_queued_bytes, max_sessions_per_edge)
        self._book = Book(limits, goals)
        self._dispatcher = Dispatcher(self._book, max_attempts)
        knows_all_at = started_at + max(silence_s, START_S)
        self._unserved = Unserved(self._book, self._dispatcher, hold_s, knows_all_at)
        self._ledger = self._book.ledger
        self.workers = self._book.workers
        self.steps = self._book.steps
        self.pools = self._book.pools
        self.sessions = self._book.sessions
        self.counters = self._book.counters
        self.is_full = False  # the process has all the memory that it may have

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
        goes_on = session is not None and self._goes_on(session, step, opening)
        if session is not None and goes_on and len(session.steps) > MAX_HELD:
            return [TellBusy(edge.address, key, BUSY_RETRY_MS)]
        actions = [] if goes_on else self._abandon_older(session)
        precision = opening.precision or (session.precision if session is not None else "")
        pools = self._book.pools_on(opening, precision)
        account = self._account_of(session, edge)
        refusal = self._unserved.refuse(key, pools, opening, edge, now)
        if refusal is None:
            refusal = self._refuse_at_once(key, session is None, edge, account, body_bytes)
        if refusal is not None:
            return [*actions, refusal]
        pool = self._book.pool_of(pools[0].key)
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
        record.blame(session.suspect)
        self._book.add_record(session, record)
        return actions + self._dispatcher.hand_out(session, now)

    def _goes_on(self, session: SessionRecord, step: Step, opening: AnyOpening) -> bool:
        """Whether a step begins where one that is not answered yet ends: both are wanted.

        An edge that has given that one up begins before it, or in a new generation, or opens the
        session in another way.
        """
        last = session.last
        return (
            last is not None
            and isinstance(opening, Opening)
            and _is_alike(opening, session.opening)
            and step.generation == last.step.generation
            and step.step == last.step.step + 1
            and step.position == last.step.end
        )

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
        self._book.see(step.session_id, session, now)

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
            self._book.see(record.step.session_id, session, now)
        return [
            TellPending(edge.address, record.step.key),
            *self._dispatcher.send_again(record, now),
        ]

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
        holders = self._holders_of(session)
        actions = self._abandon_older(session)
        self._book.forget_session(session_id)
        anybody = next(iter(self.workers), None)
        parts_of: dict[str, list[str]] = {}
        for part, names in zip(session.opening.route, holders, strict=True):
            for name in names or ([anybody] if anybody is not None else []):
                parts_of.setdefault(name, []).append(part)
        for name, parts in parts_of.items():
            actions.append(ForwardEnd(name, session_id, edge.key, parts))
        return actions

    def _holders_of(self, session: SessionRecord) -> list[list[str]]:
        """Workers that have something of a session, by hop: warm ones, and those with its steps."""
        warm = [session.warm_worker(hop) for hop in range(len(session.opening.route))]
        names = [[worker.name] if worker is not None else [] for worker in warm]
        for record in session.steps:
            at_it = [record.worker_id, *record.late_on]
            names[record.hop] += [n for n in at_it if n in self.workers]
        return [list(dict.fromkeys(each)) for each in names]

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
        return actions + self._dispatcher.dispatch_to(worker, now)

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
        return actions + self._dispatcher.dispatch_to(worker, now)

    def _join_pools(self, worker: Worker, now: float) -> list[Action]:
        actions: list[Action] = []
        for service in dict.fromkeys(map(service_key, worker.announce.services)):
            pool = self._book.pool_of(service)
            pool.gone_at = None
            pool.add(worker)
            for other in self._book.pools_of_part[service[:2]]:
                actions += self._dispatcher.rehome(other, now)
        return actions

    def _leave_pools(self, worker: Worker, now: float) -> list[Action]:
        """A worker serves nothing any more; what waited for it is queued for the others."""
        actions: list[Action] = []
        for pool in list(worker.pools):
            self._dispatcher.queue_for_all(pool, pool.remove(worker))
            if not pool.workers:
                pool.gone_at = now
            actions += self._dispatcher.rehome(pool, now) + self._dispatcher.dispatch_from(
                pool, now
            )
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
        return self._dispatcher.dispatch_to(worker, now) if was_quiet else []

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
            return self._dispatcher.dispatch_to(worker, now)
        if answer.precision not in ("", record.pool.key[2]):
            why = f"answers in {answer.precision}, which it does not serve"
            return self._fail(record, worker, why, now)
        session = self.sessions[record.step.session_id]
        if isinstance(answer, StepReply) and record.hop + 1 < len(session.opening.route):
            if answer.rows != record.step.rows:
                why = f"answers {answer.rows} rows of {record.step.rows}; the next part needs all"
                return self._fail(record, worker, why, now)
            cancelled = self._count_answer(record, session, worker, answer, now)
            # cancelled first: who is late at one part may get the same step at the next
            actions = [*cancelled, *self._pass_on(record, session, answer, body_bytes, now)]
        else:
            cancelled = self._count_answer(record, session, worker, answer, now)
            behind = self._book.drop_record(record)
            actions = [Answer(record.edge.address, answer.key), Forget(answer.key), *cancelled]
            if isinstance(answer, Need):  # the edge begins anew, at what is lacking
                actions += self._dispatcher.remove_behind(record, behind, _tell_overtaken)
            else:
                actions += self._dispatcher.hand_out(session, now)
        return [*actions, *self._dispatcher.dispatch_to(worker, now)]

    def _count_answer(
        self,
        record: StepRecord,
        session: SessionRecord,
        worker: Worker,
        answer: StepReply | Need,
        now: float,
    ) -> list[Action]:
        """A worker has computed a step, or said what it lacks: no other need do it."""
        if isinstance(answer, StepReply):
            record.learn_demand(answer)
        self.counters["answers"] += 1
        worker.steps_done += 1
        session.workers[record.hop], session.precision = worker, record.pool.key[2]
        self._book.see(record.step.session_id, session, now)
        if record.worker is None:  # it had been taken back, and an earlier worker was first
            self._dispatcher.take_from_queue(record)
        record.pool.learn_time(now - record.sent_at)
        if record.late_on or record.worker is not worker:
            return self._dispatcher.cancel_at_all(record, but=worker.name)
        return []

    def _pass_on(
        self,
        record: StepRecord,
        session: SessionRecord,
        answer: StepReply,
        body_bytes: int,
        now: float,
    ) -> list[Action]:
        """What one part has computed is a step for the next, and the one behind it may follow."""
        opening = session.opening
        assert isinstance(opening, Opening)
        if opening.exact and record.hop == 0:
            record.units = [part.shape[0] for part in record.step.parts]
        rows = [Part(opening.between, [answer.rows], body_bytes)]
        self._ledger.drop_step(record.account, record.body_bytes)
        self._ledger.add_step(record.account, body_bytes)
        record.pass_on(structs.replace(record.step, parts=rows), answer, body_bytes, now)
        record.blame(session.suspect)
        record.pool = self._book.pool_of(self._book.choose_anew(record).key)
        record.is_held = True
        return [PassOn(record.step), *self._dispatcher.hand_out(session, now)]

    def on_dropped(self, dropped: StepDropped, now: float) -> list[Action]:
        """A worker confirms that it does not compute a step (any more): it has room again."""
        worker = self._hear_worker(dropped.worker_id, now)
        record = self._take_in_flight(dropped.key, worker, dropped.attempt)
        if record is None or record.late_on.pop(dropped.worker_id, None) is not None:
            return self._dispatcher.dispatch_to(worker, now)
        # a newer step of the session reached it by another broker
        record.worker = None
        gone = self._dispatcher.remove(record, _tell_overtaken)
        return [*gone, *self._dispatcher.dispatch_to(worker, now)]

    def on_failed(self, failed: StepFailed, now: float) -> list[Action]:
        """A worker could not compute a step: another one tries, up to `max_attempts` in all."""
        worker = self._hear_worker(failed.worker_id, now)
        record = self._take_in_flight(failed.key, worker, failed.attempt)
        if worker is None or record is None:
            self.counters["late_answers"] += 1
            return self._dispatcher.dispatch_to(worker, now)
        return self._fail(record, worker, failed.reason, now)

    def _fail(self, record: StepRecord, worker: Worker, reason: str, now: float) -> list[Action]:
        """A worker's answer is no good: another one tries, unless one is at it already."""
        actions: list[Action] = []
        if record.late_on.pop(worker.name, None) is None:
            record.failures.append((worker.name, reason))
            self._dispatcher.take_back(record, now)
            actions = self._begin_anew(record) or self._dispatcher.try_elsewhere(record, now)
        return actions + self._dispatcher.dispatch_to(worker, now)

    def _begin_anew(self, record: StepRecord) -> list[Action]:
        """All attempts at a part have failed: perhaps what the part before gave is no good.

        Once for a step, and if another worker serves that part, the edge is asked for it again.
        """
        session, hop = self.sessions[record.step.session_id], record.hop - 1
        before = session.warm_worker(hop)
        is_asked = session.suspect is not None and session.suspect.key == record.step.key
        if before is None or is_asked or record.tries < self._dispatcher.max_attempts:
            return []
        if len(self._book.pools_on(session.opening, session.precision)[hop].workers) < 2:
            return []
        session.suspect = Suspect(record.step.key, hop, before.name)
        del session.workers[hop]
        note = f"nobody could use what worker {before.name} has computed; asking for the step again"
        gone = self._dispatcher.remove(record, _ask_anew(record))
        return [Note(note, is_warning=True), *gone]

    def on_drain(self, worker_id: str, peer: Peer, now: float) -> list[Action]:
        """A worker wants to leave: it gets nothing new."""
        worker = self.workers.get(worker_id)
        accepted: list[Action] = [AcceptDrain(peer.address)]
        if worker is None or worker.draining:
            return accepted
        worker.draining = True
        worker.settle()
        rerouted = self._dispatcher.release_backlogs(worker, now)
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
                self._dispatcher.take_back(record, now)
                homeless.append(record)
                if blame_steps:
                    # a pool that is killed as a whole does not end in one instant
                    record.wait_until = now + SETTLE_S if record.tries > 1 else 0.0
                    record.failures.append((name, reasons[name]))
                else:
                    record.attempts -= 1
        for record in homeless:
            if self.steps.get(record.step.key) is not record:
                continue  # one before it was refused, which took it along
            if blame_steps:
                actions += self._dispatcher.try_elsewhere(record, now)
            else:
                actions += self._dispatcher.route(record, now, has_waited=True)
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
        for record in self._while_here(lambda record: now >= record.deadline_at):
            actions += self._dispatcher.refuse(record, "deadline", self._why_late(record, now))
        for record in self._while_here(lambda record: record.is_left(now)):
            actions += self._dispatcher.remove(record)
        actions += self._dispatcher.look_after_late_workers(now)
        for key, record in list(self._dispatcher.settling.items()):
            if now >= record.wait_until:
                del self._dispatcher.settling[key]
                record.wait_until = 0.0
                actions += self._dispatcher.route(record, now, has_waited=True)
        for service, pool in list(self.pools.items()):
            if not pool.workers:
                actions += self._unserved.look_after(service, pool, now)
        self._forget_silent_sessions(now)
        self._book.sample_demand(now)
        return actions

    def _while_here(self, is_meant: Callable[[StepRecord], bool]) -> Iterator[StepRecord]:
        """Steps of that kind; what becomes of one may take those along that go on from it."""
        for record in [record for record in self.steps.values() if is_meant(record)]:
            if record.step.key in self.steps:
                yield record

    def _forget_silent_sessions(self, now: float) -> None:
        while self.sessions:
            session_id, session = next(iter(self.sessions.items()))
            if now - session.seen_at <= SESSION_MEMORY_S:
                return
            if session.steps:
                self._book.see(session_id, session, now)
            else:
                self._book.forget_session(session_id)

    # --- decisions

    def _silence_limit_s(self, worker: Worker) -> float:
        """A worker that beats slowly, as it says, is not taken for dead between two beats."""
        wanted_s = MISSED_AT_LEAST * worker.announce.heartbeat_ms / 1000
        return max(self.silence_s, min(wanted_s, SILENCE_AT_MOST_S))

    def _refuse_at_once(
        self, key: StepKey, is_new: bool, edge: Peer, account: Account, body_bytes: int
    ) -> Action | None:
        if is_new and self._ledger.has_all_sessions(account):
            self.counters["refused"] += 1
            limit = self._ledger.limits.sessions_per_edge
            why = f"this edge has {limit} sessions open; end some first"
            return Refuse(edge.address, key, "invalid", why)
        if self.is_full or not self._ledger.has_room(account, body_bytes):
            self.counters["busy"] += 1
            return TellBusy(edge.address, key, BUSY_RETRY_MS)
        return None

    def _why_late(self, record: StepRecord, now: float) -> str:
        if record.worker is not None:
            where = f"in flight on worker {record.worker_id}"
        elif record.pool.workers or record.is_held:
            where = "still queued"
        else:
            where = self._book.why_no_worker(record.pool.key)
        failures = "".join(f"; worker {w}: {reason}" for w, reason in record.failures)
        return (
            f"the step's deadline passed after {now - record.arrived_at:.1f} s, {where}{failures}"
        )

    def _abandon_older(self, session: SessionRecord | None) -> list[Action]:
        """The edge has moved on: older steps of its session need no answer."""
        if session is None or not session.steps:
            return []
        return self._dispatcher.remove(session.steps[0])

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


def _tell_overtaken(record: StepRecord) -> Refuse:
    """A step will not be computed: another one comes instead of it, or did."""
    why = "a newer step of this session has arrived, or is asked for"
    return Refuse(record.edge.address, record.step.key, "stale", why)


def _ask_anew(first: StepRecord) -> Tell:
    """Ask for a step, and for those behind it as far as nobody has begun to compute them.

    A worker may still answer one that it had, or confirm that it dropped it; edges ask for what is
    lacking from there on with steps of other numbers.
    """
    asks = True

    def tell(record: StepRecord) -> Action:
        nonlocal asks
        asks = asks and (record is first or not record.attempts)
        if asks:
            return AskStep(record.edge.address, record.step.key)
        return _tell_overtaken(record)

    return tell


def _is_alike(opening: AnyOpening, other: AnyOpening) -> bool:
    """Whether they say the same, or would once both know the precision of the workers."""
    return opening is other or structs.replace(opening, precision=other.precision) == other


def _why_wrong(step: Step, opening: AnyOpening) -> str:
    """What no worker could make sense of; empty if nothing is wrong."""
    if isinstance(opening, Opening):
        if step.rows > MAX_STEP_ROWS:
            return f"the step has {step.rows} rows; at most {MAX_STEP_ROWS}"
        if opening.exact and len(step.parts) > MAX_EXACT_PARTS:
            return (
                f"the step has {len(step.parts)} parts, and its session is exact; "
                f"at most {MAX_EXACT_PARTS}"
            )
        if len(opening.route) > 1 and opening.between >= len(opening.codecs):
            return f"the route has a codec beyond the {len(opening.codecs)} that it opened"
        if len(opening.route) > 1 and not _is_in_a_row(opening.route):
            return f"the route {', '.join(opening.route)} is not one span after another"
    return ""


def _is_in_a_row(route: list[str]) -> bool:
    """Whether each span begins where the one before ends; a worker keeps one KV for each."""
    spans = [read_span(part) for part in route]
    return are_joined(spans) and all(span.first < span.last for span in spans)
