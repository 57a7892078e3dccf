"""Steps of one session that go on from each other: the broker holds them and hands out one."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import zmq
from msgspec import structs
from test_broker_state import (
    EDGE,
    MODEL,
    OPENING,
    STEP,
    announce,
    arrive,
    make_state,
    reply,
    without_notes,
)

from broker.actions import (
    Action,
    Answer,
    AskStep,
    Cancel,
    Dispatched,
    Forget,
    ForwardEnd,
    PassOn,
    Refuse,
    TellBusy,
    TellPending,
)  # fmt: skip
from broker.server import BrokerServer
from broker.state import MAX_HELD, BrokerState
from common.protocol.messages import (
    Announce,
    AskAgain,
    Dispatch,
    Message,
    Need,
    Service,
    Step,
    StepDropped,
    StepFailed,
    StepPending,
    StepRefused,
)
from common.protocol.sockets import Context, connect_dealer
from common.protocol.wire import decode_header, encode_header

OVERTAKEN = "a newer step of this session has arrived, or is asked for"


def following(count: int) -> list[Step]:
    """A first step and those that go on from it, a row each."""
    return [structs.replace(STEP, step=number, position=number) for number in range(count)]


def bring(state: BrokerState, steps: list[Step]) -> list[Action]:
    return [action for step in steps for action in state.on_step(step, OPENING, EDGE, 12, now=0.1)]


def test_steps_that_go_on_from_each_other_are_handed_out_one_after_another() -> None:
    state = make_state("w1", "w2")
    steps = following(3)
    (first,) = bring(state, steps)
    assert isinstance(first, Dispatched)
    name = first.worker_id
    for step, next_step in zip(steps, [*steps[1:], None], strict=True):
        actions = state.on_answer(reply(name, step), now=0.5)
        wanted: list[Action] = [Answer(EDGE.address, step.key), Forget(step.key)]
        if next_step is not None:
            wanted.append(Dispatched(name, next_step.key, 1, 0))  # held is not queued
        assert actions == wanted
    assert state.steps == {}


def test_a_step_that_is_held_is_asked_for_and_there() -> None:
    state = make_state("w1")
    steps = following(2)
    bring(state, steps)
    held = steps[1]
    assert bring(state, [held]) == [TellPending(EDGE.address, held.key)]
    again = AskAgain(*held.key)
    assert state.on_ask_again(again, EDGE, now=9.0) == [TellPending(EDGE.address, held.key)]


def test_what_goes_on_from_a_step_that_lacks_rows_is_forgotten() -> None:
    state = make_state("w1")
    steps = following(3)
    bring(state, steps)
    need = Need(*steps[0].key, 1, 0, [], "w1")
    assert state.on_answer(need, now=0.2) == [
        Answer(EDGE.address, steps[0].key), Forget(steps[0].key),
        Forget(steps[1].key), Refuse(EDGE.address, steps[1].key, "stale", OVERTAKEN),
        Forget(steps[2].key), Refuse(EDGE.address, steps[2].key, "stale", OVERTAKEN),
    ]  # fmt: skip
    assert state.steps == {}


def test_what_goes_on_from_a_step_that_failed_is_refused_behind_it() -> None:
    state = make_state("w1", max_attempts=1)
    steps = following(3)
    bring(state, steps)
    actions = state.on_failed(StepFailed(*steps[0].key, 1, "w1", "boom"), now=0.2)
    refused = [action for action in actions if isinstance(action, Refuse)]
    assert [action.key for action in refused] == [step.key for step in steps]
    assert {action.code for action in refused} == {"failed"}
    first, *others = (action.reason for action in refused)
    assert others == [f"it goes on from a step that is refused: {first}"] * 2
    assert state.counters["refused"] == 3


def test_a_refused_step_may_come_again_with_those_behind_it() -> None:
    state = make_state("w1", max_attempts=1)
    steps = following(3)
    bring(state, steps)
    state.on_failed(StepFailed(*steps[0].key, 1, "w1", "boom"), now=0.2)
    assert bring(state, steps) == [Dispatched("w1", steps[0].key, 1, 0)]
    assert [record.is_held for record in state.steps.values()] == [False, True, True]


def test_when_a_step_is_asked_for_anew_those_behind_it_are_too() -> None:
    state = make_state()
    for name, part in (("a", "2-4"), ("b", "2-4"), ("c", "4-6")):
        arrive(state, Announce(name, [Service(MODEL, "m", part, 8, "float32")], 4, 100), 0.0)
    by_two = structs.replace(OPENING, route=["2-4", "4-6"])
    steps = following(3)
    for step in steps:
        state.on_step(step, by_two, EDGE, 12, 0.1)
    first = steps[0].key
    state.on_answer(reply("a", steps[0]), 0.2, 12)
    for attempt in (2, 3, 4):
        actions = state.on_failed(StepFailed(*first, attempt, "c", "boom"), 0.2)
    assert actions[1:] == [  # behind a note
        Forget(first), AskStep(EDGE.address, first),
        Forget(steps[1].key), Cancel("a", steps[1].key, 1, EDGE.key),
        Refuse(EDGE.address, steps[1].key, "stale", OVERTAKEN),
        Forget(steps[2].key), Refuse(EDGE.address, steps[2].key, "stale", OVERTAKEN),
    ]  # fmt: skip
    assert state.on_step(steps[0], None, EDGE, 12, 0.25) == [Dispatched("b", first, 1, 0)]


def state_of_two() -> tuple[BrokerState, list[Step]]:
    """Workers a and b of two parts, and three steps, of which a has the first."""
    state = make_state()
    for name, part in (("a", "2-4"), ("b", "4-6")):
        arrive(state, Announce(name, [Service(MODEL, "m", part, 8, "float32")], 4, 100), 0.0)
    by_two = structs.replace(OPENING, route=["2-4", "4-6"])
    steps = following(3)
    for step in steps:
        state.on_step(step, by_two, EDGE, 12, 0.1)
    return state, steps


def test_a_part_computes_a_step_while_the_next_part_has_the_one_before() -> None:
    state, (first, second, third) = state_of_two()
    handed = without_passing_on(state.on_answer(reply("a", first), 0.2, 12))
    assert handed == [Dispatched("b", first.key, 2, 0), Dispatched("a", second.key, 1, 0)]
    # what came out of a waits for b, and a has the third meanwhile
    assert without_passing_on(state.on_answer(reply("a", second), 0.3, 12)) == [
        Dispatched("a", third.key, 1, 0)
    ]
    assert state.steps[second.key].is_held
    assert state.on_answer(reply("b", first, attempt=2), 0.4) == [
        Answer(EDGE.address, first.key), Forget(first.key), Dispatched("b", second.key, 2, 0),
    ]  # fmt: skip
    assert without_passing_on(state.on_answer(reply("a", third), 0.5, 12)) == []
    assert state.on_answer(reply("b", second, attempt=2), 0.6) == [
        Answer(EDGE.address, second.key), Forget(second.key), Dispatched("b", third.key, 2, 0),
    ]  # fmt: skip
    state.on_answer(reply("b", third, attempt=2), 0.7)
    assert state.steps == {}
    assert not any(worker.in_flight for worker in state.workers.values())


def test_a_part_that_lacks_rows_takes_back_what_the_part_before_it_has_already() -> None:
    state, (first, second, third) = state_of_two()
    state.on_answer(reply("a", first), 0.2, 12)
    need = Need(*first.key, 2, 0, [], "b")
    assert state.on_answer(need, now=0.3) == [
        Answer(EDGE.address, first.key), Forget(first.key),
        Forget(second.key), Cancel("a", second.key, 1, EDGE.key),
        Refuse(EDGE.address, second.key, "stale", OVERTAKEN),
        Forget(third.key), Refuse(EDGE.address, third.key, "stale", OVERTAKEN),
    ]  # fmt: skip
    assert state.steps == {}
    again = structs.replace(first, step=3)  # the edge begins anew, and a has room for that
    assert state.on_step(again, None, EDGE, 12, 0.4) == [Dispatched("a", again.key, 1, 0)]
    assert state.on_answer(reply("a", second), 0.5, 12) == []  # was on its way
    assert list(state.steps) == [again.key]
    assert list(state.workers["a"].in_flight) == [again.key]


def test_a_part_that_lacks_rows_of_a_later_step_leaves_the_one_before_alone() -> None:
    state, (first, second, _) = state_of_two()
    state.on_answer(reply("a", first), 0.2, 12)
    state.on_answer(Need(*second.key, 1, 0, [], "a"), now=0.3)
    assert list(state.steps) == [first.key]
    assert state.on_answer(reply("b", first, attempt=2), 0.4) == [
        Answer(EDGE.address, first.key), Forget(first.key)
    ]  # fmt: skip


def test_the_worker_of_a_later_step_dies_and_each_step_goes_on_at_its_part() -> None:
    state, (first, second, _) = state_of_two()
    state.on_answer(reply("a", first), 0.2, 12)
    arrive(state, Announce("c", [Service(MODEL, "m", "2-4", 8, "float32")], 4, 100), 0.2)
    actions = without_notes(state.on_worker_gone("a", "left", 0.3))
    assert actions == [Dispatched("c", second.key, 1, 0)]
    assert state.steps[first.key].worker_id == "b"


def test_a_death_that_refuses_a_step_hands_out_none_behind_it() -> None:
    state = make_state()
    both = [Service(MODEL, "m", part, 8, "float32") for part in ("2-4", "4-6")]
    arrive(state, Announce("a", both, 4, 100), 0.0)
    by_two = structs.replace(OPENING, route=["2-4", "4-6"])
    first, second, _ = following(3)
    for step in (first, second):
        state.on_step(step, by_two, EDGE, 12, 0.1)
    state.on_answer(reply("a", first), 0.2, 12)
    for step, attempt in ((first, 2), (first, 3), (second, 1)):
        state.on_failed(StepFailed(*step.key, attempt, "a", "boom"), 0.2)
    assert list(state.workers["a"].in_flight) == [first.key, second.key]
    arrive(state, Announce("b", both, 4, 100), 0.9)
    actions = state.on_tick(1.0)  # a is silent
    assert [a.key for a in actions if isinstance(a, Refuse)] == [first.key, second.key]
    assert state.steps == {}
    for now in (2.0, 3.0):
        arrive(state, Announce("b", both, 4, 100), now)
        assert without_notes(state.on_tick(now)) == []
    assert not any(worker.in_flight for worker in state.workers.values())


def test_a_step_that_nobody_serves_until_its_deadline_is_told_so() -> None:
    state = make_state("w1", hold_s=100.0)
    bring(state, following(1))
    state.on_worker_gone("w1", "left", 0.2)
    refused = [a for a in state.on_tick(61.0) if isinstance(a, Refuse)]
    assert [a.code for a in refused] == ["deadline"]
    assert refused[0].reason.startswith("the step's deadline passed after 60.9 s, no worker serves")


def test_the_end_of_a_session_reaches_all_who_have_a_step_of_it() -> None:
    state, (first, second, _) = state_of_two()
    state.on_answer(reply("a", first), 0.2, 12)
    actions = state.on_end(first.session_id, EDGE)
    assert [a for a in actions if isinstance(a, ForwardEnd | Cancel)] == [
        Cancel("b", first.key, 2, EDGE.key), Cancel("a", second.key, 1, EDGE.key),
        ForwardEnd("a", first.session_id, EDGE.key, ["2-4"]),
        ForwardEnd("b", first.session_id, EDGE.key, ["4-6"]),
    ]  # fmt: skip
    assert state.steps == {}


def without_passing_on(actions: list[Action]) -> list[Action]:
    return [action for action in actions if not isinstance(action, PassOn)]


def test_a_step_that_goes_on_from_none_puts_all_aside() -> None:
    for newer in (
        structs.replace(STEP, step=3, position=1),
        structs.replace(STEP, step=4, position=3),
        structs.replace(STEP, step=0, position=3, generation=1),
    ):
        state = make_state("w1")
        steps = following(3)
        bring(state, steps)
        actions = bring(state, [newer])
        assert actions[:4] == [
            Forget(steps[0].key), Cancel("w1", steps[0].key, 1, EDGE.key),
            Forget(steps[1].key), Forget(steps[2].key),
        ]  # fmt: skip
        assert list(state.steps) == [newer.key]


def test_the_end_of_a_session_and_a_step_that_was_dropped_take_those_behind_along() -> None:
    for event in ("end", "dropped"):
        state = make_state("w1")
        steps = following(3)
        bring(state, steps)
        if event == "end":
            state.on_end(STEP.session_id, EDGE)
        else:
            told = state.on_dropped(StepDropped(*steps[0].key, 1, "w1"), now=0.2)
            refused = [action for action in told if isinstance(action, Refuse)]
            assert refused == [Refuse(EDGE.address, s.key, "stale", OVERTAKEN) for s in steps]
        assert state.steps == {}
        assert state._ledger.has_room(state._ledger.open(EDGE.account), 12)


def test_a_worker_that_dies_takes_no_held_step_along() -> None:
    state = make_state("w1")
    steps = following(3)
    bring(state, steps)
    arrive(state, announce("w2"), now=0.4)
    assert without_notes(state.on_tick(now=0.5)) == [Dispatched("w2", steps[0].key, 2, 0)]
    actions = state.on_answer(reply("w2", steps[0], attempt=2), now=0.6)
    assert actions[-1] == Dispatched("w2", steps[1].key, 1, 0)


def test_no_more_steps_are_held_than_may_be() -> None:
    state = make_state("w1")
    steps = following(MAX_HELD + 2)
    *_, last = bring(state, steps)
    assert isinstance(last, TellBusy)
    assert len(state.steps) == MAX_HELD + 1
    state.on_answer(reply("w1", steps[0]), now=0.3)
    assert bring(state, steps[-1:]) == []


def test_steps_that_are_held_are_no_demand_for_workers() -> None:
    state = make_state("w1")
    bring(state, following(5))
    state.on_tick(now=0.2)
    (pool,) = state.pools.values()
    assert len(pool.waiting) == 0
    assert [record.is_held for record in state.steps.values()] == [False] + [True] * 4


def test_a_deadline_of_several_ends_each_once() -> None:
    state = make_state("w1")
    steps = [structs.replace(step, deadline_ms=500) for step in following(4)]
    bring(state, steps)
    arrive(state, announce("w1"), 0.69)
    actions = state.on_tick(0.7)
    refused = [action for action in actions if isinstance(action, Refuse)]
    assert [(action.key, action.code) for action in refused] == [
        (step.key, "deadline") for step in steps
    ]
    assert {action.key for action in actions if isinstance(action, Forget)} == {
        step.key for step in steps
    }
    assert state.steps == {}


def test_an_edge_that_does_not_come_back_leaves_no_step() -> None:
    state = make_state("w1")
    bring(state, following(4))
    state.on_edges_disconnected({EDGE.connection}, 0.2)
    arrive(state, announce("w1"), 5.9)
    state.on_tick(6.0)
    assert state.steps == {}


def test_a_step_that_opens_the_session_in_another_way_puts_all_aside() -> None:
    state = make_state()
    for name, part in (("a", "2-4"), ("b", "4-6"), ("c", "2-6")):
        arrive(state, Announce(name, [Service(MODEL, "m", part, 8, "float32")], 4, 100), 0.0)
    by_two = structs.replace(OPENING, route=["2-4", "4-6"])
    first, second, third = following(3)
    state.on_step(first, by_two, EDGE, 12, 0.1)
    state.on_answer(structs.replace(reply("a", first), precision="float32"), 0.2, 12)
    known = structs.replace(by_two, precision="float32")
    state.on_step(second, known, EDGE, 12, 0.3)
    assert list(state.steps) == [first.key, second.key]  # what was learnt opens nothing anew
    state.on_step(third, structs.replace(OPENING, route=["2-6"]), EDGE, 12, 0.3)
    assert list(state.steps) == [third.key]
    for name, part in (("a", "2-4"), ("c", "2-6")):
        arrive(state, Announce(name, [Service(MODEL, "m", part, 8, "float32")], 4, 100), 0.6)
    state.on_tick(0.7)  # b is silent
    assert list(state.workers) == ["a", "c"]
    state.on_end(third.session_id, EDGE)


class Peers:
    """An edge and a worker without anything behind their sockets, at a broker."""

    def __init__(self, context: Context, broker: BrokerServer) -> None:
        self.edge = connect_dealer(context, broker.edge_endpoint)
        self.worker = connect_dealer(context, broker.worker_endpoint)
        for each in (self.edge, self.worker):
            each.setsockopt(zmq.RCVTIMEO, 10_000)
        service = Service(MODEL, "m", OPENING.route[0], 8, "float32")
        self.worker.send(encode_header(Announce("w1", [service], 4, 100)))

    def send(self, steps: list[Step]) -> None:
        """All are at the broker, and the first one at the worker, when this returns."""
        for step in steps:
            self.edge.send_multipart([encode_header(step), bytes(12), encode_header(OPENING)])
        while not isinstance(decode_header(self.worker.recv_multipart()[0]), Dispatch):
            pass
        self.edge.send(encode_header(AskAgain(*steps[-1].key)))
        assert self.hear() == StepPending(*steps[-1].key)

    def hear(self) -> Message:
        """What the edge is told next."""
        return decode_header(self.edge.recv_multipart()[0])


@pytest.fixture
def peers() -> Iterator[Peers]:
    broker = BrokerServer("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", silence_s=60, max_attempts=1)
    thread = threading.Thread(target=broker.run)
    thread.start()
    context: Context = zmq.Context()
    try:
        yield Peers(context, broker)
    finally:
        context.destroy(linger=0)
        broker.stop()
        thread.join()


WHY_DROPPED = {
    "a need": (Need(*STEP.key, 1, 0, [], "w1"), "stale"),
    "a failure": (StepFailed(*STEP.key, 1, "w1", "boom"), "failed"),
    "an overtaken step": (StepDropped(*STEP.key, 1, "w1"), "stale"),
    "a deadline": (None, "deadline"),
}  # fmt: skip


@pytest.mark.parametrize("what", WHY_DROPPED)
def test_an_edge_hears_of_each_step_that_a_broker_drops(peers: Peers, what: str) -> None:
    said, code = WHY_DROPPED[what]
    deadline_ms = 60_000 if said is not None else 1000
    steps = [structs.replace(step, deadline_ms=deadline_ms) for step in following(3)]
    peers.send(steps)
    if said is not None:
        peers.worker.send(encode_header(said))
    told = [peers.hear() for _ in steps]
    if isinstance(said, Need):
        assert told.pop(0) == said
        steps.pop(0)
    assert all(isinstance(each, StepRefused) for each in told)
    assert [(each.key, each.code) for each in told] == [(s.key, code) for s in steps]
