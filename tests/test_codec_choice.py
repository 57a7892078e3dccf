"""`--codec auto`: the link is measured, and thin ones get smaller bodies."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from forks import error_line, run_midspan
from msgspec import structs
from pools import GREEDY, PROMPTS
from test_exchange import REPLY, STEP, send

from chaos.far_link import FarLink
from common.codecs.calibration import Calibration, open_calibration
from common.errors import SettingsError
from common.link import Link
from common.protocol.messages import Opening, Step, StepPending
from common.protocol.wire import decode_header, encode_header
from common.spans.cut import read_span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.commands.cost_tables import describe_codecs
from edge_agent.engine import client as client_module
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import Engine
from edge_agent.engine.exchange import Ask, Exchange
from edge_agent.engine.link_meter import LinkMeter
from edge_agent.text.codec_choice import CodecChooser, Cost, measure_costs, pick
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.session_settings import SessionSettings, uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

AUTO = uniform_settings("auto")
THIN = Link(mbit=0.1, rtt_ms=5)
FINE, COARSE = Cost(1000, 0.1), Cost(250, 0.3)


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as pool:
        yield pool


@pytest.fixture(scope="module")
def calibration(demo_ends: ModelEnds) -> Calibration:
    known = open_calibration(None, demo_ends.directory, demo_ends.fingerprint, (2, 6))
    assert known is not None
    return known


@pytest.fixture
def prompt(demo_ends: ModelEnds) -> list[int]:
    return TextTokenizer(demo_ends.directory).encode(PROMPTS[0])


@pytest.mark.parametrize(
    ("link", "chosen"),
    [
        pytest.param(Link(1000, 0.2), 0, id="near"),
        pytest.param(Link(1, 200), 0, id="thin, but the round trip is nearly all"),
        pytest.param(Link(1, 20), 1, id="thin"),
    ],
)
def test_bytes_are_saved_where_that_saves_time(link: Link, chosen: int) -> None:
    assert pick([FINE, COARSE], link) == chosen


def test_a_coarser_codec_is_not_chosen_because_it_was_coded_sooner() -> None:
    assert pick([Cost(1000, 5.0), Cost(900, 0.1)], Link(1000, 0.2)) == 0


def test_costs_are_those_of_real_rows(calibration: Calibration) -> None:
    (row, rows), (small_row, small_rows) = (
        measure_costs(name, calibration.hidden, True, calibration) for name in ("int8", "smallest")
    )
    assert row.row_bytes == 2 * (128 + 2)
    assert rows.row_bytes == 512 * 2 * (128 + 2)
    # what README says of the demo model: 1.2 bits a value
    assert 0.8 < small_rows.row_bytes * 8 / (512 * 2 * 128) < 1.6
    assert small_row.row_bytes < row.row_bytes / 4
    (only_up, _) = measure_costs("int8", calibration.hidden, False, calibration)
    assert only_up.row_bytes == 128 + 2


def test_what_cannot_be_used_is_not_chosen(demo_ends: ModelEnds, calibration: Calibration) -> None:
    assert CodecChooser(AUTO, calibration).choose(demo_ends, THIN).codecs == ["smallest", "fp32"]
    assert CodecChooser(AUTO, None).choose(demo_ends, THIN).codecs == ["int8", "fp32"]
    assert CodecChooser(AUTO, calibration).choose(demo_ends, None).codecs == ["int8", "fp32"]
    parts = replace(AUTO, route=[read_span("2-4"), read_span("4-6")])
    assert CodecChooser(parts, calibration).choose(demo_ends, THIN).codecs == ["int8", "fp32"]


def test_only_what_is_auto_is_chosen(demo_ends: ModelEnds, calibration: Calibration) -> None:
    asked = SessionSettings("auto", "auto", "fp16", "int8")
    chosen = CodecChooser(asked, calibration).choose(demo_ends, THIN)
    assert list(chosen.codec_by_step.values()) == ["smallest", "smallest", "fp16", "int8"]
    assert chosen.chosen_for == THIN
    named = uniform_settings("int8")
    assert CodecChooser(named, calibration).choose(demo_ends, THIN) is named


def test_what_is_to_be_exact_names_its_codecs() -> None:
    with pytest.raises(SettingsError, match="codec auto depends on how the link is just then"):
        CodecChooser(replace(AUTO, exact=True), None)


def test_steps_teach_the_meter_without_what_the_pool_took() -> None:
    meter = LinkMeter()
    opening = Opening("f" * 16, ["2-6"], 128, ["int8"], "")
    slow = structs.replace(REPLY, queue_us=500_000, compute_us=1_400_000)
    for size, took_s in ((100, 2.0), (100_000, 4.0)):
        exchange = Exchange(Ask(STEP, bytes(size), opening, True, True), 60.0, meter, 0.0)
        send(exchange, 0.0)
        exchange.hear(slow, b"", 60, took_s)
    assert meter.link is not None
    assert meter.link.rtt_ms == pytest.approx(100)
    assert meter.link.mbit == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("why", ["it was not answered at once", "others had begun", "others came"])
def test_what_waited_for_something_else_teaches_nothing(why: str) -> None:
    meter = LinkMeter()
    ask = Ask(STEP, b"", Opening("f" * 16, ["2-6"], 128, ["int8"], ""), True, True)
    exchange = Exchange(ask, 60.0, meter, 0.0, is_alone=why != "others had begun")
    send(exchange, 0.0)
    if why == "it was not answered at once":
        exchange.hear(StepPending(*STEP.key), b"", 60, 1.0)
    if why == "others came":
        exchange.on_company()
    exchange.hear(REPLY, b"", 60, 2.0)
    meter.note(8192, 9.0)  # would say how thin it is, if the round trip were known
    assert meter.link is None


@pytest.mark.parametrize("sessions", [1, 2, 3])
def test_only_a_step_beside_no_other_teaches(sessions: int) -> None:
    context = zmq.Context()
    broker = context.socket(zmq.ROUTER)
    port = broker.bind_to_random_port("tcp://127.0.0.1")
    meter = LinkMeter()
    client = BrokerClient([f"tcp://127.0.0.1:{port}"], meter=meter)

    def answer_all() -> None:
        asked = [broker.recv_multipart() for _ in range(sessions)]
        for edge, header, *_ in asked:
            step = decode_header(header)
            assert isinstance(step, Step)
            reply = structs.replace(REPLY, session_id=step.session_id)
            broker.send_multipart([edge, encode_header(reply), b""])

    answering = threading.Thread(target=answer_all)
    answering.start()
    opening = Opening("f" * 16, ["2-6"], 128, ["int8"], "")
    steps = [structs.replace(STEP, session_id=bytes([number] * 16)) for number in range(sessions)]
    keys = [client.send_ahead(Ask(step, b"", opening, True, True)) for step in steps]
    for key in keys:
        client.await_answer(key)
    answering.join()
    meter.note(8192, 9.0)  # says how thin it is, if the round trip is known
    assert (meter.link is not None) == (sessions == 1)
    client.close()
    context.destroy(linger=0)


def test_a_probe_that_never_comes_back_says_how_thin_it_is(
    pool: LocalPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = BrokerClient([pool.edge_endpoint], timeout_s=0.5)
    probe = client._probe
    monkeypatch.setattr(client, "_probe", lambda size: probe(size) if size < 64 << 10 else None)
    link = client.measure_link()
    assert link is not None
    assert link.mbit < 8 * 0.065536 / 0.4
    client.close()


def test_probes_say_how_far_and_thin_a_link_is(pool: LocalPool) -> None:
    link = FarLink(pool.edge_endpoint, rtt_s=0.03, bytes_per_s=125_000)
    client = BrokerClient([link.endpoint])
    measured = client.measure_link()
    assert measured is not None
    assert measured.rtt_ms >= 30
    assert 0.2 < measured.mbit < 1.5
    sent = client.bytes_up
    client.measure_link()
    assert client.bytes_up == sent  # once is enough
    client.close()
    link.close()


def test_a_link_without_a_broker_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PROBE_S", 0.05)
    client = BrokerClient(["tcp://127.0.0.1:1"])
    assert client.measure_link() is None
    client.close()


@pytest.mark.parametrize("way", ["session", "engine"])
def test_a_thin_link_gets_the_smallest_and_says_so(
    pool: LocalPool, demo_ends: ModelEnds, calibration: Calibration, prompt: list[int], way: str
) -> None:
    link = FarLink(pool.edge_endpoint, rtt_s=0.005, bytes_per_s=12_500)
    if way == "session":
        client = BrokerClient([link.endpoint])
        session = Session(demo_ends, client, AUTO, calibration)
        written = list(session.generate(prompt, 12, GREEDY))
        stats = session.stats
        client.close()
    else:
        with Engine(demo_ends, [link.endpoint], AUTO, calibration=calibration) as engine:
            stream = engine.submit(prompt, 12, GREEDY)
            written = [token.token_id for token in stream]
            stats = stream.stats
    link.close()
    assert set(stats.codecs.values()) == {"smallest"}
    told = describe_codecs(stats.to_json())
    assert told.startswith("smallest; chosen for a link of 0.")
    client = pool.connect()
    named = Session(demo_ends, client, uniform_settings("smallest"), calibration)
    assert written == list(named.generate(prompt, 12, GREEDY))
    client.close()


def test_a_codec_that_was_named_is_told_without_a_link(
    pool: LocalPool, demo_ends: ModelEnds, prompt: list[int]
) -> None:
    client = pool.connect()
    session = Session(demo_ends, client, SessionSettings("int8", "int8", "fp16", "bf16"))
    list(session.generate(prompt, 2, GREEDY))
    client.close()
    told = session.stats.to_json()
    assert told["codecs_chosen_for"] is None
    assert describe_codecs(told) == "prompt int8; then fp16 up, bf16 down"


def test_a_link_is_told_as_far_as_it_is_known() -> None:
    stats = {"codecs": AUTO.codec_by_step, "codecs_chosen_for": {"mbit": 2968.393, "rtt_ms": 0.369}}
    told = "auto; chosen for a link of 2,968 Mbit/s, 0.37 ms there and back"
    assert describe_codecs(stats) == told


def test_ask_says_what_it_chose_and_for_which_link(pool: LocalPool) -> None:
    words = ["ask", "--broker", pool.edge_endpoint, "--no-serve", "--codec", "auto"]
    done = run_midspan(*words, "-n", "3", "--json", PROMPTS[0])
    stats = json.loads(done.stdout)["stats"]
    assert set(stats["codecs"]) == {"prompt_up", "prompt_down", "decode_up", "decode_down"}
    assert set(stats["codecs"].values()) <= {"int8", "compact", "smallest"}
    assert stats["codecs_chosen_for"]["mbit"] > 0


def test_auto_stands_alone() -> None:
    with pytest.raises(SettingsError, match="auto chooses both directions; expected it alone"):
        CodecChoice("int8", codec_decode="auto,int8").split()
    assert CodecChoice("auto").split() == ("auto",) * 4


def test_where_codecs_are_measured_one_must_be_named(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    told = error_line("eval", "codec", "stories-llama", "--text", str(text), "--codec", "auto")
    assert "codec 'auto' chooses one by the link; here a codec itself is expected" in told
