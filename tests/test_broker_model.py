"""A broker's decisions against thousands of random events: nothing is lost, kept or counted twice.

Edges, workers and the links between them are a few lines each here, links keep the order of what
they carry, and whatever may happen does: workers die, pause, leave, drain, lack rows, fail, lie and
come back under their names; edges end, cut back, ask again and move on; the broker starts anew.
After each event the broker's books are compared with each other, and in the end with nothing.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field

import pytest

from broker.actions import (
    Action,
    Answer,
    AskOpening,
    AskStep,
    Cancel,
    Dispatched,
    Forget,
    ForwardEnd,
    PassOn,
    Refuse,
    TellBusy,
)
from broker.peer import Peer
from broker.state import BrokerState
from common.protocol.messages import (
    Announce,
    AskAgain,
    Need,
    Opening,
    Part,
    Service,
    Step,
    StepDropped,
    StepFailed,
    StepKey,
    StepReply,
)

MODEL = "f" * 16
PARTS = ["2-3", "3-5", "5-6"]
SERVES = [[0], [1], [2], [0, 1], [1, 2], [0, 2], [0, 1, 2], [0], [1], [2]]
PIECES, PIECES_AHEAD, PIECE_ROWS = 10, 5, 4
ROUNDS = 1500
# the last two: a step that its worker's death refuses, and one behind it that this death sets free
SEEDS = (0, 1, 2, 3, 49, 246)


@dataclass(eq=False)
class FakeWorker:
    name: str
    parts: list[int]
    peer: Peer
    capacity: int
    inbox: deque[Action] = field(default_factory=deque)
    outbox: deque[object] = field(default_factory=deque)
    tasks: dict[tuple[int, bytes], tuple[Dispatched, Step]] = field(default_factory=dict)
    is_paused: bool = False
    is_draining: bool = False

    def announce(self) -> Announce:
        services = [Service(MODEL, "m", PARTS[i], 8, "float32") for i in self.parts]
        return Announce(self.name, services, self.capacity, 100)


@dataclass(eq=False)
class FakeEdge:
    """A session whose prompt goes in pieces, several on their way at once."""

    session_id: bytes
    peer: Peer
    route: list[int]
    inbox: deque[object] = field(default_factory=deque)
    waits: dict[StepKey, Step] = field(default_factory=dict)  # oldest first
    again: list[StepKey] = field(default_factory=list)  # told that it is busy
    generation: int = 0
    number: int = 0
    position: int = 0
    is_done: bool = False

    @property
    def opening(self) -> Opening:
        return Opening(MODEL, [PARTS[i] for i in self.route], 8, ["int8"], "")


class World:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 100.0
        self.names = self.sessions_made = self.connections = 0
        self.workers: dict[str, FakeWorker] = {}
        self.edges: list[FakeEdge] = []
        self.is_calm = False
        self.seen: Counter[str] = Counter()
        self.start_broker()
        for parts in ([0], [1], [2], [0, 1, 2], [1, 2]):
            self.add_worker(parts)

    # --- the broker and what its server does

    def start_broker(self) -> None:
        self.state = BrokerState(started_at=self.now, silence_s=0.5, max_queued_steps=40)
        self.frames: dict[StepKey, Step] = {}

    def perform(self, actions: list[Action], answer: object = None) -> None:
        for action in actions:
            self.seen[type(action).__name__] += 1
            match action:
                case Dispatched(worker_id, key):
                    if self.state.is_current(action):
                        worker = self.workers[worker_id]
                        hop = self.state.steps[key].hop
                        step = self.frames[key]
                        assert step == self.state.steps[key].step
                        opening = self.state.sessions[key[0]].opening
                        worker.inbox.append((action, hop, step, opening))
                case Cancel(worker_id) | ForwardEnd(worker_id):
                    if worker_id in self.workers:
                        self.workers[worker_id].inbox.append(action)
                case PassOn(step):
                    self.frames[step.key] = step
                case Forget(key):
                    self.frames.pop(key, None)
                case Answer(edge_id, key):
                    assert answer is not None
                    assert answer.key == key
                    self.tell(key, edge_id, answer)
                case Refuse(edge_id, key) | AskOpening(edge_id, key) | AskStep(edge_id, key):
                    self.tell(key, edge_id, action)
                case TellBusy(edge_id, key):
                    self.tell(key, edge_id, action)

    def tell(self, key: StepKey, edge_id: bytes, what: object) -> None:
        for edge in self.edges:
            if edge.session_id == key[0] and edge.peer.address == edge_id:
                edge.inbox.append(what)

    # --- workers

    def add_worker(self, parts: list[int], name: str = "") -> None:
        self.names += 1
        self.connections += 1
        name = name or f"w{self.names}"
        peer = Peer(f"at-{self.connections}".encode(), "", self.connections)
        self.workers[name] = FakeWorker(name, parts, peer, self.random.choice([1, 2, 4]))
        self.announce(self.workers[name])

    def announce(self, worker: FakeWorker) -> None:
        self.perform(self.state.on_announce(worker.announce(), worker.peer, self.now))

    def worker_reads(self, worker: FakeWorker) -> None:
        message = worker.inbox.popleft()
        if isinstance(message, Cancel):
            for at in [at for at, (d, _) in worker.tasks.items() if d.key == message.key]:
                del worker.tasks[at]
            worker.outbox.append(StepDropped(*message.key, message.attempt, worker.name))
        elif isinstance(message, ForwardEnd):
            for at in [at for at in worker.tasks if at[1] == message.session_id]:
                self.worker_drops(worker, at)
        else:
            action, hop, step, opening = message
            if opening.route[hop] not in [PARTS[part] for part in worker.parts]:
                why = "not mine"
                worker.outbox.append(StepFailed(*action.key, action.attempt, worker.name, why))
                return
            at = (PARTS.index(opening.route[hop]), action.key[0])
            known = worker.tasks.get(at)
            if known is not None and known[0].key != action.key:
                if known[0].key > action.key:
                    worker.outbox.append(StepDropped(*action.key, action.attempt, worker.name))
                    return
                self.worker_drops(worker, at)
            worker.tasks[at] = (action, step)

    def worker_drops(self, worker: FakeWorker, at: tuple[int, bytes]) -> None:
        action, _ = worker.tasks.pop(at)
        worker.outbox.append(StepDropped(*action.key, action.attempt, worker.name))

    def worker_computes(self, worker: FakeWorker) -> None:
        at = self.random.choice(list(worker.tasks))
        action, step = worker.tasks.pop(at)
        key, attempt, name = action.key, action.attempt, worker.name
        dice = 1.0 if self.is_calm else self.random.random()
        if dice < 0.06:
            have = self.random.choice([0, step.position, step.end, step.end + 9, 1])
            worker.outbox.append(Need(*key, attempt, have, [], name, "float32"))
        elif dice < 0.16:
            worker.outbox.append(StepFailed(*key, attempt, name, "boom"))
        elif dice < 0.18:
            worker.outbox.append(StepReply(*key, attempt, step.rows + 1, 0, name, 0, 0, "float32"))
        elif dice < 0.20:
            worker.outbox.append(StepDropped(*key, attempt, name))
        elif dice < 0.22:
            worker.outbox.append(StepReply(*key, attempt, step.rows, 0, name, 0, 0, "int3"))
        else:
            worker.outbox.append(StepReply(*key, attempt, step.rows, 0, name, 0, 0, "float32"))
            if dice < 0.3:  # says it twice
                worker.outbox.append(worker.outbox[-1])

    def worker_lies(self, worker: FakeWorker) -> None:
        """About any step that there is, or was."""
        keys = list(self.state.steps) or [(b"x" * 16, 0, 0)]
        key, attempt = self.random.choice(keys), self.random.randint(0, 5)
        kind = self.random.randrange(4)
        name = worker.name
        worker.outbox.append(
            [
                Need(*key, attempt, 3, [], name),
                StepReply(*key, attempt, PIECE_ROWS, 0, name, 0, 0),
                StepDropped(*key, attempt, name),
                StepFailed(*key, attempt, name, "lie"),
            ][kind]
        )

    def worker_says(self, worker: FakeWorker) -> None:
        message = worker.outbox.popleft()
        state, now = self.state, self.now
        if state.check_sender(message.worker_id, worker.peer) is not None:
            return
        if isinstance(message, StepReply | Need):
            self.perform(state.on_answer(message, now, self.random.randint(0, 50)), message)
        elif isinstance(message, StepFailed):
            self.perform(state.on_failed(message, now))
        else:
            self.perform(state.on_dropped(message, now))

    def lose(self, names: list[str]) -> None:
        """Their connections end at once; some come back under their names."""
        lost = [self.workers.pop(name) for name in names]
        self.perform(self.state.on_disconnected({w.peer.connection for w in lost}, self.now))
        for worker in lost:
            if self.random.random() < 0.8:
                name = worker.name if self.random.random() < 0.5 else ""
                parts = worker.parts if self.random.random() < 0.7 else self.random.choice(SERVES)
                self.add_worker(parts, name)

    # --- edges

    def add_edge(self) -> None:
        self.sessions_made += 1
        route = self.random.choice([[0, 1, 2], [0, 1, 2], [0, 1], [1, 2], [1]])
        peer = self.random.choice([Peer(b"e1", "", 10_001), Peer(b"e2", "", 10_002)])
        self.edges.append(FakeEdge(self.sessions_made.to_bytes(16, "big"), peer, route))

    def send(self, edge: FakeEdge, step: Step, with_opening: bool) -> None:
        known = step.key in self.state.steps
        opening = edge.opening if with_opening else None
        actions = self.state.on_step(step, opening, edge.peer, 12, self.now)
        if not known and step.key in self.state.steps:
            self.frames[step.key] = step
        self.perform(actions)

    def edge_sends(self, edge: FakeEdge) -> None:
        """The next piece."""
        part = Part(0, [PIECE_ROWS], 12)
        deadline_ms = 60_000 if self.is_calm else self.random.choice([300, 2000, 60_000, 60_000])
        step = Step(
            edge.session_id, edge.generation, 0, edge.number, edge.position, [part],
            PIECE_ROWS, 0, deadline_ms,
        )  # fmt: skip
        edge.number += 1
        edge.position += PIECE_ROWS
        edge.waits[step.key] = step
        self.send(edge, step, self.random.random() < 0.5)

    def edge_begins_at(self, edge: FakeEdge, position: int) -> None:
        edge.waits.clear()
        edge.again.clear()
        edge.position = max(0, min(position, edge.position))

    def edge_reads(self, edge: FakeEdge) -> None:
        message = edge.inbox.popleft()
        key = message.key
        step = edge.waits.get(key)
        if step is None:
            return
        if isinstance(message, StepReply):
            del edge.waits[key]
        elif isinstance(message, Need):
            self.edge_begins_at(edge, min(message.have, step.position))
        elif isinstance(message, AskOpening):
            self.send(edge, step, True)
        elif isinstance(message, AskStep):
            self.send(edge, step, False)
        elif isinstance(message, TellBusy):
            edge.again.append(key)
        elif self.random.random() < 0.3:  # the same again
            self.send(edge, step, True)
        else:
            self.edge_begins_at(edge, step.position)

    def edge_acts(self, edge: FakeEdge) -> None:
        dice = 1.0 if self.is_calm else self.random.random()
        if dice < 0.01:
            self.perform(self.state.on_end(edge.session_id, edge.peer))
            self.edges.remove(edge)
        elif dice < 0.03:
            edge.generation += 1
            self.edge_begins_at(edge, self.random.randint(0, edge.position))
        elif dice < 0.04:
            edge.route = self.random.choice([[0, 1, 2], [0, 1], [1, 2], [1]])
        elif dice < 0.05:
            self.connections += 1
            edge.inbox.clear()
            edge.peer = Peer(b"e%d" % self.connections, "", 10_000 + self.connections)
        elif edge.again and self.random.random() < 0.5:
            key = edge.again.pop()
            if key in edge.waits:
                self.send(edge, edge.waits[key], self.random.random() < 0.5)
        elif edge.waits and self.random.random() < 0.3:
            key = self.random.choice(list(edge.waits))
            self.perform(self.state.on_ask_again(AskAgain(*key), edge.peer, self.now))
        elif len(edge.waits) < PIECES_AHEAD and edge.position < PIECES * PIECE_ROWS:
            self.edge_sends(edge)
        elif not edge.waits and not self.is_calm:
            self.perform(self.state.on_end(edge.session_id, edge.peer))
            self.edges.remove(edge)

    # --- time

    def tick(self, passed_s: float) -> None:
        self.now += passed_s
        for worker in self.workers.values():
            if not worker.is_paused:
                self.announce(worker)
        self.perform(self.state.on_tick(self.now))
        for name in list(self.workers):  # a zombie that wakes up is announced anew
            if name not in self.state.workers and not self.workers[name].is_paused:
                self.announce(self.workers[name])

    def happen(self) -> None:
        dice = self.random.random()
        workers = list(self.workers.values())
        if dice < 0.25 and self.edges:
            self.edge_acts(self.random.choice(self.edges))
        elif dice < 0.40:
            edges = [edge for edge in self.edges if edge.inbox]
            if edges:
                self.edge_reads(self.random.choice(edges))
        elif dice < 0.55:
            ready = [w for w in workers if w.inbox and not w.is_paused]
            if ready:
                self.worker_reads(self.random.choice(ready))
        elif dice < 0.70:
            ready = [w for w in workers if w.tasks and not w.is_paused]
            if ready:
                self.worker_computes(self.random.choice(ready))
        elif dice < 0.88:
            ready = [w for w in workers if w.outbox and not w.is_paused]
            if ready:
                self.worker_says(self.random.choice(ready))
        elif dice < 0.93 or self.is_calm:
            self.tick(self.random.choice([0.01, 0.05, 0.1, 0.1, 0.4, 0.4, 0.4, 2.5]))
        elif dice < 0.94 and workers:
            count = self.random.choice([1, 1, 1, 2, len(workers)])
            self.lose([w.name for w in self.random.sample(workers, min(count, len(workers)))])
        elif dice < 0.95 and len(self.edges) < 5:
            self.add_edge()
        elif dice < 0.96 and workers:
            worker = self.random.choice(workers)
            worker.is_paused = not worker.is_paused
        elif dice < 0.97 and workers:
            self.worker_lies(self.random.choice(workers))
        elif dice < 0.975 and len(workers) < 8:
            self.add_worker(self.random.choice(SERVES))
        elif dice < 0.977 and workers:
            worker = self.random.choice(workers)
            self.perform(self.state.on_drain(worker.name, worker.peer, self.now))
            worker.is_draining = True
        elif dice < 0.98 and workers:
            worker = self.random.choice(workers)
            del self.workers[worker.name]
            self.perform(self.state.on_worker_gone(worker.name, "left", self.now))
            self.add_worker(worker.parts, worker.name)
        elif dice < 0.983 and self.edges:
            edge = self.random.choice(self.edges)
            ended = {edge.peer.connection}
            self.perform(self.state.on_edges_disconnected(ended, self.now))
        elif dice < 0.9835:
            self.start_broker()
        elif dice < 0.988 and workers:
            worker = self.random.choice(workers)
            if not worker.is_paused:
                worker.parts = self.random.choice(SERVES)
                self.announce(worker)

    # --- what must be true at any time

    def check(self) -> None:
        state = self.state
        queued: Counter[StepKey] = Counter(list(state._dispatcher.settling))
        for pool in state.pools.values():
            queued.update(pool.queued())
        assert set(queued) <= set(state.steps), "a step that is over waits"
        for key, record in state.steps.items():
            has = record.worker is not None
            assert queued[key] + has + record.is_held == 1, f"{key} {queued[key]} {has}"
            if record.worker is not None:
                assert state.workers[record.worker.name] is record.worker
                assert key in record.worker.in_flight
            for name in record.late_on:
                assert name in state.workers
            session = state.sessions[key[0]]
            assert any(each is record for each in session.steps)
        of_sessions = [r for session in state.sessions.values() for r in session.steps]
        assert len(of_sessions) == len(state.steps)
        for session in state.sessions.values():
            hops = [(r.hop, r.is_held) for r in session.steps]
            for i, (hop, is_held) in enumerate(hops):
                is_behind = i > 0 and hops[i - 1][0] <= hop
                assert is_held == is_behind, f"{hops}"
                assert i == 0 or hops[i - 1][0] >= hop
        steps, sizes = Counter[str](), Counter[str]()
        for record in state.steps.values():
            steps[record.account] += 1
            sizes[record.account] += record.body_bytes
        ledger = state._ledger
        assert ledger._steps == len(state.steps)
        assert ledger._body_bytes == sum(sizes.values())
        for account in ledger._accounts.values():
            assert (account.steps, account.body_bytes) == (steps[account], sizes[account])
        sessions = Counter(session.account for session in state.sessions.values())
        assert {a: a.sessions for a in ledger._accounts.values() if a.sessions} == dict(sessions)
        assert ledger._with_sessions == len(sessions)
        for worker in state.workers.values():
            counts = Counter(flight.account.name for flight in worker.in_flight.values())
            assert worker._of_account == dict(counts)
        assert set(self.frames) == set(state.steps), "frames of other steps than there are"

    def come_to_rest(self) -> None:
        """With honest workers for all parts every step that an edge waits for is answered."""
        self.is_calm = True
        for worker in list(self.workers.values()):
            worker.is_paused = False
        self.lose([w.name for w in self.workers.values() if w.is_draining])
        for name in list(self.workers):
            if self.workers[name].is_draining:
                self.workers[name].is_draining = False
        self.add_worker([0, 1, 2])
        self.tick(0.1)
        for _ in range(30_000):
            self.happen()
            self.check()
            done = all(not e.waits and e.position >= PIECES * PIECE_ROWS for e in self.edges)
            if done and not any(w.inbox or w.outbox or w.tasks for w in self.workers.values()):
                break
        else:
            left = [(e.session_id[-1], list(e.waits), e.position) for e in self.edges]
            records = {k[1:]: (r.worker_id, r.hop, r.is_held) for k, r in self.state.steps.items()}
            raise AssertionError(f"no rest: {left} {records}")
        for edge in list(self.edges):
            self.perform(self.state.on_end(edge.session_id, edge.peer))
        for _ in range(3000):
            for worker in list(self.workers.values()):
                if worker.inbox:
                    self.worker_reads(worker)
                if worker.outbox:
                    self.worker_says(worker)
        for _ in range(100):  # steps of edges that are gone are left
            self.tick(0.4)
            for worker in list(self.workers.values()):
                while worker.inbox or worker.tasks or worker.outbox:
                    if worker.inbox:
                        self.worker_reads(worker)
                    elif worker.tasks:
                        self.worker_computes(worker)
                    else:
                        self.worker_says(worker)
        leaked = {w.name: list(w.in_flight) for w in self.state.workers.values() if w.in_flight}
        assert leaked == {}, f"workers count as busy: {leaked}"


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_happens_no_step_is_lost_or_kept(seed: int) -> None:
    world = World(seed)
    for _ in range(ROUNDS):
        world.happen()
        world.check()
    world.come_to_rest()
    assert world.seen["Answer"] > 0
    assert world.seen["PassOn"] > 0
