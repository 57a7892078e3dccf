"""One step's life at the edge, without sockets and with a clock of our own."""

from __future__ import annotations

import pytest
from msgspec import structs

from common.errors import NoWorker, ProtocolError, SettingsError, StepRefused
from common.protocol.messages import (
    AskAgain,
    Busy,
    Need,
    NeedOpening,
    NeedStep,
    Opening,
    Part,
    Step,
    StepPending,
    StepReply,
)
from common.protocol.messages import StepRefused as StepRefusedMessage
from common.protocol.wire import decode_header, encode_header
from common.settings import MAX_BODY_BYTES
from edge_agent.engine.exchange import Ask, BrokerGone, Exchange
from edge_agent.engine.link_meter import LinkMeter
from edge_agent.engine.session_asks import ALONE_PAUSE_S, SessionAsks

STEP = Step(b"s" * 16, 0, 0, 3, 11, [Part(0, [1], 130)], 1, 0, 60_000)
OPENING = Opening("f" * 16, ["2-6"], 128, ["int8"], "")
REPLY = StepReply(*STEP.key, 1, 1, 11, "w1", 3, 9)


def make(
    is_known: bool = True, waits: bool = True, body: bytes = b"b" * 130, timeout_s: float = 60.0
) -> Exchange:
    return Exchange(Ask(STEP, body, OPENING, is_known, waits), timeout_s, LinkMeter(), now=0.0)


def send(exchange: Exchange, now: float) -> list[bytes]:
    frames = exchange.due(now)
    assert frames is not None
    exchange.on_handed_over(frames, now)
    return frames


def hear(exchange: Exchange, message: object, now: float) -> object:
    return exchange.hear(message, b"", 60, now)  # type: ignore[arg-type]


def kind(frames: list[bytes] | None) -> str:
    return decode_header(frames[0]).kind if frames else ""


def test_a_step_is_sent_and_its_answer_ends_it() -> None:
    exchange = make()
    assert send(exchange, 0.0) == [encode_header(STEP), b"b" * 130]
    assert exchange.due(0.1) is None
    answered = exchange.hear(REPLY, b"row", 63, 0.2)
    assert answered is not None
    assert (answered.answer, answered.body) == (REPLY, b"row")
    assert answered.bytes_up == 130 + len(encode_header(STEP)) + 2 * 2
    assert (answered.bytes_down, answered.asked_again) == (63, 0)


def test_the_opening_goes_along_until_it_is_known_and_when_it_is_wanted() -> None:
    assert send(make(is_known=False), 0.0)[2] == encode_header(OPENING)
    exchange = make()
    assert len(send(exchange, 0.0)) == 2
    hear(exchange, NeedOpening(*STEP.key), 0.1)
    assert send(exchange, 0.1)[2] == encode_header(OPENING)


def test_it_is_asked_for_by_name_after_half_a_second_then_twice_as_late_each_time() -> None:
    exchange = make()
    send(exchange, 0.0)
    assert exchange.due_at == 0.5
    assert kind(send(exchange, 0.5)) == AskAgain(*STEP.key).kind
    assert exchange.due_at == 1.5
    hear(exchange, StepPending(*STEP.key), 0.6)
    assert exchange.due_at == 1.1


def test_only_a_lost_connection_or_a_broker_without_it_has_it_sent_anew() -> None:
    exchange = make()
    send(exchange, 0.0)
    hear(exchange, NeedStep(*STEP.key), 0.1)
    assert kind(send(exchange, 0.1)) == "step"
    assert kind(send(exchange, 0.6)) == "again"
    exchange.on_link_lost()
    assert kind(send(exchange, 1.6)) == "step"


def test_a_silent_broker_is_given_up_and_the_next_gets_the_step() -> None:
    exchange = make()
    send(exchange, 0.0)
    send(exchange, 0.5)
    assert not exchange.check(1.4, "b1")
    assert exchange.check(1.6, "b1")
    exchange.on_other_broker(1.6)
    assert not exchange.check(1.6, "b2")
    assert kind(send(exchange, 1.6)) == "step"


def test_an_edge_that_had_no_time_to_ask_asks_before_it_gives_its_broker_up() -> None:
    exchange = make()
    send(exchange, 0.0)
    assert not exchange.check(4.0, "b1")  # it has computed all the while
    assert kind(send(exchange, 4.0)) == "again"
    assert not exchange.check(4.9, "b1")
    assert exchange.check(5.0, "b1")
    exchange.on_other_broker(5.0)
    send(exchange, 5.0)
    assert not exchange.check(9.0, "b2")


def test_what_is_on_its_way_over_a_thin_link_is_waited_for() -> None:
    exchange = make(body=bytes(40_000))
    send(exchange, 0.0)
    send(exchange, 0.5)
    assert not exchange.check(11.0, "b1")  # 10 s at 4 KB/s, and 1.5
    assert exchange.check(11.7, "b1")


def test_busy_comes_back_when_it_was_told_to() -> None:
    exchange = make()
    send(exchange, 0.0)
    hear(exchange, Busy(*STEP.key, 200), 0.1)
    assert 0.2 <= exchange.due_at <= 0.4
    assert exchange.due(0.15) is None
    assert kind(send(exchange, 0.4)) == "step"


def test_refusals_raise_unless_a_worker_is_waited_for() -> None:
    gone = StepRefusedMessage(*STEP.key, "no_worker", "nobody")
    exchange = make()
    send(exchange, 0.0)
    hear(exchange, gone, 0.1)
    assert kind(send(exchange, 0.35)) == "step"
    with pytest.raises(NoWorker, match="nobody"):
        hear(make(waits=False), gone, 0.1)
    with pytest.raises(StepRefused, match="boom"):
        hear(make(), StepRefusedMessage(*STEP.key, "failed", "boom"), 0.1)


def test_a_need_is_an_answer() -> None:
    need = Need(*STEP.key, 1, 4, [], "w1")
    answered = make().hear(need, b"", 50, 0.1)
    assert answered is not None
    assert answered.answer == need


def test_time_runs_out_with_what_is_known() -> None:
    silent = make(timeout_s=5.0)
    send(silent, 0.0)
    with pytest.raises(BrokerGone):
        silent.check(5.1, "b1")
    heard = make(timeout_s=5.0)
    send(heard, 0.0)
    hear(heard, StepPending(*STEP.key), 4.9)
    with pytest.raises(StepRefused, match="the broker at b1 has the step, but no worker"):
        heard.check(5.1, "b1")


def test_a_body_that_no_broker_takes_is_refused_at_once() -> None:
    with pytest.raises(SettingsError, match="brokers take"):
        make(body=bytes(MAX_BODY_BYTES + 1))


def test_what_cannot_be_handed_over_is_tried_again_in_full() -> None:
    exchange = make()
    assert exchange.due(0.0) is not None
    exchange.on_not_handed_over(0.0, 0.02)
    assert exchange.due(0.01) is None
    assert kind(send(exchange, 0.02)) == "step"


def test_the_rate_is_learnt_from_what_came_through() -> None:
    meter = LinkMeter()
    exchange = Exchange(Ask(STEP, bytes(100_000), OPENING, True, True), 60.0, meter, 0.0)
    send(exchange, 0.0)
    hear(exchange, REPLY, 2.0)
    assert meter.travel_s(50_000) == pytest.approx(4.0, rel=0.01)


def test_a_step_with_a_pause_is_sent_after_it() -> None:
    ask = Ask(STEP, b"", OPENING, True, True, pause_s=1.0)
    exchange = Exchange(ask, 10.0, LinkMeter(), 100.0)
    assert exchange.due(100.5) is None
    assert exchange.due_at == 101.0
    assert exchange.due(101.0) is not None


def test_only_who_is_alone_gets_a_step_once_more_after_a_pause() -> None:
    asks = SessionAsks(OPENING)
    spoilt = ProtocolError("nonsense")

    def ask() -> Ask:
        return asks.make(
            position=0, parts=STEP.parts, body=b"", reply_codec=0, deadline_s=1, reply_bytes=0
        )

    asks.on_unusable(REPLY, spoilt)
    first = ask()
    assert (first.pause_s, first.step.shun) == (0.0, "w1")
    asks.on_unusable(REPLY, spoilt)
    again = ask()
    assert again.pause_s == ALONE_PAUSE_S
    with pytest.raises(StepRefused, match="3 answers could not be used: nonsense"):
        asks.on_unusable(structs.replace(REPLY, worker_id="w2"), spoilt)
    asks.begin_work()
    asks.on_unusable(structs.replace(REPLY, worker_id="w2"), spoilt)
    asks.on_unusable(REPLY, spoilt)
    assert ask().pause_s == 0.0
