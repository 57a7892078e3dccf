"""Steps of one session that go on from each other: the broker holds them and hands out one."""

from __future__ import annotations

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
    Cancel,
    Dispatched,
    Forget,
    Refuse,
    TellBusy,
    TellPending,
)  # fmt: skip
from broker.state import MAX_HELD, BrokerState
from common.protocol.messages import Announce, AskAgain, Need, Service, Step, StepDropped


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
        Answer(EDGE.address, steps[0].key), *(Forget(step.key) for step in steps),
    ]  # fmt: skip
    assert state.steps == {}


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
            state.on_dropped(StepDropped(*steps[0].key, 1, "w1"), now=0.2)
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
    assert [action.code for action in actions if isinstance(action, Refuse)] == ["deadline"]
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
    assert state.steps[second.key].is_held  # what was learnt meanwhile opens nothing anew
    state.on_step(third, structs.replace(OPENING, route=["2-6"]), EDGE, 12, 0.3)
    assert list(state.steps) == [third.key]
    for name, part in (("a", "2-4"), ("c", "2-6")):
        arrive(state, Announce(name, [Service(MODEL, "m", part, 8, "float32")], 4, 100), 0.6)
    state.on_tick(0.7)  # b is silent
    assert list(state.workers) == ["a", "c"]
    state.on_end(third.session_id, EDGE)
