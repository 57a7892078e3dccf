"""Many sessions in one engine: the tokens of each are its own, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Iterator

import pytest
import torch
from pools import PROMPTS

from common.errors import BrokerUnavailable, EngineClosed, SettingsError, TooManySessions
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.engine.streams import TokenStream
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

COUNT = 24
EXACT = uniform_settings("fp32")


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture
def engine(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Engine]:
    with Engine(demo_ends, [pool.edge_endpoint], EXACT) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(demo_ends: ModelEnds) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_ends.directory)
    return [tokenizer.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def wanted(whole_model: torch.nn.Module, prompts: list[list[int]]) -> list[list[int]]:
    return [reference_of(whole_model, ids) for ids in prompts]


def reference_of(whole_model: torch.nn.Module, prompt_ids: list[int]) -> list[int]:
    """What transformers' own `generate` writes with the unsplit model."""
    ids = torch.tensor([prompt_ids])
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    tokens: list[int] = whole_model.generate(ids, max_new_tokens=COUNT, **options)[0].tolist()
    return tokens[len(prompt_ids) :]


def read(stream: TokenStream) -> list[int]:
    return [token.token_id for token in stream]


def wait_for_sessions(pool: LocalPool, count: int) -> None:
    client = pool.connect()
    give_up_at = time.monotonic() + 10
    while client.status()["sessions"] != count:
        assert time.monotonic() < give_up_at, client.status()
        time.sleep(0.02)
    client.close()


def test_many_sessions_at_once_give_the_tokens_of_the_unsplit_model(
    pool: LocalPool, engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    streams = [engine.submit(prompts[i % len(prompts)], COUNT) for i in range(24)]
    for index, stream in enumerate(streams):
        assert read(stream) == wanted[index % len(prompts)]
        assert stream.stats.new_tokens == COUNT
        assert stream.stats.bytes_up > 0
        assert sum(stream.stats.tokens_by_worker.values()) >= COUNT
    wait_for_sessions(pool, 0)


def test_a_token_says_what_it_cost(engine: Engine, prompts: list[list[int]]) -> None:
    tokens = list(engine.submit(prompts[0], 5))
    assert {token.worker_id for token in tokens} <= {"w1", "w2"}
    for one, next_one in itertools.pairwise(tokens):
        assert next_one.bytes_up > one.bytes_up
        assert next_one.bytes_down > one.bytes_down
        assert next_one.at_s > one.at_s


def test_workers_that_die_change_no_token_of_any_session(
    pool: LocalPool, engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    streams = [engine.submit(prompts[i % len(prompts)], COUNT) for i in range(12)]
    first = [next(iter(stream)).token_id for stream in streams]
    pool.kill_worker(sorted(pool.workers)[0])
    pool.start_worker()
    for index, stream in enumerate(streams):
        assert [first[index], *read(stream)] == wanted[index % len(prompts)]
    pool.wait_for_workers(2)


def test_a_broker_that_comes_back_finds_every_session(
    pool: LocalPool, engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    streams = [engine.submit(prompts[i % len(prompts)], COUNT) for i in range(8)]
    first = [next(iter(stream)).token_id for stream in streams]
    assert pool.broker is not None
    pool.broker.kill()
    pool.start_broker()
    for index, stream in enumerate(streams):
        assert [first[index], *read(stream)] == wanted[index % len(prompts)]
    pool.wait_for_workers(2)


def test_a_cancelled_answer_ends_and_is_given_up_by_the_pool(
    pool: LocalPool, engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    endless, other = engine.submit(prompts[0], 400), engine.submit(prompts[1], COUNT)
    seen = next(iter(endless)).token_id
    endless.cancel()
    rest = read(endless)
    assert seen == wanted[0][0]
    assert len(rest) < 300
    assert read(other) == wanted[1]
    wait_for_sessions(pool, 0)
    endless.cancel()  # a second time, and after the end: nothing


def test_no_more_are_taken_than_may_wait_and_those_get_their_turn(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    with Engine(demo_ends, [pool.edge_endpoint], EXACT, max_sessions=1, max_waiting=1) as narrow:
        streams = [narrow.submit(prompts[0], COUNT), narrow.submit(prompts[1], COUNT)]
        with pytest.raises(TooManySessions, match="2 answers are being made or waited for"):
            narrow.submit(prompts[2], COUNT)
        assert [read(stream) for stream in streams] == wanted[:2]
        assert read(narrow.submit(prompts[2], COUNT)) == wanted[2]
        waiting = [narrow.submit(prompts[0], 400), narrow.submit(prompts[1], 400)]
        waiting[1].cancel()
        assert read(waiting[1]) == []
        waiting[0].cancel()


def test_a_token_says_what_its_step_cost(engine: Engine, prompts: list[list[int]]) -> None:
    first, *others = engine.submit(prompts[0], COUNT)
    assert first.stage_s == {}
    for token in others:
        assert list(token.stage_s) == ["head", "network", "queue", "middle", "tail"]
        assert all(0 <= seconds < token.at_s for seconds in token.stage_s.values())
    assert 0 < first.bytes_up < others[0].bytes_up < others[1].bytes_up


def test_one_bad_prompt_fails_alone(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    credulous = dataclasses.replace(demo_ends, vocabulary=10**9)
    with Engine(credulous, [pool.edge_endpoint], EXACT) as engine:
        good = [engine.submit(prompts[i], COUNT) for i in range(3)]
        long = engine.submit([5] * 600, COUNT)
        unknown = engine.submit([1, 10**6], COUNT)  # no such token: the batch of heads fails
        nothing = engine.submit(prompts[0], 0)
        with pytest.raises(SettingsError, match="the prompt has 600 tokens"):
            read(long)
        with pytest.raises(IndexError):
            read(unknown)
        with pytest.raises(SettingsError, match="the number of new tokens is 0"):
            read(nothing)
        assert [read(stream) for stream in good] == wanted[:3]


def test_a_conversation_computes_only_what_is_new(
    pool: LocalPool,
    engine: Engine,
    prompts: list[list[int]],
    wanted: list[list[int]],
    whole_model: torch.nn.Module,
) -> None:
    conversation = engine.open()
    first = conversation.submit(prompts[0], COUNT)
    assert read(first) == wanted[0]
    longer = prompts[0] + wanted[0] + [15, 16, 17]
    second = conversation.submit(longer, COUNT)
    assert read(second) == reference_of(whole_model, longer)
    assert second.stats.prompt_bytes_up < first.stats.prompt_bytes_up
    third = conversation.submit(prompts[1], COUNT)  # cut back
    assert read(third) == wanted[1]
    wait_for_sessions(pool, 1)
    conversation.close()
    wait_for_sessions(pool, 0)


def test_a_conversation_goes_on_after_a_cancelled_turn(
    engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    conversation = engine.open()
    turn = conversation.submit(prompts[0], 400)
    next(iter(turn))
    turn.cancel()
    list(turn)
    assert read(conversation.submit(prompts[0], COUNT)) == wanted[0]
    conversation.close()


class HoldingEngine(Engine):
    """One whose tails can be held back, as they are while sessions are in the pool."""

    is_holding = False

    def _is_worth_computing(self) -> bool:
        return not (self.is_holding and self._tails) and super()._is_worth_computing()


def test_what_a_cancelled_turn_was_about_to_compute_is_not_computed(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    with HoldingEngine(demo_ends, [pool.edge_endpoint], EXACT) as engine:
        for _ in range(3):
            conversation = engine.open()
            engine.is_holding = True
            turn = conversation.submit(prompts[0], 400)
            give_up_at = time.monotonic() + 10
            while not engine._tails:
                assert time.monotonic() < give_up_at
                time.sleep(0.005)
            turn.cancel()
            list(turn)
            following = conversation.submit(prompts[1], COUNT)
            time.sleep(0.05)
            engine.is_holding = False
            engine._command(lambda: None)
            assert read(following) == wanted[1]
            conversation.close()


def test_a_conversation_has_one_answer_at_a_time(
    engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    conversation = engine.open()
    turn = conversation.submit(prompts[0], COUNT)
    with pytest.raises(TooManySessions, match="has an answer that is not over"):
        conversation.submit(prompts[1], COUNT)
    assert read(turn) == wanted[0]
    assert read(conversation.submit(prompts[1], COUNT)) == wanted[1]
    conversation.close()


def test_seeds_are_of_the_session_not_of_its_neighbours(
    engine: Engine, prompts: list[list[int]]
) -> None:
    def sampling(seed: int) -> SamplingSettings:
        return SamplingSettings(temperature=1.0, seed=seed)

    alone = read(engine.submit(prompts[0], COUNT, sampling(7)))
    streams = [engine.submit(prompts[0], COUNT, sampling(seed)) for seed in (5, 6, 7, 8)]
    together = [read(stream) for stream in streams]
    assert together[2] == alone
    assert len({tuple(tokens) for tokens in together}) == 4


def test_streams_are_read_with_asyncio(
    engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    async def collect(index: int) -> list[int]:
        stream = engine.submit(prompts[index], COUNT)
        return [token.token_id async for token in stream]

    async def hang_up() -> None:
        stream = engine.submit(prompts[0], 400)
        async for _ in stream:
            stream.cancel()

    async def everything() -> list[list[int]]:
        *answers, _ = await asyncio.gather(*(collect(i) for i in range(4)), hang_up())
        return answers

    assert asyncio.run(everything()) == wanted[:4]


def test_a_stream_that_was_left_goes_on_where_it_was(
    engine: Engine, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    async def in_pieces(stream: TokenStream) -> list[int]:
        tokens = []
        for pieces in (1, 3, COUNT):
            async for token in stream:
                tokens.append(token.token_id)
                if len(tokens) >= pieces:
                    break
        return tokens

    stream = engine.submit(prompts[0], COUNT)
    first = next(iter(stream)).token_id
    assert [first, *asyncio.run(in_pieces(stream))] == wanted[0]
    assert read(stream) == []  # the end stays


def test_a_closed_engine_ends_its_answers_and_takes_none(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]]
) -> None:
    closed = Engine(demo_ends, [pool.edge_endpoint], EXACT)
    stream = closed.submit(prompts[0], 400)
    next(iter(stream))
    closed.close()
    with pytest.raises(EngineClosed):
        read(stream)
    with pytest.raises(EngineClosed):
        closed.submit(prompts[0], 5)
    closed.close()
    wait_for_sessions(pool, 0)


def test_a_broker_that_is_not_there_is_named(demo_ends: ModelEnds) -> None:
    with Engine(demo_ends, ["tcp://127.0.0.1:1"], EXACT, timeout_s=2.0) as nowhere:
        streams = [nowhere.submit([1, 5, 6], 5) for _ in range(3)]
        for stream in streams:
            with pytest.raises(BrokerUnavailable, match="no broker answers at"):
                read(stream)


def test_the_next_broker_of_the_list_is_used_when_one_is_silent(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], wanted: list[list[int]]
) -> None:
    brokers = ["tcp://127.0.0.1:1", pool.edge_endpoint]
    with Engine(demo_ends, brokers, EXACT) as engine:
        streams = [engine.submit(prompts[i], COUNT) for i in range(3)]
        assert [read(stream) for stream in streams] == wanted[:3]
