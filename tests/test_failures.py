"""What breaks in the middle of a generation, and the tokens that stay the same all the while."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis
import torch
from pools import PROMPTS, generate, generate_together, record_of, reference_tokens

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

NEW_TOKENS = 64
HARM_AT = 30  # tokens


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture(scope="module")
def prompt_ids(demo_ends: ModelEnds) -> list[int]:
    return TextTokenizer(demo_ends.directory).encode(PROMPTS[3])


@pytest.fixture(scope="module")
def reference(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> list[int]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return reference_tokens(whole_model, tokenizer, [PROMPTS[3]], NEW_TOKENS)[0]


def generate_with_harm(
    pool: LocalPool,
    ends: ModelEnds,
    prompt_ids: list[int],
    harm: Callable[[Session], None],
) -> tuple[list[int], Session]:
    def on_token(index: int, session: Session) -> None:
        if index == HARM_AT:
            harm(session)

    return generate(pool, ends, prompt_ids, NEW_TOKENS, on_token=on_token)


def wait_until_committed(pool: LocalPool, session: Session) -> None:
    """Until Redis has all rows that the workers have computed."""
    client = redis.Redis.from_url(pool.redis_url)
    key = record_of(session)
    give_up_at = time.monotonic() + 10
    want = session.stats.prompt_tokens + session.stats.new_tokens - 1
    while int(client.hget(key, "position") or 0) < want:
        assert time.monotonic() < give_up_at


def test_the_warm_worker_is_killed(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def harm(session: Session) -> None:
        wait_until_committed(pool, session)
        pool.kill_worker(session.last_worker_id)

    tokens, session = generate_with_harm(pool, demo_ends, prompt_ids, harm)
    assert tokens == reference
    assert len(session.stats.tokens_by_worker) == 2
    assert session.stats.rows_replayed == 0  # Redis had them


def test_every_worker_is_killed_and_a_new_one_starts_two_seconds_later(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    timers: list[threading.Timer] = []

    def harm(_: Session) -> None:
        for name in list(pool.workers):
            pool.kill_worker(name)
        timers.append(threading.Timer(2.0, pool.start_worker))
        timers[0].start()

    tokens, session = generate_with_harm(pool, demo_ends, prompt_ids, harm)
    timers[0].join()
    assert tokens == reference
    assert "w3" in session.stats.tokens_by_worker


def test_redis_is_flushed(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def harm(session: Session) -> None:
        wait_until_committed(pool, session)
        redis.Redis.from_url(pool.redis_url).flushall()
        pool.kill_worker(session.last_worker_id)

    tokens, session = generate_with_harm(pool, demo_ends, prompt_ids, harm)
    assert tokens == reference
    assert session.stats.rows_replayed == len(prompt_ids) + HARM_AT - 1


def test_redis_is_flushed_and_the_warm_worker_commits_everything_again(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def on_token(index: int, session: Session) -> None:
        if index == HARM_AT:
            redis.Redis.from_url(pool.redis_url).flushall()
        if index == HARM_AT + 10:
            wait_until_committed(pool, session)
            pool.kill_worker(session.last_worker_id)

    tokens, session = generate(pool, demo_ends, prompt_ids, NEW_TOKENS, on_token=on_token)
    assert tokens == reference
    assert session.stats.rows_replayed == 0


def test_redis_is_stopped_and_restarted_empty(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    assert pool.redis is not None
    embedded = pool.redis

    def on_token(index: int, session: Session) -> None:
        if index == HARM_AT:
            embedded.child.kill()
        if index == HARM_AT + 10:
            embedded.restart()
            pool.kill_worker(session.last_worker_id)

    tokens, session = generate(pool, demo_ends, prompt_ids, NEW_TOKENS, on_token=on_token)
    assert tokens == reference
    assert session.stats.rows_replayed > 0


def test_the_broker_is_restarted(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def harm(_: Session) -> None:
        assert pool.broker is not None
        pool.broker.kill()
        pool.start_broker()

    tokens, session = generate_with_harm(pool, demo_ends, prompt_ids, harm)
    assert tokens == reference
    assert session.stats.rows_replayed == 0


@pytest.mark.parametrize("redis_dies", [False, True])
def test_a_cache_that_holds_no_session_changes_no_token(
    demo_ends: ModelEnds, whole_model: torch.nn.Module, redis_dies: bool
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    prompts = PROMPTS[:6]
    references = reference_tokens(whole_model, tokenizer, prompts, 24)
    options = ["--cache-mb", "0", "--max-batch-steps", "2"]
    with LocalPool(PoolSettings(workers=1, worker_options=options)) as tiny:
        if redis_dies:
            assert tiny.redis is not None
            tiny.redis.child.kill()
        prompts_ids = [tokenizer.encode(prompt) for prompt in prompts]
        assert generate_together(tiny, demo_ends, prompts_ids, 24) == references


def test_a_pool_that_cannot_keep_a_session_anywhere_says_so(demo_ends: ModelEnds) -> None:
    ids = (TextTokenizer(demo_ends.directory).encode(PROMPTS[0]) * 20)[:300]
    other = (TextTokenizer(demo_ends.directory).encode(PROMPTS[1]) * 20)[:300]
    options = ["--cache-mb", "0"]
    with LocalPool(PoolSettings(workers=1, worker_options=options)) as tiny:
        assert tiny.redis is not None
        tiny.redis.child.kill()
        both = generate_together(tiny, demo_ends, [ids, other], 2)
        assert [len(tokens) for tokens in both] == [2, 2]


def test_a_whole_pool_killed_at_once_leaves_the_broker_alive(
    demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    with LocalPool(PoolSettings(workers=3)) as three:
        timers: list[threading.Timer] = []

        def harm(_: Session) -> None:
            for child in three.workers.values():
                child.signal(signal.SIGKILL)
            three.workers.clear()
            timers.append(threading.Timer(0.5, three.start_worker))
            timers[0].start()

        tokens, _ = generate_with_harm(three, demo_ends, prompt_ids, harm)
        timers[0].join()
        assert tokens == reference
        assert three.broker is not None
        three.broker.check()


def test_workers_that_pause_together_lose_nothing(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    references = reference_tokens(whole_model, tokenizer, PROMPTS[:4], NEW_TOKENS)
    with LocalPool(PoolSettings(workers=3)) as three:
        children = list(three.workers.values())

        def pause_and_wake(number: signal.Signals) -> None:
            for child in children:
                child.signal(number)

        timers = [
            threading.Timer(0.15, pause_and_wake, [signal.SIGSTOP]),
            threading.Timer(1.65, pause_and_wake, [signal.SIGCONT]),
        ]
        for timer in timers:
            timer.start()
        prompts_ids = [tokenizer.encode(prompt) for prompt in PROMPTS[:4]]
        assert generate_together(three, demo_ends, prompts_ids, NEW_TOKENS) == references


def test_a_drained_worker_hands_its_session_over(
    pool: LocalPool, demo_ends: ModelEnds, prompt_ids: list[int], reference: list[int]
) -> None:
    def harm(session: Session) -> None:
        pool.drain_worker(session.last_worker_id)

    tokens, session = generate_with_harm(pool, demo_ends, prompt_ids, harm)
    assert tokens == reference
    assert session.stats.rows_replayed == 0
    assert len(session.stats.tokens_by_worker) == 2
