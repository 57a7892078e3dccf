"""The broker's decisions, without sockets and with a clock of our own."""

import pytest
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
    TellPending,
)
from broker.peer import Peer
from broker.state import BrokerState
from common.protocol.messages import (
    Alive,
    Announce,
    Need,
    Opening,
    Part,
    Service,
    Step,
    StepDropped,
    StepFailed,
    StepReply,
)

MODEL, SPAN = "f" * 16, "2-6"
EDGE = Peer(b"edge-1")
OPENING = Opening(MODEL, [SPAN], 8, ["int8"], "")
STEP = Step(b"s" * 16, 0, 0, 0, 0, [Part(0, [1], 12)], 1, 0, 60_000)
OTHER = structs.replace(STEP, session_id=b"t" * 16)


def announce(name: str, capacity: int = 4, model: str = MODEL) -> Announce:
    return Announce(name, [Service(model, "m", SPAN, 8)], capacity, 100)


def make_state(*workers: str, **settings: int) -> BrokerState:
    state = BrokerState(started_at=-100.0, silence_s=0.5, **settings)
    for name in workers:
        arrive(state, announce(name), now=0.0)
    return state


def arrive(state: BrokerState, message: Announce, now: float) -> list[Action]:
    peer = Peer(b"at-" + message.worker_id.encode())
    return state.on_announce(message, peer, now)


def reply(worker: str, step: Step = STEP, attempt: int = 1) -> StepReply:
    return StepReply(*step.key, attempt, step.reply_rows, 0, worker, 0, 0)


def failed(worker: str, step: Step = STEP, attempt: int = 1) -> StepFailed:
    return StepFailed(*step.key, attempt, worker, "boom")


def without_notes(actions: list[Action]) -> list[Action]:
    """What is done about steps."""
    return [action for action in actions if not isinstance(action, Note | TellJoined)]


def test_a_step_goes_to_a_worker_and_its_answer_to_the_edge() -> None:
    state = make_state("w1")
    assert state.on_step(STEP, OPENING, EDGE, 12, now=0.1) == [Dispatched("w1", STEP.key, 1, 0)]
    assert state.on_answer(reply("w1"), now=0.2) == [
        Answer(EDGE.address, STEP.key),
        Forget(STEP.key),
    ]
    assert state.steps == {}
    assert state.workers["w1"].in_flight == {}


def test_a_dead_workers_step_goes_to_a_live_worker() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    arrive(state, announce("w2"), now=0.4)
    assert without_notes(state.on_tick(now=0.49)) == []
    assert without_notes(state.on_tick(now=0.5)) == [Dispatched("w2", STEP.key, 2, 0)]


def test_the_warm_worker_is_preferred_to_a_less_loaded_one() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    state.on_answer(reply("w1"), now=0.1)
    state.on_step(OTHER, OPENING, EDGE, 12, now=0.2)
    assert state.steps[OTHER.key].worker_id == "w1"
    arrive(state, announce("w2"), now=0.2)
    second = structs.replace(STEP, step=1, position=1)
    assert state.on_step(second, OPENING, EDGE, 12, now=0.3) == [Dispatched("w1", second.key, 1, 0)]


def test_without_a_warm_worker_the_least_loaded_gets_the_step() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_step(OTHER, OPENING, EDGE, 12, now=0.1) == [Dispatched("w2", OTHER.key, 1, 0)]


def test_a_step_waits_for_its_full_warm_worker_unless_another_is_idle() -> None:
    state = make_state()
    arrive(state, announce("w1", capacity=1), now=0.0)
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    state.on_answer(reply("w1"), now=0.0)
    state.on_step(OTHER, OPENING, EDGE, 12, now=0.0)
    second = structs.replace(STEP, step=1, position=1)
    assert state.on_step(second, OPENING, EDGE, 12, now=0.1) == []
    joined = without_notes(arrive(state, announce("w2", capacity=1), now=0.2))
    assert joined == [Dispatched("w2", second.key, 1, 100_000)]


def test_a_full_worker_gets_no_more_and_the_next_when_it_has_room() -> None:
    state = make_state()
    arrive(state, announce("w1", capacity=1), now=0.0)
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_step(OTHER, OPENING, EDGE, 12, now=0.1) == []
    actions = state.on_answer(reply("w1"), now=0.3)
    assert actions[-1] == Dispatched("w1", OTHER.key, 1, 200_000)


def test_a_step_that_is_asked_again_is_not_computed_twice() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_step(STEP, OPENING, Peer(b"edge-2"), 12, now=0.6) == [
        TellPending(b"edge-2", STEP.key)
    ]
    assert state.on_answer(reply("w1"), now=0.7)[0] == Answer(b"edge-2", STEP.key)


def test_a_late_answer_of_an_earlier_attempt_is_dropped() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    arrive(state, announce("w2"), now=0.4)
    assert Dispatched("w2", STEP.key, 2, 0) in state.on_tick(now=0.5)
    arrive(state, announce("w1"), now=0.6)  # the zombie wakes up
    assert state.on_answer(reply("w1", attempt=1), now=0.7) == []
    assert state.on_answer(reply("w2", attempt=2), now=0.8)[0] == Answer(EDGE.address, STEP.key)
    assert state.counters["late_answers"] == 1


def test_a_step_that_failed_three_workers_is_refused_with_the_reasons() -> None:
    state = make_state("w1", "w2", "w3", "w4")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_failed(failed("w1"), now=0.1) == [Dispatched("w2", STEP.key, 2, 0)]
    assert state.on_failed(failed("w2", attempt=2), now=0.2) == [Dispatched("w3", STEP.key, 3, 0)]
    forget, refuse = state.on_failed(failed("w3", attempt=3), now=0.3)
    reason = "failed 3 times: worker w1: boom; worker w2: boom; worker w3: boom"
    assert (forget, refuse) == (Forget(STEP.key), Refuse(EDGE.address, STEP.key, "failed", reason))
    assert state.steps == {}


def test_a_single_worker_may_try_a_failed_step_again() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_failed(failed("w1"), now=0.1) == [Dispatched("w1", STEP.key, 2, 0)]


def test_no_worker_for_the_model_is_said_at_once_with_what_is_served() -> None:
    state = make_state()
    arrive(state, announce("w1", model="a" * 16), now=0.0)
    (refuse,) = state.on_step(STEP, OPENING, EDGE, 12, now=1.0)
    assert isinstance(refuse, Refuse)
    assert refuse.code == "no_worker"
    assert refuse.reason == (
        f"no worker serves 2-6 of the model with fingerprint {MODEL}; "
        f"being served: m 2-6 (fingerprint {'a' * 16})"
    )


def test_a_broker_that_has_just_started_waits_for_its_workers() -> None:
    state = BrokerState(started_at=0.0, silence_s=0.5)
    assert state.on_step(STEP, OPENING, EDGE, 12, now=0.1) == []
    worker = Announce("w1", [Service(MODEL, "m", SPAN, 8, "float32")], 4, 100)
    assert without_notes(arrive(state, worker, now=0.2)) == [Dispatched("w1", STEP.key, 1, 100_000)]


def test_a_broker_that_has_started_and_hears_of_no_worker_says_so() -> None:
    state = BrokerState(started_at=0.0, silence_s=0.5)
    assert state.on_step(STEP, OPENING, EDGE, 12, now=0.1) == []
    assert state.on_tick(now=2.9) == []
    forget, refuse = state.on_tick(now=3.0)
    assert forget == Forget(STEP.key)
    assert isinstance(refuse, Refuse)
    assert refuse.code == "no_worker"
    assert refuse.reason.endswith("there are no workers at all")
    assert state.steps == {}


def test_a_service_that_has_lost_its_last_worker_is_waited_for() -> None:
    state = make_state("w1")
    state.on_worker_gone("w1", "left", now=1.0)
    assert state.on_step(STEP, OPENING, EDGE, 12, now=2.0) == []
    assert state.on_tick(now=30.9) == []
    assert without_notes(arrive(state, announce("w2"), now=30.95))[0] == Dispatched(
        "w2", STEP.key, 1, 28_950_000
    )
    state.on_worker_gone("w2", "left", now=31.0)
    forget, refuse = state.on_tick(now=61.0)
    assert isinstance(refuse, Refuse)
    assert (forget, refuse.code) == (Forget(STEP.key), "no_worker")


def announce_span(name: str, span: str, precision: str = "float32") -> Announce:
    return Announce(name, [Service(MODEL, "m", span, 8, precision)], 4, 100)


def test_other_parts_that_make_up_the_layers_are_named_with_the_refusal() -> None:
    state = make_state()
    for name, span in (("w1", "2-4"), ("w2", "3-6"), ("w3", "1-6")):
        arrive(state, announce_span(name, span), now=0.0)
    (refuse,) = state.on_step(STEP, OPENING, EDGE, 12, now=1.0)
    assert isinstance(refuse, Refuse)
    assert (refuse.code, refuse.detour) == ("no_worker", [])
    arrive(state, announce_span("w4", "4-6"), now=1.0)
    (refuse,) = state.on_step(STEP, OPENING, EDGE, 12, now=1.1)
    assert isinstance(refuse, Refuse)
    assert (refuse.code, refuse.detour) == ("no_worker", ["2-4", "4-6"])


def test_a_session_keeps_its_precision_on_a_detour() -> None:
    state = make_state()
    arrive(state, announce_span("w1", "2-4"), now=0.0)
    arrive(state, announce_span("w2", "4-6", "bfloat16"), now=0.0)
    arrive(state, announce_span("w3", "2-3", "bfloat16"), now=0.0)
    arrive(state, announce_span("w4", "3-4", "bfloat16"), now=0.0)
    (refuse,) = state.on_step(STEP, OPENING, EDGE, 12, now=1.0)
    assert isinstance(refuse, Refuse)
    assert refuse.detour == ["2-3", "3-4", "4-6"]
    settled = structs.replace(OPENING, precision="float32")
    (refuse,) = state.on_step(OTHER, settled, EDGE, 12, now=1.0)
    assert isinstance(refuse, Refuse)
    assert refuse.detour == []


def test_steps_that_wait_for_a_part_that_is_gone_are_sent_round_once_others_make_it_up() -> None:
    state = make_state()
    arrive(state, announce_span("w1", SPAN), now=0.0)
    assert len(state.on_step(STEP, OPENING, EDGE, 12, now=0.1)) == 1
    state.on_worker_gone("w1", "left", now=1.0)
    assert without_notes(state.on_tick(now=1.1)) == []  # it may come back
    arrive(state, announce_span("w2", "2-5"), now=1.2)
    arrive(state, announce_span("w3", "5-6"), now=1.2)
    forget, refuse = without_notes(state.on_tick(now=1.3))
    assert forget == Forget(STEP.key)
    assert isinstance(refuse, Refuse)
    assert (refuse.code, refuse.detour) == ("no_worker", ["2-5", "5-6"])


def test_a_full_broker_says_when_to_come_back() -> None:
    state = make_state("w1", max_queued_steps=1)
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    (busy,) = state.on_step(OTHER, OPENING, EDGE, 12, now=0.1)
    assert isinstance(busy, TellBusy)
    assert busy.retry_ms > 0


def test_a_deadline_that_passes_says_where_the_step_was() -> None:
    state = make_state("w1")
    short = structs.replace(STEP, deadline_ms=300)
    state.on_step(short, OPENING, EDGE, 12, now=0.0)
    forget, cancel, refuse = state.on_tick(now=0.3)
    assert forget == Forget(short.key)
    assert cancel == Cancel("w1", short.key, 1, "")
    assert isinstance(refuse, Refuse)
    assert refuse.code == "deadline"
    assert refuse.reason == "the step's deadline passed after 0.3 s, in flight on worker w1"


def test_a_newer_step_of_a_session_replaces_the_older_one() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    newer = structs.replace(STEP, step=1)
    assert state.on_step(newer, OPENING, EDGE, 12, now=0.1) == [
        Forget(STEP.key),
        Cancel("w1", STEP.key, 1, ""),
        Dispatched("w1", newer.key, 1, 0),
    ]
    assert state.on_answer(reply("w1", STEP), now=0.2) == []
    (refuse,) = state.on_step(STEP, OPENING, EDGE, 12, now=0.3)
    assert isinstance(refuse, Refuse)
    assert refuse.code == "stale"


def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert without_notes(state.on_drain("w1", Peer(b"at-w1"), now=0.1)) == [AcceptDrain(b"at-w1")]
    assert state.on_step(OTHER, OPENING, EDGE, 12, now=0.2) == [Dispatched("w2", OTHER.key, 1, 0)]
    assert state.on_answer(reply("w1"), now=0.25)[0] == Answer(EDGE.address, STEP.key)
    second = structs.replace(STEP, step=1, position=1)
    assert state.on_step(second, OPENING, EDGE, 12, now=0.29) == [
        Dispatched("w2", second.key, 1, 0)
    ]


def test_an_undeliverable_step_costs_no_attempt() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    actions = without_notes(state.on_undeliverable(Dispatched("w1", STEP.key, 1, 0), now=0.1))
    assert actions == [Dispatched("w2", STEP.key, 1, 0)]
    assert "w1" not in state.workers


def test_need_rows_is_an_answer_and_makes_the_worker_warm() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    need = Need(*STEP.key, 1, 0, [], "w1")
    assert state.on_answer(need, now=0.1)[0] == Answer(EDGE.address, STEP.key)
    assert state.sessions[STEP.session_id].warm_worker(0) is state.workers["w1"]


def test_the_end_of_a_session_reaches_its_warm_worker() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    state.on_answer(reply("w1"), now=0.1)
    assert state.on_end(STEP.session_id, EDGE) == [ForwardEnd("w1", STEP.session_id, "", [SPAN])]
    assert state.sessions == {}


def test_two_models_do_not_mix() -> None:
    state = make_state("w1")
    arrive(state, announce("w2", model="a" * 16), now=0.0)
    other_model = structs.replace(OPENING, model="a" * 16)
    assert state.on_step(OTHER, other_model, EDGE, 12, now=0.1) == [
        Dispatched("w2", OTHER.key, 1, 0)
    ]
    assert state.on_step(STEP, OPENING, EDGE, 12, now=0.1) == [Dispatched("w1", STEP.key, 1, 0)]


def test_an_opening_is_asked_for_once_and_then_remembered() -> None:
    state = make_state("w1")
    assert state.on_step(STEP, None, EDGE, 12, now=0.0) == [AskOpening(EDGE.address, STEP.key)]
    state.on_step(STEP, OPENING, EDGE, 12, now=0.1)
    state.on_answer(reply("w1"), now=0.2)
    second = structs.replace(STEP, step=1, position=1)
    assert state.on_step(second, None, EDGE, 12, now=0.3) == [Dispatched("w1", second.key, 1, 0)]


def test_workers_that_die_together_cost_a_step_one_attempt() -> None:
    state = make_state("w1", "w2", "w3")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert without_notes(state.on_tick(now=5.0)) == []
    assert state.steps[STEP.key].attempts == 1
    actions = without_notes(arrive(state, announce("w4"), now=5.1))
    assert actions == [Dispatched("w4", STEP.key, 2, 100_000)]


def test_a_worker_that_leaves_costs_its_steps_no_attempt() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    actions = without_notes(state.on_worker_gone("w1", "left", now=0.1))
    assert actions == [Dispatched("w2", STEP.key, 1, 0)]
    assert state.steps[STEP.key].failures == []


def test_what_was_overtaken_is_not_sent_and_not_queued_twice() -> None:
    state = make_state("w1", "w2")
    (first,) = state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert isinstance(first, Dispatched)
    state.on_worker_gone("w1", "died", now=0.1)
    assert not state.is_current(first)
    assert without_notes(state.on_undeliverable(first, now=0.2)) == []
    assert list(state.pools[MODEL, SPAN, ""].queued()) == []
    state.on_end(STEP.session_id, EDGE)
    assert state.on_undeliverable(first, now=0.3) == []


def test_a_session_that_ends_gives_its_credit_back() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert Cancel("w1", STEP.key, 1, "") in state.on_end(STEP.session_id, EDGE)
    assert list(state.workers["w1"].in_flight) == [STEP.key]  # it may be at it still
    state.on_dropped(StepDropped(*STEP.key, 1, "w1"), now=0.1)
    assert state.workers["w1"].in_flight == {}


def test_a_step_in_flight_for_long_is_sent_again_to_the_same_worker() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    assert state.on_step(STEP, None, EDGE, 12, now=0.9) == [TellPending(EDGE.address, STEP.key)]
    again = [TellPending(EDGE.address, STEP.key), Dispatched("w1", STEP.key, 1, 0)]
    assert state.on_step(STEP, None, EDGE, 12, now=1.1) == again
    assert state.on_step(STEP, None, EDGE, 12, now=1.6) == [TellPending(EDGE.address, STEP.key)]


def test_asking_again_does_not_put_the_deadline_off() -> None:
    state = make_state("w1")
    state.on_step(structs.replace(STEP, deadline_ms=300), OPENING, EDGE, 12, now=0.0)
    state.on_step(structs.replace(STEP, deadline_ms=300), None, EDGE, 12, now=0.2)
    assert isinstance(state.on_tick(now=0.3)[-1], Refuse)


def test_a_worker_that_beats_slowly_is_not_taken_for_dead() -> None:
    state = make_state()
    arrive(state, structs.replace(announce("w1"), heartbeat_ms=1000), now=0.0)
    assert state.on_tick(now=2.9) == []
    assert state.on_tick(now=3.1) != []


def test_silent_sessions_are_forgotten() -> None:
    state = make_state("w1")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    state.on_answer(reply("w1"), now=0.1)
    state.on_tick(now=10_000.0)
    assert state.sessions == {}


def test_a_connection_that_ends_frees_its_steps_at_once() -> None:
    state = make_state()
    peer = Peer(b"at-w1", connection=12)
    state.on_announce(announce("w1"), peer, now=0.0)
    arrive(state, announce("w2"), now=0.0)
    state.on_step(STEP, OPENING, EDGE, 12, now=0.1)
    (again,) = without_notes(state.on_disconnected({12}, now=0.11))
    assert again == Dispatched("w2", STEP.key, 2, 0)
    assert state.counters["dead_workers"] == 1
    assert state.on_disconnected({99}, now=0.12) == []


def test_the_queue_goes_round_the_sessions() -> None:
    """A heavy session has one step here at most; its next one queues behind the others'."""
    state = make_state()
    arrive(state, announce("w1", capacity=1), now=0.0)
    heavy = [structs.replace(STEP, step=i, position=256 * i) for i in range(3)]
    state.on_step(heavy[0], OPENING, EDGE, 12, now=0.0)
    others = [structs.replace(STEP, session_id=bytes([i]) * 16) for i in (1, 2)]
    for other in others:
        state.on_step(other, OPENING, EDGE, 12, now=0.0)
    served = []
    current = heavy[0]
    waiting = iter(heavy[1:])
    for _ in range(3):
        actions = state.on_answer(reply("w1", current), now=0.1)
        if current.session_id == STEP.session_id:
            state.on_step(next(waiting), None, EDGE, 12, now=0.1)
        (sent,) = [a for a in actions if isinstance(a, Dispatched)]
        current = state.steps[sent.key].step
        served.append(current.session_id[:1])
    assert served == [b"\x01", b"\x02", b"s"]


def test_another_edges_session_is_refused_and_counted() -> None:
    state = make_state("w1")
    mine, thief = Peer(b"a", key="mine"), Peer(b"b", key="thief")
    state.on_step(STEP, OPENING, mine, 12, now=0.0)
    (refuse,) = without_notes(state.on_step(STEP, OPENING, thief, 12, now=0.1))
    assert refuse == Refuse(b"b", STEP.key, "invalid", "the session belongs to another edge")
    assert without_notes(state.on_end(STEP.session_id, thief)) == []
    assert state.counters["foreign_sessions"] == 2
    assert without_notes(state.on_answer(reply("w1"), now=0.2))[0] == Answer(b"a", STEP.key)


def test_a_workers_id_belongs_to_who_has_it() -> None:
    state = make_state()
    owner = Peer(b"1", key="owner")
    state.on_announce(announce("w1"), owner, now=0.0)
    for key in ("", "forger"):
        state.on_announce(announce("w1"), Peer(b"2", key=key), now=0.1)
        state.on_alive(Alive("w1", bytes(16)), Peer(b"3", key=key), now=0.1)
    assert state.workers["w1"].peer == owner
    assert state.workers["w1"].seen_at == 0.0
    assert state.check_sender("w1", Peer(b"2", key="forger")) is not None
    assert state.check_sender("w1", owner) is None
    assert state.counters["forged_workers"] == 5
    moved = Peer(b"4", key="owner")
    state.on_announce(announce("w1"), moved, now=0.2)
    assert state.workers["w1"].peer == moved


def test_an_edge_has_a_limit_of_sessions() -> None:
    state = make_state("w1", max_sessions_per_edge=1)
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    (refuse,) = state.on_step(OTHER, OPENING, EDGE, 12, now=0.1)
    assert isinstance(refuse, Refuse)
    assert refuse.reason == "this edge has 1 sessions open; end some first"
    assert isinstance(state.on_step(OTHER, OPENING, Peer(b"edge-2"), 12, now=0.1)[0], Dispatched)
    state.on_end(STEP.session_id, EDGE)
    third = structs.replace(STEP, session_id=b"u" * 16)
    assert isinstance(state.on_step(third, OPENING, EDGE, 12, now=0.2)[0], Dispatched)


def test_bodies_are_held_up_to_a_limit() -> None:
    state = make_state("w1", max_queued_bytes=30)
    third = structs.replace(STEP, session_id=b"u" * 16)
    for step in (STEP, OTHER):
        state.on_step(step, OPENING, EDGE, 12, now=0.0)
    (busy,) = state.on_step(third, OPENING, EDGE, 12, now=0.1)
    assert isinstance(busy, TellBusy)
    state.on_answer(reply("w1"), now=0.2)
    assert isinstance(state.on_step(third, OPENING, EDGE, 12, now=0.3)[0], Dispatched)


def test_a_worker_whose_answer_could_not_be_used_is_not_asked_again() -> None:
    state = make_state("w1", "w2")
    state.on_step(STEP, OPENING, EDGE, 12, now=0.0)
    state.on_answer(reply("w1"), now=0.1)
    again = structs.replace(STEP, step=1, shun="w1")
    assert state.on_step(again, None, EDGE, 12, now=0.2) == [Dispatched("w2", again.key, 1, 0)]


def test_a_session_is_not_forgotten_while_its_step_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.state.SESSION_MEMORY_S", 100.0)
    state = make_state()
    arrive(state, announce("w1", capacity=0), now=0.0)
    patient = structs.replace(STEP, deadline_ms=3_600_000)
    state.on_step(patient, OPENING, EDGE, 12, now=0.0)
    arrive(state, announce("w1", capacity=0), now=300.0)
    state.on_tick(now=300.0)
    assert STEP.session_id in state.sessions
    assert arrive(state, announce("w1"), now=300.1) == [Dispatched("w1", STEP.key, 1, 300_100_000)]


# --- several parts in a row

FIRST, SECOND = "2-4", "4-6"
CHAIN = structs.replace(OPENING, route=[FIRST, SECOND], codecs=["int8", "fp32"], between=1)
PASSED_ON = structs.replace(STEP, parts=[Part(1, [1], 32)])


def serve(
    state: BrokerState, part: str, *names: str, precision: str = "", now: float = 0.0
) -> None:
    for name in names:
        service = Service(MODEL, "m", part, 8, precision)
        arrive(state, Announce(name, [service], 4, 100), now)


def make_chain(*seconds: str) -> BrokerState:
    state = make_state()
    serve(state, FIRST, "a1", "a2")
    serve(state, SECOND, *(seconds or ("b1", "b2")))
    return state


def test_what_one_part_answers_goes_to_the_next_and_only_the_last_answer_to_the_edge() -> None:
    state = make_chain()
    assert state.on_step(STEP, CHAIN, EDGE, 12, now=0.1) == [Dispatched("a1", STEP.key, 1, 0)]
    computed = structs.replace(reply("a1"), queue_us=7, compute_us=100)
    assert state.on_answer(computed, now=0.2, body_bytes=32) == [
        PassOn(PASSED_ON),
        Dispatched("b1", STEP.key, 2, 7),
    ]
    record = state.steps[STEP.key]
    assert (record.hop, record.body_bytes, record.earlier_compute_us) == (1, 32, 100)
    assert record.account.body_bytes == 32
    assert state.on_answer(reply("b1", attempt=2), now=0.3) == [
        Answer(EDGE.address, STEP.key),
        Forget(STEP.key),
    ]
    session = state.sessions[STEP.session_id]
    assert [session.warm_worker(hop).name for hop in (0, 1)] == ["a1", "b1"]  # type: ignore[union-attr]
    assert record.account.body_bytes == record.account.steps == 0


def test_each_part_has_its_own_attempts() -> None:
    state = make_state()
    serve(state, FIRST, "a1")
    serve(state, SECOND, "b1", "b2")
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.01)
    state.on_failed(failed("a1"), now=0.02)
    state.on_answer(reply("a1", attempt=2), now=0.03, body_bytes=32)
    assert state.on_failed(failed("b1", attempt=3), now=0.04) == [Dispatched("b2", STEP.key, 4, 0)]
    state.on_failed(failed("b2", attempt=4), now=0.05)
    (refuse,) = [a for a in state.on_failed(failed("b1", attempt=5), now=0.06) if type(a) is Refuse]
    assert "worker b1: boom; worker b2: boom" in refuse.reason


def test_a_step_whose_rows_no_next_part_can_use_begins_anew_without_who_gave_them() -> None:
    state = make_chain("b1")
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.01)
    state.on_answer(reply("a1"), now=0.02, body_bytes=5)
    for attempt in (2, 3):
        again = state.on_failed(failed("b1", attempt=attempt), now=0.03)
        assert again == [Dispatched("b1", STEP.key, attempt + 1, 0)]
    actions = state.on_failed(failed("b1", attempt=4), now=0.04)
    assert without_notes(actions) == [Forget(STEP.key), AskStep(EDGE.address, STEP.key)]
    account = state.sessions[STEP.session_id].account
    assert (account.steps, account.body_bytes) == (0, 0)
    assert state.on_step(STEP, None, EDGE, 12, now=0.05) == [Dispatched("a2", STEP.key, 1, 0)]
    state.on_answer(reply("a2"), now=0.06, body_bytes=5)
    for attempt in (2, 3, 4):
        actions = state.on_failed(failed("b1", attempt=attempt), now=0.07)
    (refuse,) = [action for action in actions if isinstance(action, Refuse)]
    assert refuse.reason == "failed 3 times: worker b1: boom"


def test_an_answer_of_a_part_that_the_step_has_passed_is_late() -> None:
    state = make_chain()
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    for tenths in range(2, 22, 2):  # a1 is alive, and slow
        serve(state, FIRST, "a1", "a2", now=tenths / 10)
        serve(state, SECOND, "b1", "b2", now=tenths / 10)
    moved = state.on_tick(now=2.2)
    assert Dispatched("a2", STEP.key, 2, 2_100_000) in moved
    state.on_answer(reply("a2", attempt=2), now=2.3, body_bytes=32)
    assert state.on_answer(reply("a1", attempt=1), now=2.4, body_bytes=32) == []
    assert state.counters["late_answers"] == 1
    assert state.steps[STEP.key].worker_id == "b1"


def test_what_a_later_part_lacks_goes_to_the_edge() -> None:
    state = make_chain()
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    state.on_answer(reply("a1"), now=0.2, body_bytes=32)
    need = Need(*STEP.key, 2, 0, [], "b1")
    assert state.on_answer(need, now=0.3) == [Answer(EDGE.address, STEP.key), Forget(STEP.key)]


def test_a_worker_that_passes_on_fewer_rows_has_failed() -> None:
    state = make_chain()
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    short = structs.replace(reply("a1"), rows=0)
    assert state.on_answer(short, now=0.2) == [Dispatched("a2", STEP.key, 2, 0)]


def test_a_step_waits_for_a_part_whose_last_worker_has_died() -> None:
    state = make_chain("b1")
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    state.on_worker_gone("b1", "died", now=0.2)
    assert state.on_answer(reply("a1"), now=0.3, body_bytes=32) == [PassOn(PASSED_ON)]
    peer = Peer(b"at-b2")
    joined = state.on_announce(Announce("b2", [Service(MODEL, "m", SECOND, 8)], 4, 100), peer, 0.4)
    assert without_notes(joined) == [Dispatched("b2", STEP.key, 2, 100_000)]


def test_all_parts_of_a_route_are_computed_in_one_precision() -> None:
    state = make_state()
    serve(state, FIRST, "a-float", precision="float32")
    serve(state, FIRST, "a-brain", precision="bfloat16")
    serve(state, SECOND, "b-brain", precision="bfloat16")
    (sent,) = state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    assert isinstance(sent, Dispatched)
    assert sent.worker_id == "a-brain"
    in_float = structs.replace(CHAIN, precision="float32")
    (refuse,) = state.on_step(OTHER, in_float, EDGE, 12, now=0.1)
    assert isinstance(refuse, Refuse)
    assert f"no worker serves {SECOND} of the model" in refuse.reason


def test_the_end_of_a_session_reaches_every_part() -> None:
    state = make_chain()
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    state.on_answer(reply("a1"), now=0.2, body_bytes=32)
    state.on_answer(reply("b1", attempt=2), now=0.3)
    assert state.on_end(STEP.session_id, EDGE) == [
        ForwardEnd("a1", STEP.session_id, "", [FIRST]),
        ForwardEnd("b1", STEP.session_id, "", [SECOND]),
    ]


def test_the_end_of_a_session_reaches_who_computes_its_step_and_is_not_warm_yet() -> None:
    state = make_chain()
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    state.on_answer(reply("a1"), now=0.2, body_bytes=32)
    assert state.on_end(STEP.session_id, EDGE) == [
        Forget(STEP.key),
        Cancel("b1", STEP.key, 2, ""),
        ForwardEnd("a1", STEP.session_id, "", [FIRST]),
        ForwardEnd("b1", STEP.session_id, "", [SECOND]),
    ]


def test_a_codec_between_parts_that_was_not_opened_is_refused() -> None:
    state = make_chain()
    (refuse,) = state.on_step(STEP, structs.replace(CHAIN, between=2), EDGE, 12, now=0.1)
    assert isinstance(refuse, Refuse)
    assert refuse.reason == "the route has a codec beyond the 2 that it opened"


def test_a_worker_that_is_late_at_one_part_keeps_the_step_at_the_next() -> None:
    state = make_state()
    both = Announce("both", [Service(MODEL, "m", part, 8) for part in (FIRST, SECOND)], 4, 100)
    arrive(state, both, now=0.0)
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.1)
    serve(state, FIRST, "a1", now=0.1)
    for tenths in range(2, 23, 2):
        arrive(state, both, now=tenths / 10)
        serve(state, FIRST, "a1", now=tenths / 10)
    state.on_tick(now=2.2)
    assert state.steps[STEP.key].worker_id == "a1"
    assert state.on_answer(reply("a1", attempt=2), now=2.25, body_bytes=32) == [
        Cancel("both", STEP.key, 1, ""),
        PassOn(PASSED_ON),
        Dispatched("both", STEP.key, 3, 0),
    ]


def test_a_part_does_not_wait_for_those_who_died_at_the_one_before() -> None:
    state = make_chain("b1")
    state.on_step(STEP, CHAIN, EDGE, 12, now=0.0)
    for tenths in range(34):  # a1 is alive, and slow; the others who get the step fall silent
        now = tenths / 10
        serve(state, FIRST, "a1", *(["a2"] if now < 2.1 else []), now=now)
        serve(state, FIRST, *(["a3"] if 2 < now < 2.8 else []), now=now)
        serve(state, SECOND, "b1", now=now)
        state.on_tick(now)
    assert [name for name, _ in state.steps[STEP.key].failures] == ["a2", "a3"]
    assert state.on_answer(reply("a1"), now=3.4, body_bytes=32) == [
        PassOn(PASSED_ON),
        Dispatched("b1", STEP.key, 4, 0),
    ]


@pytest.mark.parametrize("route", [["2-4", "2-4"], ["2-4", "3-6"], ["4-6", "2-4"], ["2-2", "2-4"]])
def test_a_route_that_is_not_span_after_span_is_refused(route: list[str]) -> None:
    state = make_chain()
    (refuse,) = state.on_step(STEP, structs.replace(CHAIN, route=route), EDGE, 12, now=0.1)
    assert isinstance(refuse, Refuse)
    assert refuse.reason == f"the route {', '.join(route)} is not one span after another"
