"""The broker's shelves and queues: what holds after any events, and what a step costs."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs

from broker.actions import Action, Answer, Cancel, Dispatched, Refuse
from broker.peer import Peer
from broker.state import BrokerState
from common.protocol.messages import (
    Alive,
    Announce,
    Opening,
    Part,
    Service,
    Step,
    StepDropped,
    StepFailed,
    StepReply,
)

SERVICES = [Service("f" * 16, "m", "2-6", 8, name) for name in ("float32", "bfloat16")]
SERVICES.append(Service("a" * 16, "n", "unet", 0, "float32"))
STEP = Step(b"s" * 16, 0, 0, 0, 0, [Part(0, [1], 12)], 1, 0, 20_000)


class World:
    """A broker with workers and edges that do at random what such peers do."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 100.0
        self.state = BrokerState(started_at=0.0, silence_s=5.0)
        self.at_workers: list[Dispatched] = []  # sent there, not answered
        self.numbers: Counter[int] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.born = 0

    def peer_of(self, worker: str) -> Peer:
        return Peer(b"at-" + worker.encode(), connection=1000 + int(worker[1:]))

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Dispatched):
                self.at_workers.append(action)
            elif isinstance(action, Cancel) and self.rng.random() < 0.8:
                dropped = StepDropped(*action.key, action.attempt, action.worker_id)
                self.perform(self.state.on_dropped(dropped, self.now))
            elif isinstance(action, Answer):
                self.outcomes["answer"] += 1
            elif isinstance(action, Refuse):
                self.outcomes[action.code] += 1

    def join(self) -> None:
        name = f"w{self.born}"
        self.born += 1
        services = self.rng.sample(SERVICES, self.rng.randint(1, 3))
        announce = Announce(name, services, self.rng.randint(1, 5), 100)
        self.perform(self.state.on_announce(announce, self.peer_of(name), self.now))

    def ask(self) -> None:
        session = self.rng.randrange(40)
        edge = Peer(b"edge-%d" % (session % 4), connection=session % 4)
        self.numbers[session] += self.rng.random() < 0.9
        service = SERVICES[0] if session % 3 else SERVICES[2]
        opening = Opening(service.model, [service.part], service.hidden, ["int8"], "")
        step = structs.replace(
            STEP, session_id=session.to_bytes(16, "big"), step=self.numbers[session],
            deadline_ms=self.rng.choice((500, 20_000)),
            shun=f"w{self.born - 1}" if self.rng.random() < 0.02 else "",
        )  # fmt: skip
        self.perform(self.state.on_step(step, opening, edge, 12, self.now))

    def answer(self) -> None:
        if not self.at_workers:
            return
        sent = self.at_workers.pop(self.rng.randrange(len(self.at_workers)))
        reply = StepReply(*sent.key, sent.attempt, 1, 0, sent.worker_id, 0, 0)
        self.perform(self.state.on_answer(reply, self.now))

    def fail(self) -> None:
        if not self.at_workers:
            return
        sent = self.at_workers.pop(self.rng.randrange(len(self.at_workers)))
        failed = StepFailed(*sent.key, sent.attempt, sent.worker_id, "boom")
        self.perform(self.state.on_failed(failed, self.now))

    def lose(self) -> None:
        for name in self.rng.sample(sorted(self.state.workers), min(1, len(self.state.workers))):
            way = self.rng.randrange(3)
            if way == 0:
                peer = self.peer_of(name)
                self.perform(self.state.on_disconnected({peer.connection}, self.now))
            elif way == 1:
                self.perform(self.state.on_worker_gone(name, "left", self.now))
            else:
                self.perform(self.state.on_drain(name, self.peer_of(name), self.now))

    def end(self) -> None:
        for session_id in self.rng.sample(list(self.state.sessions), min(1, self.sessions)):
            edge = self.state.sessions[session_id].edge
            self.perform(self.state.on_end(session_id, edge))

    def pass_time(self) -> None:
        self.now += self.rng.choice((0.01, 0.1, 1.0))
        for name in list(self.state.workers):
            if self.rng.random() < 0.8:
                alive = Alive(name, bytes(16))
                self.perform(self.state.on_alive(alive, self.peer_of(name), self.now))
        self.perform(self.state.on_tick(self.now))

    @property
    def sessions(self) -> int:
        return len(self.state.sessions)

    def check(self) -> None:
        """What must hold between any two events."""
        state = self.state
        places: Counter[Any] = Counter(list(state._dispatcher.settling))
        for pool in state.pools.values():
            places.update(pool.queued())
            for load, shelf in enumerate(pool._shelves):
                for worker in shelf:
                    assert len(worker.in_flight) == load
                    assert worker.is_open
                    assert worker.name in state.workers
            shelved = {worker for shelf in pool._shelves for worker in shelf}
            assert shelved == set(pool._load)
            assert shelved | set(pool._late) >= {w for w in pool.workers.values() if w.is_open}
            assert set(pool.workers) <= set(state.workers)
            assert set(pool.backlogs) <= set(pool.workers.values())
            if pool.waiting and shelved:  # only who fills a share may wait beside room
                for account in pool.waiting.accounts():
                    alone = state._book.ledger.is_alone(account)
                    shunned = {state.steps[key].step.shun for key in pool.waiting}
                    free = [w for w in shelved if w.is_fresh(self.now) and w.name not in shunned]
                    blocked = [w for w in free if not w.has_place_for(account, alone)]
                    assert free == blocked
        waiting = {key for key, record in state.steps.items() if record.worker is None}
        assert dict(places) == dict.fromkeys(waiting, 1)
        for record in state.steps.values():
            if record.worker is not None:
                assert not record.worker.is_gone
                assert record.step.key in record.worker.in_flight
        for worker in state.workers.values():
            counted = Counter(flight.account.name for flight in worker.in_flight.values())
            assert counted == worker._of_account
        assert sum(a.steps for a in state._book.ledger._accounts.values()) == len(state.steps)
        assert sum(a.sessions for a in state._book.ledger._accounts.values()) == self.sessions

    def settle(self) -> None:
        """Let everything that is on its way come to its end."""
        self.join()
        for _ in range(400):
            self.answer()
            self.now += 0.1
            for name in list(self.state.workers):
                alive = Alive(name, bytes(16))
                self.perform(self.state.on_alive(alive, self.peer_of(name), self.now))
            self.perform(self.state.on_tick(self.now))


@pytest.mark.parametrize("seed", range(12))
def test_shelves_and_queues_hold_through_any_events(seed: int) -> None:
    world = World(seed)
    events: list[tuple[Callable[[], None], float]] = [
        (world.ask, 12), (world.answer, 9), (world.pass_time, 2), (world.join, 0.3),
        (world.fail, 0.5), (world.lose, 0.25), (world.end, 0.5),
    ]  # fmt: skip
    kinds, weights = zip(*events, strict=True)
    for event in world.rng.choices(kinds, weights, k=1500):
        event()
        world.check()
    world.settle()
    world.check()
    assert world.state.steps == {}, "a step was never answered and never refused"
    assert world.outcomes["answer"] > 200


def calls_of_steps(workers: int, sessions: int, services: int) -> float:
    """How many functions a session's first two steps call, with their answers, on average."""
    state = BrokerState(started_at=-100.0, silence_s=1e6)
    offered = [Service(f"{n:016}", "m", "2-6", 8, "float32") for n in range(services)]
    for number in range(workers):
        name = f"w{number}"
        announce = Announce(name, [offered[number % services]], 4, 100)
        state.on_announce(announce, Peer(name.encode()), 0.0)
    edges = [Peer(b"edge-%d" % (number % 50)) for number in range(sessions)]

    def run(round_: int) -> None:
        sent: list[Action] = []
        for number, edge in enumerate(edges):
            service = offered[number % services]
            opening = Opening(service.model, [service.part], 8, ["int8"], "")
            step = structs.replace(STEP, session_id=number.to_bytes(16, "big"), step=round_)
            sent += state.on_step(step, opening, edge, 12, 0.0)
        while sent:
            action = sent.pop()
            if isinstance(action, Dispatched):
                reply = StepReply(*action.key, action.attempt, 1, 0, action.worker_id, 0, 0)
                sent += state.on_answer(reply, 0.0)

    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        run(0)
        run(1)
    finally:
        sys.setprofile(None)
    assert not state.steps
    return calls / sessions


def test_a_step_costs_the_same_however_many_workers_sessions_and_services() -> None:
    few = calls_of_steps(workers=8, sessions=100, services=1)
    many = {
        "workers": calls_of_steps(workers=512, sessions=100, services=1),
        "sessions": calls_of_steps(workers=8, sessions=3000, services=1),
        "services": calls_of_steps(workers=64, sessions=800, services=64),
    }
    assert {name: calls <= 1.15 * few for name, calls in many.items()} == dict.fromkeys(
        many, True
    ), (few, many)
