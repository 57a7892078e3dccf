"""A device without a tail: the last worker has the LM head and answers with logits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from click.testing import CliRunner
from forks import run_midspan
from pools import GREEDY, PROMPTS, reference_tokens
from test_takeover import Answers

from cloud_worker.loop.batcher import Task
from cloud_worker.serving import ServingSettings, load_text_service
from cloud_worker.state.memory_store import MemoryKvStore
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.text.service import TextService
from common.codecs.calibration import open_calibration
from common.codecs.codec import make_codec
from common.errors import ProtocolError, SettingsError
from common.protocol.messages import Opening, Part, Step
from common.settings import PREFILL_ROWS
from common.spans.cut import Span, find_route, parse_cut, read_span
from common.spans.parts import ends_of, middle_of
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.drafting.choice import Drafters
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.remote_middle import RemoteMiddle
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.served_parts import pick_part
from edge_agent.text.session import Session
from edge_agent.text.session_settings import SessionSettings, settle, uniform_settings
from edge_agent.text.text_session import TextSession
from edge_agent.text.tokenizer import TextTokenizer

NEW_TOKENS = 32
SPANS = (Span(2, 5), Span(5, 8, with_end=True))
LOGITS_AS = {
    "fp32": uniform_settings("fp32"),
    "top": SessionSettings("fp32", "top5", "fp32", "top3"),
    "zstd": SessionSettings("fp32", "fp32+zstd", "fp32", "top3+zstd"),
    "rows": uniform_settings("fp32", prefill_rows=4),
}


@pytest.fixture(scope="module")
def ends(demo_ends: ModelEnds) -> ModelEnds:
    return load_ends(demo_ends.directory, "2:")


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, span="2:")) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(demo_ends: ModelEnds) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return [tokenizer.encode(prompt) for prompt in PROMPTS[:3]]


@pytest.fixture(scope="module")
def reference(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return reference_tokens(whole_model, tokenizer, PROMPTS[:3], NEW_TOKENS)


def write(
    pool: LocalPool,
    ends: ModelEnds,
    prompt: list[int],
    settings: SessionSettings,
    harm: Callable[[Session], None] = lambda session: None,
) -> list[int]:
    """A text, with `harm` done in its middle."""
    client = pool.connect()
    session = Session(ends, client, settings)
    tokens = []
    for token in session.generate(prompt, NEW_TOKENS, GREEDY):
        tokens.append(token)
        if len(tokens) == NEW_TOKENS // 2:
            harm(session)
    client.close()
    return tokens


@pytest.mark.parametrize("drafters", [None, Drafters("ngram")], ids=["alone", "with guesses"])
@pytest.mark.parametrize("name", LOGITS_AS)
def test_many_sessions_write_what_the_whole_model_writes(
    name: str,
    drafters: Drafters | None,
    pool: LocalPool,
    ends: ModelEnds,
    prompts: list[list[int]],
    reference: list[list[int]],
) -> None:
    with Engine(ends, [pool.edge_endpoint], LOGITS_AS[name], drafters=drafters) as engine:
        streams = [engine.submit(prompt, NEW_TOKENS) for prompt in prompts]
        assert [[token.token_id for token in stream] for stream in streams] == reference
    if drafters is not None:  # the logits that come back check them
        assert sum(stream.stats.accepted["ngram"] for stream in streams) > 0


def test_no_logits_are_drafted_for_that_would_take_too_long(ends: ModelEnds) -> None:
    """65,536 bytes of them, or guesses would be dearer than the round trips that they save."""
    counts = {}
    for codec in ("fp32", "top3"):
        settings = SessionSettings("fp32", "fp32", "fp32", codec)
        wide = dataclasses.replace(ends, vocabulary=50_000)
        counts[codec] = RemoteMiddle(wide, settle(settings, wide)).most_drafts
    assert counts["fp32"] == 0
    assert counts["top3"] > 16


@pytest.mark.parametrize("other", [str(SPANS[1]), "2-8e"])
def test_a_chain_whose_last_part_dies_goes_on_over_another(
    other: str, ends: ModelEnds, prompts: list[list[int]], reference: list[list[int]]
) -> None:
    with LocalPool(PoolSettings(workers=0)) as pool:
        for span in (*SPANS, other):
            pool.start_worker(span=str(span))
        pool.wait_for_workers(3)
        written = write(
            pool,
            ends,
            prompts[0],
            uniform_settings("fp32", route=SPANS),
            lambda session: pool.kill_worker(session.last_worker_id),
        )
    assert written == reference[0]


def test_a_second_turn_sends_what_is_new(
    pool: LocalPool, ends: ModelEnds, prompts: list[list[int]], reference: list[list[int]]
) -> None:
    with Engine(ends, [pool.edge_endpoint], LOGITS_AS["fp32"]) as engine:
        talk = engine.open()
        first = talk.submit(prompts[0], 4)
        list(first)
        second = talk.submit([*prompts[0], *reference[0][:6]], 4)
        assert [token.token_id for token in second] == reference[0][6:10]
    row = 4 * ends.hidden
    assert second.stats.prompt_bytes_up < 5 * row < first.stats.prompt_bytes_up


def test_sampling_needs_no_more_logits_than_it_looks_at(
    pool: LocalPool, ends: ModelEnds, demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    sampling = SamplingSettings(temperature=0.9, top_k=20, seed=7)
    written = []
    for settings in (uniform_settings("fp32"), SessionSettings("fp32", "top20", "fp32", "top20")):
        with Engine(ends, [pool.edge_endpoint], settings) as engine:
            stream = engine.submit(prompts[1], NEW_TOKENS, sampling)
            written.append([token.token_id for token in stream])
    assert written[0] == written[1]
    assert len(set(written[0])) > 5


def test_a_prompt_is_scored_as_the_whole_model_scores_it(
    pool: LocalPool, ends: ModelEnds, whole_model: torch.nn.Module, prompts: list[list[int]]
) -> None:
    ids = torch.tensor(prompts[0])
    with torch.inference_mode():
        whole = whole_model(ids[None]).logits[0].log_softmax(-1)
    wanted = [whole[at, token].item() for at, token in enumerate(prompts[0][1:])]
    with Engine(ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        stream = engine.submit(prompts[0], 1, score_prompt=True)
        list(stream)
    assert [scored.logprob for scored in stream.prompt_logprobs] == pytest.approx(wanted, abs=1e-4)


def test_logits_of_many_rows_come_a_few_rows_at_a_time(
    ends: ModelEnds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.text.remote_middle.LOGIT_BYTES", 3 * 4 * ends.vocabulary)
    middle = RemoteMiddle(ends, settle(uniform_settings("fp32"), ends))
    assert (middle.rows_at_once(True), middle.rows_at_once(False)) == (3, PREFILL_ROWS)


def test_the_command_line_asks_such_a_pool(
    pool: LocalPool, demo_ends: ModelEnds, reference: list[list[int]]
) -> None:
    options = ["--broker", pool.edge_endpoint, "--span", "2:", "--codec", "int8,top3", "--json"]
    options += ["-n", str(NEW_TOKENS), "--temperature", "0", "--no-serve", "--threads", "1"]
    done = run_midspan("ask", PROMPTS[0], *options)
    assert done.returncode == 0, done.stderr
    text = TextTokenizer(demo_ends.directory).decode(reference[0])
    assert json.loads(done.stdout)["text"].strip() == text.strip()


# --- spans and cuts


def test_what_follows_the_last_layer_is_a_part_of_its_own() -> None:
    cut = parse_cut("-3:", 8)
    assert (str(cut), str(cut.middle), cut.tail(8)) == ("5:", "5-8e", Span(8, 8))
    assert parse_cut("5-8e", 8) == cut
    assert read_span("5-8e") != read_span("5-8")
    assert str(ends_of(cut, 8)) == "b 0-5"
    assert str(middle_of(cut)) == "5-8 e"


@pytest.mark.parametrize("text", ["2-6e", "2:6e"])
def test_the_lm_head_goes_with_the_last_layer_only(text: str) -> None:
    with pytest.raises(SettingsError, match=r"ends at layer 6 of 8; what follows the last layer"):
        parse_cut(text, 8)


def test_a_route_ends_where_its_middle_ends() -> None:
    with_end, without = Span(5, 8, with_end=True), Span(5, 8)
    served = [Span(2, 5), with_end]
    assert find_route(served, Span(2, 8, with_end=True)) == served
    assert find_route(served, Span(2, 8)) == []
    assert find_route([*served, without], Span(2, 8)) == [Span(2, 5), without]


def test_an_edge_that_asks_for_nothing_else_keeps_its_tail() -> None:
    def worker(part: str) -> dict[str, object]:
        return {"state": "ready", "services": [{"model": "m", "part": part}]}

    report = {"workers": [worker("2-8e"), worker("2-8e"), worker("2-6")]}
    assert pick_part(report, "m", 8) == "2-6"
    assert pick_part({"workers": report["workers"][:2]}, "m", 8) is None


def test_what_is_said_once_is_for_boundary_rows(ends: ModelEnds, demo_ends: ModelEnds) -> None:
    settings = SessionSettings("int8", "int8", "int4", "top7")
    assert settle(settings, ends) == SessionSettings("int8", "fp32", "int4", "top7")
    assert settle(settings, demo_ends) == settings


# --- what is refused


@pytest.mark.parametrize(
    ("codecs", "words"),
    [
        (("top5", "fp32", "fp32", "fp32"), "codec top5 is for logits"),
        (("fp32", "fp32", "fp32", "compact"), "codec compact is for boundary rows"),
    ],
)
def test_codecs_are_for_rows_or_for_logits(
    codecs: tuple[str, str, str, str], words: str, ends: ModelEnds
) -> None:
    calibration = open_calibration(None, ends.directory, ends.fingerprint, (2, 6))
    with pytest.raises(SettingsError, match=words):
        TextSession(ends, SessionSettings(*codecs), calibration)


def test_an_edge_with_a_tail_wants_no_logits(demo_ends: ModelEnds) -> None:
    with pytest.raises(SettingsError, match="codec top5 is for logits"):
        TextSession(demo_ends, SessionSettings("int8", "top5", "int8", "int8"))


def test_tokens_that_were_left_out_are_not_scored(
    ends: ModelEnds, prompts: list[list[int]]
) -> None:
    session = TextSession(ends, LOGITS_AS["top"])
    with pytest.raises(SettingsError, match="codec top5 leaves tokens out"):
        next(session.answer(prompts[0], 1, GREEDY, score_prompt=True))


def test_a_body_of_likeliest_tokens_that_lies_is_refused() -> None:
    codec = make_codec("top2", "down")
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    assert codec.decode(codec.encode(logits), 2, 9).topk(2).indices.equal(logits.topk(2).indices)
    with pytest.raises(ProtocolError, match="names a token beyond the 5 that are"):
        codec.decode(codec.encode(torch.arange(9.0)[None]), 1, 5)
    with pytest.raises(ProtocolError, match="body has 31 bytes"):
        codec.decode(codec.encode(logits)[1:], 2, 9)


def task_of(service: TextService, rows: int, codecs: list[str], *more_parts: str) -> Task:
    offered = service.service
    body = make_codec("fp32", "up").encode(torch.zeros(rows, offered.hidden))
    opening = Opening(offered.model, [offered.part, *more_parts], offered.hidden, codecs, "")
    step = Step(b"s" * 16, 0, 0, 0, 0, [Part(0, [rows], len(body))], rows, len(codecs) - 1, 60_000)
    return Task(step, opening, body, 1, 0, 0, 0.0)


@pytest.mark.parametrize(
    ("span", "rows", "codecs", "more", "words"),
    [
        ("2:", 2, ["fp32"], ["8-9"], "part 2-8e gives logits, so none can come after it"),
        ("2:", 9, ["fp32"], [], "step wants the logits of 9 rows; at most 4 come at once"),
        ("2:6", 2, ["fp32", "top5"], [], "codec top5 is for logits; this part has none"),
    ],
)
def test_a_worker_refuses_what_it_cannot_answer(
    span: str,
    rows: int,
    codecs: list[str],
    more: list[str],
    words: str,
    demo_ends: ModelEnds,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 4 * 4 * demo_ends.vocabulary
    monkeypatch.setattr("cloud_worker.text.executor.MOST_LOGIT_BYTES", limit)
    make = load_text_service(
        demo_ends.directory, span, None, MemoryKvStore(), ServingSettings(), CacheBudget(1 << 20)
    )
    service = make(Answers("w"))
    assert isinstance(service, TextService)
    with pytest.raises(ProtocolError, match=words):
        service._executor.check(task_of(service, rows, codecs, *more))


def test_check_and_plan_count_the_lm_head_where_it_is() -> None:
    def parts(span: str) -> dict[str, int]:
        output = CliRunner().invoke(midspan, ["check", "--span", span, "--json"]).output
        return {name: p["weight_bytes"] for name, p in json.loads(output)["parts"].items()}

    with_tail, without = parts("2:8"), parts("2:")
    assert without["tail"] == 0
    assert without["middle"] == with_tail["middle"] + with_tail["tail"]
    plan = ["plan", "stories-llama", "--devices", "2GB", "--span", "2:", "--json"]
    (worker,) = json.loads(CliRunner().invoke(midspan, plan).output)["workers"]
    assert worker["span"] == "2-8e"
    assert worker["weight_bytes"] == without["middle"]
