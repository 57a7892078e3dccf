"""Several spans in a row: a step passes them in the broker, and every fault leaves the tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import redis
import torch
from pools import GREEDY, PROMPTS, count_records, reference_tokens

from common.errors import NoWorker, SettingsError
from common.spans.cut import Span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.text_session import SessionSettings, TextSession, uniform_settings
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
    with pytest.raises(NoWorker, match="no worker serves 2-4 of the model"):
        write(pool, demo_ends, prompt_ids, settings=uniform_settings("fp32", route=route))
    route = (Span(2, 3), Span(3, 6))
    with pytest.raises(NoWorker, match="no worker serves 3-6 of the model"):
        write(pool, demo_ends, prompt_ids, settings=uniform_settings("fp32", route=route))


@pytest.mark.parametrize("route", [SPANS[:2], SPANS[1:], (SPANS[0], SPANS[2]), SPANS[::-1]])
def test_a_route_covers_the_middle_without_gaps(
    demo_ends: ModelEnds, route: tuple[Span, ...]
) -> None:
    with pytest.raises(SettingsError, match="is not the middle 2-6, span after span"):
        TextSession(demo_ends, uniform_settings("fp32", route=route))
