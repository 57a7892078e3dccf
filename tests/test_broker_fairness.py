"""One edge cannot take the broker from the others, and no worker from all."""

from __future__ import annotations

import pytest
from msgspec import structs

from broker.actions import Action, Answer, AskStep, Cancel, Dispatched, Forget, Refuse, TellBusy
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
from common.settings import MAX_EXACT_PARTS

MODEL, SPAN = "f" * 16, "2-6"
LOUD, QUIET = Peer(b"loud", connection=7), Peer(b"quiet", connection=8)
OPENING = Opening(MODEL, [SPAN], 8, ["int8"], "")
STEP = Step(b"s" * 16, 0, 0, 0, 0, [Part(0, [1], 12)], 1, 0, 60_000)


def step_of(session: int, step: int = 0) -> Step:
    return structs.replace(STEP, session_id=session.to_bytes(16, "big"), step=step)


def announce(name: str, capacity: int = 4, precision: str = "float32") -> Announce:
    return Announce(name, [Service(MODEL, "m", SPAN, 8, precision)], capacity, 100)


def arrive(state: BrokerState, message: Announce, now: float = 0.0) -> list[Action]:
    return state.on_announce(message, Peer(b"at-" + message.worker_id.encode()), now)


def make_state(*workers: Announce, **settings: int) -> BrokerState:
    state = BrokerState(started_at=-2000.0, silence_s=1000.0, **settings)
    for worker in workers:
        arrive(state, worker)
    return state


def reply(worker: str, step: Step, attempt: int = 1) -> StepReply:
    return StepReply(*step.key, attempt, 1, 0, worker, 0, 0)


def dispatched(actions: list[Action]) -> list[tuple[str, StepKey]]:
    return [(a.worker_id, a.key) for a in actions if isinstance(a, Dispatched)]


# --- edges in turn


def test_an_edge_with_many_sessions_waits_behind_itself() -> None:
    state = make_state(announce("w1", capacity=1))
    for session in range(50):
        state.on_step(step_of(session), OPENING, LOUD, 12, now=0.0)
    state.on_step(step_of(99), OPENING, QUIET, 12, now=0.1)
    order = []
    running = step_of(0)
    for _ in range(3):
        ((_, key),) = dispatched(state.on_answer(reply("w1", running), now=0.2))
        order.append(key)
        running = structs.replace(STEP, session_id=key[0])
    assert step_of(99).key in order[:2]


def test_while_others_have_sessions_an_edge_fills_half_of_a_worker() -> None:
    state = make_state(announce("w1", capacity=4))
    state.on_step(step_of(99), OPENING, QUIET, 12, now=0.0)
    state.on_answer(reply("w1", step_of(99)), now=0.0)
    for session in range(9):
        state.on_step(step_of(session), OPENING, LOUD, 12, now=0.1)
    assert len(state.workers["w1"].in_flight) == 2
    again = step_of(99, step=1)
    assert dispatched(state.on_step(again, None, QUIET, 12, now=0.2)) == [("w1", again.key)]


def test_alone_an_edge_has_the_whole_worker() -> None:
    state = make_state(announce("w1", capacity=4))
    for session in range(9):
        state.on_step(step_of(session), OPENING, LOUD, 12, now=0.0)
    assert len(state.workers["w1"].in_flight) == 4


def test_an_edge_that_fills_its_byte_quota_does_not_fill_the_others() -> None:
    state = make_state()
    arrive(state, announce("w1", capacity=0))
    large = 200 << 20
    answers = [
        state.on_step(step_of(session), OPENING, LOUD, large, now=0.0) for session in range(4)
    ]
    assert [any(isinstance(a, TellBusy) for a in actions) for actions in answers] == [
        False, False, True, True,
    ]  # fmt: skip
    assert state.on_step(step_of(9), OPENING, QUIET, large, now=0.0) == []


def test_a_broker_without_memory_takes_nothing_new_and_finishes_what_it_has() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.is_full = True
    (busy,) = state.on_step(step_of(5), OPENING, QUIET, 12, now=0.1)
    assert isinstance(busy, TellBusy)
    assert Answer(LOUD.address, STEP.key) in state.on_answer(reply("w1", STEP), now=0.2)


def test_a_step_that_shuns_a_worker_waits_its_turn_like_others() -> None:
    state = make_state(announce("w1", capacity=1))
    for session in range(50):
        step = structs.replace(step_of(session), shun="x")
        state.on_step(step, OPENING, LOUD, 12, now=0.0)
    state.on_step(step_of(99), OPENING, QUIET, 12, now=0.1)
    order = []
    running = step_of(0)
    for _ in range(3):
        ((_, key),) = dispatched(state.on_answer(reply("w1", running), now=0.2))
        order.append(key)
        running = structs.replace(STEP, session_id=key[0])
    assert step_of(99).key in order[:2]


def test_a_shunned_worker_gets_the_step_only_if_it_is_the_only_one() -> None:
    state = make_state(announce("w1"))
    shunning = structs.replace(STEP, shun="w1")
    assert dispatched(state.on_step(shunning, OPENING, LOUD, 12, now=0.0)) == [("w1", STEP.key)]
    state = make_state(announce("w1"), announce("w2", capacity=1))
    assert dispatched(state.on_step(shunning, OPENING, LOUD, 12, now=0.0)) == [("w2", STEP.key)]
    other = structs.replace(step_of(5), shun="w1")
    assert dispatched(state.on_step(other, OPENING, LOUD, 12, now=0.1)) == []
    assert dispatched(state.on_answer(reply("w2", STEP), now=0.2)) == [("w2", other.key)]


def test_an_edge_that_ends_its_sessions_has_no_more_than_its_share() -> None:
    state = make_state(announce("w1", capacity=8))
    state.on_step(step_of(99), OPENING, QUIET, 12, now=0.0)
    for session in range(20):
        state.on_step(step_of(session), OPENING, LOUD, 12, now=0.1)
        state.on_end(step_of(session).session_id, LOUD)
    assert len(state.workers["w1"].in_flight) == 5
    later = step_of(99, step=1)
    assert dispatched(state.on_step(later, None, QUIET, 12, now=0.2)) == [("w1", later.key)]


# --- what no worker could make sense of


@pytest.mark.parametrize("rows", [8193, 2**53])
def test_a_few_bytes_cannot_announce_rows_without_end(rows: int) -> None:
    state = make_state(announce("w1"))
    step = structs.replace(STEP, parts=[Part(0, [rows], 12)])
    (refuse,) = state.on_step(step, OPENING, LOUD, 12, now=0.0)
    assert isinstance(refuse, Refuse)
    assert refuse.reason == f"the step has {rows} rows; at most 8192"


def test_an_exact_step_has_no_more_parts_than_a_worker_should_compute_at_once() -> None:
    state = make_state(announce("w1"))
    exact = structs.replace(OPENING, exact=True)
    step = structs.replace(STEP, parts=[Part(0, [1], 12)] * (MAX_EXACT_PARTS + 1))
    (refuse,) = state.on_step(step, exact, LOUD, 12, now=0.0)
    assert isinstance(refuse, Refuse)
    assert refuse.reason == "the step has 33 parts, and its session is exact; at most 32"
    assert dispatched(state.on_step(step, OPENING, LOUD, 12, now=0.0)) == [("w1", step.key)]
    most = structs.replace(step, step=1, position=33, parts=step.parts[1:])
    assert isinstance(state.on_step(most, exact, LOUD, 12, now=0.0)[-1], Dispatched)


def test_a_deadline_is_ten_minutes_at_most() -> None:
    state = make_state(announce("w1"))
    state.on_step(structs.replace(STEP, deadline_ms=2**53), OPENING, LOUD, 12, now=0.0)
    assert not any(isinstance(a, Refuse) for a in state.on_tick(now=599.0))
    assert any(isinstance(a, Refuse) for a in state.on_tick(now=600.0))


# --- steps that nobody waits for


def test_a_worker_is_busy_with_an_abandoned_step_until_it_says_otherwise() -> None:
    state = make_state(announce("w1"), announce("w2"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    actions = state.on_end(STEP.session_id, LOUD)
    assert actions[:2] == [Forget(STEP.key), Cancel("w1", STEP.key, 1, "")]
    other = step_of(5)
    assert dispatched(state.on_step(other, OPENING, QUIET, 12, now=0.1)) == [("w2", other.key)]
    state.on_dropped(StepDropped(*STEP.key, 1, "w1"), now=0.2)
    assert state.workers["w1"].in_flight == {}


def test_the_answer_to_an_abandoned_step_makes_room_too() -> None:
    state = make_state(announce("w1", capacity=1))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.on_end(STEP.session_id, LOUD)
    other = step_of(5)
    assert dispatched(state.on_step(other, OPENING, QUIET, 12, now=0.1)) == []
    assert dispatched(state.on_answer(reply("w1", STEP), now=0.2)) == [("w1", other.key)]


def test_the_steps_of_an_edge_that_does_not_come_back_are_given_up() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.on_edges_disconnected({7}, now=1.0)
    assert state.on_tick(now=5.9) == []
    assert state.on_tick(now=6.0) == [Forget(STEP.key), Cancel("w1", STEP.key, 1, "")]


def test_an_edge_that_comes_back_finds_its_step() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.on_edges_disconnected({7}, now=1.0)
    back = Peer(b"loud again", connection=9)
    state.on_ask_again(AskAgain(*STEP.key), back, now=2.0)
    assert not any(isinstance(a, Forget) for a in state.on_tick(now=10.0))
    assert Answer(back.address, STEP.key) in state.on_answer(reply("w1", STEP), now=10.1)


def test_a_broker_without_the_step_asks_for_it() -> None:
    state = make_state(announce("w1"))
    assert state.on_ask_again(AskAgain(*STEP.key), LOUD, now=0.0) == [
        AskStep(LOUD.address, STEP.key)
    ]


# --- steps that take long


def test_a_late_step_goes_to_an_idle_worker_too_and_the_first_answer_counts() -> None:
    for first, second in (("w1", "w2"), ("w2", "w1")):
        state = make_state(announce("w1"))
        state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
        arrive(state, announce("w2"), now=1.0)
        assert dispatched(state.on_tick(now=1.9)) == []
        actions = state.on_tick(now=2.0)
        assert dispatched(actions) == [("w2", STEP.key)]
        assert Cancel("w1", STEP.key, 1, "") in actions
        attempts = {"w1": 1, "w2": 2}
        answered = state.on_answer(reply(first, STEP, attempts[first]), now=2.5)
        assert answered[:2] == [Answer(LOUD.address, STEP.key), Forget(STEP.key)]
        assert Cancel(second, STEP.key, attempts[second], "") in answered
        assert state.on_answer(reply(second, STEP, attempts[second]), now=2.6) == []
        assert all(worker.in_flight == {} for worker in state.workers.values())


def test_a_late_worker_that_fails_does_not_take_the_step_back() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w2"), now=1.0)
    state.on_tick(now=2.0)
    assert state.on_failed(StepFailed(*STEP.key, 1, "w1", "boom"), now=2.1) == []
    assert state.steps[STEP.key].worker_id == "w2"


def test_a_step_taken_back_may_still_be_answered_by_the_late_worker() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w2"), now=1.0)
    state.on_tick(now=2.0)
    state.workers["w1"].draining = True  # nobody is left to take it
    state.on_worker_gone("w2", "died", now=2.1)
    assert state.steps[STEP.key].worker_id is None
    assert state.on_answer(reply("w1", STEP, 1), now=2.2)[0] == Answer(LOUD.address, STEP.key)
    assert list(state.pools[MODEL, SPAN, "float32"].queued()) == []


def handed_over_and_failed() -> BrokerState:
    """Late on w1, failed on w2, and so on w1 once more."""
    state = make_state(announce("w1"), announce("w2", capacity=0))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w2"), now=1.0)
    assert dispatched(state.on_tick(now=2.0)) == [("w2", STEP.key)]
    again = state.on_failed(StepFailed(*STEP.key, 2, "w2", "boom"), now=2.1)
    assert dispatched(again) == [("w1", STEP.key)]
    return state


def test_a_worker_that_confirms_an_earlier_attempt_still_has_the_later_one() -> None:
    state = handed_over_and_failed()
    state.on_dropped(StepDropped(*STEP.key, 1, "w1"), now=2.2)
    assert list(state.workers["w1"].in_flight) == [STEP.key]
    gone = state.on_worker_gone("w1", "died", now=2.3)
    assert dispatched(gone) == [("w2", STEP.key)]


def test_a_later_attempt_on_a_late_worker_fails_as_any_other() -> None:
    state = handed_over_and_failed()
    state.on_failed(StepFailed(*STEP.key, 3, "w1", "boom"), now=2.2)
    assert state.steps[STEP.key].worker_id is not None
    assert list(state.workers[state.steps[STEP.key].worker_id or ""].in_flight) == [STEP.key]


def test_services_that_usually_take_long_have_more_patience() -> None:
    state = make_state(announce("w1"), announce("w2", capacity=0))
    for number in range(20):
        state.on_step(step_of(number), OPENING, LOUD, 12, now=number * 10.0)
        state.on_answer(reply("w1", step_of(number)), now=number * 10.0 + 4.0)
    state.on_step(STEP, OPENING, LOUD, 12, now=300.0)
    arrive(state, announce("w2"), now=300.0)
    assert dispatched(state.on_tick(now=311.0)) == []
    assert dispatched(state.on_tick(now=312.1)) == [("w2", STEP.key)]


def test_a_warm_session_does_not_wait_behind_a_long_step() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.on_answer(reply("w1", STEP), now=0.1)
    state.on_step(step_of(5), OPENING, QUIET, 12, now=1.0)  # a long one
    arrive(state, announce("w2"), now=1.0)
    soon, later = (structs.replace(STEP, step=n) for n in (1, 2))
    assert dispatched(state.on_step(soon, None, LOUD, 12, now=1.5)) == [("w1", soon.key)]
    assert dispatched(state.on_step(later, None, LOUD, 12, now=3.1)) == [("w2", later.key)]


def test_a_pool_that_dies_as_a_whole_does_not_use_up_a_steps_attempts() -> None:
    state = make_state()
    for number in (1, 2, 3):
        peer = Peer(b"at-%d" % number, connection=number)
        state.on_announce(announce(f"w{number}"), peer, now=0.0)
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    assert dispatched(state.on_disconnected({1}, now=1.00)) == [("w2", STEP.key)]
    assert dispatched(state.on_disconnected({2}, now=1.01)) == []  # who knows about the third
    state.on_disconnected({3}, now=1.02)
    arrive(state, announce("w4"), now=1.1)
    assert dispatched(state.on_tick(now=2.0)) == []
    assert dispatched(state.on_tick(now=2.01)) == [("w4", STEP.key)]


# --- precision


def test_a_session_stays_in_the_precision_that_answered_first() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    state.on_answer(reply("w1", STEP), now=0.1)
    arrive(state, announce("w2", precision="bfloat16"), now=0.1)
    state.on_worker_gone("w1", "died", now=0.2)
    assert state.on_step(structs.replace(STEP, step=1), None, LOUD, 12, now=0.3) == []
    heartbeat = announce("w2", precision="bfloat16")
    assert dispatched(arrive(state, heartbeat, now=30.0)) == []
    _, refuse = state.on_tick(now=30.3)
    assert isinstance(refuse, Refuse)
    assert refuse.code == "no_worker"
    assert "in float32, in which this session is computed" in refuse.reason
    arrive(state, announce("w3"), now=30.4)
    second = structs.replace(STEP, step=2)
    assert dispatched(state.on_step(second, None, LOUD, 12, now=30.5)) == [("w3", second.key)]


def test_a_restarted_broker_learns_the_precision_from_the_opening() -> None:
    state = make_state(announce("w1", precision="bfloat16"), announce("w2"))
    opening = structs.replace(OPENING, precision="float32")
    assert dispatched(state.on_step(STEP, opening, LOUD, 12, now=0.0)) == [("w2", STEP.key)]


def test_a_session_that_nobody_answered_yet_waits_for_no_precision() -> None:
    state = make_state(announce("w1"))
    state.on_worker_gone("w1", "died", now=0.0)
    assert state.on_step(STEP, OPENING, LOUD, 12, now=0.1) == []
    joined = arrive(state, announce("w2", precision="bfloat16"), now=0.2)
    assert dispatched(joined) == [("w2", STEP.key)]


def test_a_step_that_settles_may_begin_in_another_precision() -> None:
    state = make_state()
    for number in (1, 2):
        state.on_announce(announce(f"w{number}"), Peer(b"%d" % number, connection=number), now=0.0)
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w3", precision="bfloat16"), now=0.5)
    state.on_disconnected({1}, now=1.0)
    state.on_disconnected({2}, now=1.1)
    assert dispatched(state.on_tick(now=2.2)) == [("w3", STEP.key)]


def test_a_session_that_nobody_answered_yet_may_begin_elsewhere() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w2", precision="bfloat16"), now=0.1)
    assert dispatched(state.on_worker_gone("w1", "died", now=0.2)) == [("w2", STEP.key)]


def test_a_worker_that_answers_in_another_precision_is_not_believed() -> None:
    state = make_state(announce("w1"), announce("w2"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    lie = Need(*STEP.key, 1, 0, [], "w1", precision="float8")
    assert dispatched(state.on_answer(lie, now=0.1)) == [("w2", STEP.key)]


def test_a_late_worker_that_lies_does_not_queue_the_step_twice() -> None:
    state = make_state(announce("w1"))
    state.on_step(STEP, OPENING, LOUD, 12, now=0.0)
    arrive(state, announce("w2"), now=1.0)
    state.on_tick(now=2.0)
    state.workers["w1"].draining = True
    state.on_worker_gone("w2", "died", now=2.1)
    state.on_answer(Need(*STEP.key, 1, 0, [], "w1", precision="float8"), now=2.2)
    assert list(state.pools[MODEL, SPAN, "float32"].queued()) == [STEP.key]


# --- names


def test_without_keys_a_workers_name_belongs_to_its_connection() -> None:
    state = make_state(announce("w1"))
    state.on_announce(announce("w1", capacity=99), Peer(b"thief"), now=0.1)
    assert state.workers["w1"].announce.capacity == 4
    assert state.counters["forged_workers"] == 1
