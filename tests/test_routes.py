"""Several spans in a row: a step passes them in the broker, and every fault leaves the tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
import redis
import torch
from forks import run_midspan
from pools import GREEDY, PROMPTS, count_records, reference_tokens
from waiting import wait_until

from common.codecs.calibration import open_calibration
from common.errors import NoWorker, SettingsError
from common.spans.cut import Span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.session_settings import SessionSettings, uniform_settings
from edge_agent.text.text_session import TextSession
from edge_agent.text.tokenizer import TextTokenizer

NEW_TOKENS = 48
HARM_AT = 20
SPANS = (Span(2, 3), Span(3, 5), Span(5, 6))
MIDDLE = str(SPANS[1])


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=0)) as running:
        for span in SPANS:
            running.start_worker(span=str(span))
        running.wait_for_workers(len(SPANS))
        yield running


@pytest.fixture(scope="module")
def prompt_ids(demo_ends: ModelEnds) -> list[int]:
    return TextTokenizer(demo_ends.directory).encode(PROMPTS[2])


@pytest.fixture(scope="module")
def reference(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> list[int]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return reference_tokens(whole_model, tokenizer, [PROMPTS[2]], NEW_TOKENS)[0]


def write(
    pool: LocalPool,
    ends: ModelEnds,
    prompt_ids: list[int],
    harm: Callable[[Session], None] = lambda session: None,
    settings: SessionSettings | None = None,
) -> tuple[list[int], Session]:
    """A text through three workers, with `harm` done after some tokens."""
    client = pool.connect(timeout_s=60)
    settings = settings or uniform_settings("fp32", route=SPANS, prefill_rows=4)
    session = Session(ends, client, settings)
    tokens = []
    try:
        for token in session.generate(prompt_ids, NEW_TOKENS, GREEDY):
            tokens.append(token)
            if len(tokens) == HARM_AT:
                harm(session)
    finally:
        client.close()
    return tokens, session


def worker_of(pool: LocalPool, span: str) -> str:
    client = pool.connect()
    try:
        workers = client.status(timeout_s=5)["workers"]
    finally:
        client.close()
    (name,) = [w["worker_id"] for w in workers if w["services"][0]["part"] == span]
    return str(name)


def replace_middle(pool: LocalPool) -> None:
    pool.kill_worker(worker_of(pool, MIDDLE))
    pool.start_worker(span=MIDDLE)


def test_the_tokens_are_those_of_the_unsplit_model(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    tokens, session = write(pool, demo_ends, prompt_ids)
    assert tokens == reference
    assert session.stats.rows_replayed == 0
    assert session.stats.tokens_by_worker.keys() == {worker_of(pool, str(SPANS[-1]))}


def test_the_middle_worker_is_killed_and_another_finds_its_rows_in_the_store(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    tokens, session = write(pool, demo_ends, prompt_ids, lambda session: replace_middle(pool))
    assert tokens == reference
    assert session.stats.rows_replayed == 0


def test_the_middle_worker_is_killed_and_redis_flushed(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def harm(session: Session) -> None:
        pool.kill_worker(worker_of(pool, MIDDLE))  # first, or it would commit its rows again
        redis.Redis.from_url(pool.redis_url).flushall()
        pool.start_worker(span=MIDDLE)

    tokens, session = write(pool, demo_ends, prompt_ids, harm)
    assert tokens == reference
    assert session.stats.rows_replayed >= len(prompt_ids) + HARM_AT - 1


@pytest.mark.parametrize("is_flushed", [False, True], ids=["the store", "the edge"])
def test_long_prompts_are_on_all_spans_at_once_while_the_middle_worker_is_killed(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module, is_flushed: bool
) -> None:
    """What it knew comes back from the store, or from the edge if that is empty."""
    text = (demo_ends.directory / "validation.txt").read_text()[:20_000]
    tokenizer = TextTokenizer(demo_ends.directory)
    ids = tokenizer.encode(text)
    prompts = [ids[at : at + 400] for at in range(0, 1600, 400)]
    wanted = [
        whole_model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=8,
            do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    settings = uniform_settings("fp32", route=SPANS)
    with Engine(demo_ends, [pool.edge_endpoint], settings) as engine:
        streams = [engine.submit(prompt, 8, GREEDY) for prompt in prompts]
        if is_flushed:
            redis.Redis.from_url(pool.redis_url).flushall()
        replace_middle(pool)
        for stream, tokens in zip(streams, wanted, strict=True):
            assert [each.token_id for each in stream] == tokens


def test_the_end_of_a_session_frees_what_every_span_left_in_the_store(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    store = redis.Redis.from_url(pool.redis_url)
    stored: list[int] = []
    write(pool, demo_ends, prompt_ids, lambda session: stored.append(count_records(store)))
    assert stored == [len(SPANS)]
    client = pool.connect()
    client.status(timeout_s=5)  # what was sent before has been read
    client.close()
    for name in list(pool.workers):
        pool.drain_worker(name)
    assert count_records(store) == 0


def test_a_lossy_codec_between_the_spans_is_the_edges_choice(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    exact = uniform_settings("int8", route=SPANS)
    lossy = uniform_settings("int8", route=SPANS, between="int4")
    (first, _), (second, _) = (
        write(pool, demo_ends, prompt_ids, settings=settings) for settings in (exact, lossy)
    )
    assert len(first) == len(second) == NEW_TOKENS
    assert first != second


def test_a_span_that_nobody_serves_is_named(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    route = (Span(2, 4), Span(4, 6))
    pool.kill_worker(worker_of(pool, str(SPANS[-1])))  # no others make up the layers now
    with pytest.raises(NoWorker, match="no worker serves 2-4 of the model"):
        write(pool, demo_ends, prompt_ids, settings=uniform_settings("fp32", route=route))
    route = (Span(2, 3), Span(3, 6))
    with pytest.raises(NoWorker, match="no worker serves 3-6 of the model"):
        write(pool, demo_ends, prompt_ids, settings=uniform_settings("fp32", route=route))


def test_a_session_whose_span_is_served_by_nobody_goes_over_those_that_are(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    """Nobody told it which."""
    tokens, session = write(pool, demo_ends, prompt_ids, settings=uniform_settings("fp32"))
    assert tokens == reference
    assert session.stats.detours == 1
    assert session.stats.tokens_by_worker.keys() == {worker_of(pool, str(SPANS[-1]))}


@pytest.mark.parametrize("driver", ["a thread", "an engine"])
def test_a_span_that_goes_is_made_up_by_others_at_once(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int], driver: str
) -> None:
    """2-3, 3-5, 5-6 while 2-6 is there; then that again, when 3-5 has gone, too."""
    store = redis.Redis.from_url(pool.redis_url)
    whole = pool.start_worker(span="2-6")
    pool.wait_for_workers(4)

    def harm(count: int, is_over: Callable[[], bool] = lambda: False) -> None:
        if count == 10:
            pool.kill_worker(whole)
        if count == 30:
            pool.start_worker(span="2-6")
            pool.wait_for_workers(4)
            if is_over():  # a worker that is killed while it forgets a session leaves what it has
                wait_until(lambda: count_records(store) == 0)
            pool.kill_worker(worker_of(pool, MIDDLE))

    tokens = []
    if driver == "a thread":
        client = pool.connect(timeout_s=60)
        session = Session(demo_ends, client, uniform_settings("fp32"))
        for token in session.generate(prompt_ids, NEW_TOKENS, GREEDY):
            tokens.append(token)
            harm(len(tokens))
        stats = session.stats
        client.close()
    else:
        with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
            stream = engine.submit(prompt_ids, NEW_TOKENS, GREEDY)
            for each in stream:
                tokens.append(each.token_id)
                harm(len(tokens), lambda: not stream.conversation.is_answering)
            stats = stream.stats
    assert tokens == reference
    # an engine does not wait for who reads: it may be done before the second harm
    assert stats.detours in ((2,) if driver == "a thread" else (1, 2))
    assert stats.rows_replayed > stats.detours * len(prompt_ids)
    wait_until(lambda: count_records(store) == 0)  # nothing is left of the ways before


def test_sessions_after_one_that_took_a_detour_begin_on_its_way(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    with Engine(demo_ends, [pool.edge_endpoint], uniform_settings("fp32")) as engine:
        streams = []
        for _ in range(2):
            streams.append(engine.submit(prompt_ids, 8, GREEDY))
            assert [token.token_id for token in streams[-1]] == reference[:8]
    assert [stream.stats.detours for stream in streams] == [1, 0]


def test_ask_is_answered_by_spans_in_a_row_that_nobody_has_named(
    pool: LocalPool, reference: list[int]
) -> None:
    options = ["--broker", pool.edge_endpoint, "-n", "8", "--codec", "fp32", "--json"]
    done = run_midspan("ask", PROMPTS[2], *options)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["token_ids"] == reference[:8]
    assert said["stats"]["detours"] == 0  # it had looked before


def test_a_codec_that_builds_on_what_was_sent_takes_no_detour(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int]
) -> None:
    calibration = open_calibration(None, demo_ends.directory, demo_ends.fingerprint, (2, 6))
    client = pool.connect()
    session = Session(demo_ends, client, uniform_settings("compact"), calibration)
    with pytest.raises(NoWorker, match="no worker serves 2-6 of the model"):
        list(session.generate(prompt_ids, 1, GREEDY))
    client.close()


@pytest.mark.parametrize("route", [SPANS[:2], SPANS[1:], (SPANS[0], SPANS[2]), SPANS[::-1]])
def test_a_route_covers_the_middle_without_gaps(
    demo_ends: ModelEnds, route: tuple[Span, ...]
) -> None:
    with pytest.raises(SettingsError, match="is not the middle 2-6, span after span"):
        TextSession(demo_ends, uniform_settings("fp32", route=route))
