"""Many clients at once, clients that hang up, workers that die: through HTTP, on a real pool."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from pools import OPENINGS, PROMPTS, reference_tokens
from serving import (
    ENDLESS,
    MODEL,
    Endpoint,
    count_sessions,
    open_endpoint,
)
from waiting import wait_until

from deploy.pool import LocalPool, PoolSettings
from edge_agent.server.opening import Bounds
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
COUNT = 24
LONG_COUNT = 60


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture(scope="module")
def endpoint(pool: LocalPool, demo_ends: ModelEnds) -> Iterator[Endpoint]:
    with open_endpoint(pool, demo_ends) as running:
        yield running


@pytest.fixture(scope="module")
def wanted(whole_model: torch.nn.Module, demo_ends: ModelEnds) -> list[str]:
    tokenizer = TextTokenizer(demo_ends.directory)
    answers = reference_tokens(whole_model, tokenizer, PROMPTS, COUNT)
    return [tokenizer.decode(ids) for ids in answers]


async def stream_all(
    endpoint: Endpoint, prompts: list[str], on_half: contextlib.AbstractContextManager[object]
) -> list[str]:
    """All chats at once; `on_half` is entered when half of the pieces have come."""
    pieces = itertools.count()
    client = openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)

    async def read(prompt: str) -> str:
        text = ""
        async for chunk in await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": prompt}],
            temperature=0, max_tokens=COUNT, stream=True,
        ):  # fmt: skip
            if next(pieces) == len(prompts) * COUNT // 2:
                with on_half:
                    pass
            text += chunk.choices[0].delta.content or ""
        return text

    async with client:
        return list(await asyncio.gather(*map(read, prompts)))


def test_sixteen_streams_at_once_are_the_unsplit_models_and_none_is_mixed(
    endpoint: Endpoint, wanted: list[str]
) -> None:
    texts = asyncio.run(stream_all(endpoint, PROMPTS[:16], contextlib.nullcontext()))
    assert texts == wanted[:16]


@pytest.mark.long
def test_sixty_four_streams_go_on_when_a_worker_dies(
    pool: LocalPool, endpoint: Endpoint, wanted: list[str]
) -> None:
    class Killing(contextlib.AbstractContextManager[None]):
        def __exit__(self, *_: object) -> None:
            pool.kill_worker(sorted(pool.workers)[0])

    places = [index % len(PROMPTS) for index in range(64)]
    texts = asyncio.run(stream_all(endpoint, [PROMPTS[i] for i in places], Killing()))
    assert texts == [wanted[i] for i in places]
    pool.start_worker()
    pool.wait_for_workers(2)


@pytest.mark.long
def test_sixty_four_stories_through_both_paths_survive_the_kill_of_a_worker(
    pool: LocalPool, endpoint: Endpoint, whole_model: torch.nn.Module, demo_ends: ModelEnds
) -> None:
    """No two prompts are the same, so a token that went astray is seen."""
    names = ("Lily", "Tom", "Mia", "Max", "Ella", "Ben", "Zoe", "Sam")
    heroes = [f"{kind} named {name}" for name in names for kind in ("mouse", "bear")]
    prompts = [opening.format(hero) for opening in OPENINGS for hero in heroes]
    tokenizer = TextTokenizer(demo_ends.directory)
    wanted = reference_tokens(whole_model, tokenizer, prompts, LONG_COUNT)
    pieces = itertools.count()
    client = openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)
    options: dict[str, Any] = {
        "model": MODEL, "temperature": 0, "max_tokens": LONG_COUNT, "stream": True,
    }  # fmt: skip

    def note_piece() -> None:
        if next(pieces) == len(prompts) * LONG_COUNT // 3:
            pool.kill_worker(sorted(pool.workers)[0])

    async def chat(prompt: str) -> str:
        text = ""
        messages: Any = [{"role": "user", "content": prompt}]
        async for chunk in await client.chat.completions.create(messages=messages, **options):
            note_piece()
            text += chunk.choices[0].delta.content or ""
        return text

    async def complete(prompt: str) -> str:
        text = ""
        async for chunk in await client.completions.create(prompt=prompt, **options):
            note_piece()
            text += chunk.choices[0].text
        return text

    async def ask_all() -> list[str]:
        asks = itertools.cycle((chat, complete))
        async with client:
            return list(
                await asyncio.gather(*(ask(p) for ask, p in zip(asks, prompts, strict=False)))
            )

    try:
        texts = asyncio.run(ask_all())
        assert len(pool.workers) == 1
    finally:
        pool.start_worker()
        pool.wait_for_workers(2)
    assert texts == [tokenizer.decode(ids) for ids in wanted]


@pytest.mark.long
def test_capacity_is_what_it_was_after_two_hundred_clients_that_hang_up(
    pool: LocalPool, demo_ends: ModelEnds
) -> None:
    """64 are answered at once, the others wait; some hear a part of their answer, some nothing."""
    most, clients = 64, 200
    messages = [{"role": "user", "content": "Once"}]

    async def hang_up(client: httpx.AsyncClient, index: int) -> int:
        path, prompt = ((CHAT, {"messages": messages}), (TEXT, {"prompt": "Once"}))[index % 2]
        body = prompt | ENDLESS | {"stream": index % 3 > 0}
        heard = 0
        with contextlib.suppress(TimeoutError):
            async with (
                asyncio.timeout(1 + index / 20),
                client.stream("POST", path, json=body, timeout=60) as response,
            ):
                async for data in response.aiter_bytes():
                    heard += len(data)
                    if heard > 100 * index:
                        break
        return heard

    async def hang_up_all(url: str) -> list[int]:
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            return await asyncio.gather(*(hang_up(client, index) for index in range(clients)))

    with open_endpoint(pool, demo_ends, bounds=Bounds(most, 1024, keep=4)) as endpoint:
        text = endpoint.services.text
        before = count_sessions(pool)
        heard = asyncio.run(hang_up_all(endpoint.url))
        assert sum(part > 0 for part in heard) > 10
        assert sum(part == 0 for part in heard) > 10
        wait_until(lambda: text.engine.count_answers() == (0, 0))
        wait_until(lambda: endpoint.services.drain.running == 0)
        assert not any(kept.is_answering for kept in text.kept._kept)
        assert len(text.kept) <= 4
        wait_until(lambda: count_sessions(pool) - before <= len(text.kept))
        streams = [endpoint.complete("Once", stream=True, **ENDLESS) for _ in range(most)]
        assert text.engine.count_answers() == (most, 0)
        for stream in streams:
            stream.close()
        wait_until(lambda: text.engine.count_answers() == (0, 0))
        assert len(endpoint.complete("Once", max_tokens=2).choices) == 1
    wait_until(lambda: count_sessions(pool) <= before)


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_return_what_they_had(
    pool: LocalPool, demo_ends: ModelEnds, path: str, stream: bool
) -> None:
    """Some are being answered, some wait; of those that stream some have read a part."""
    body = {
        "prompt": "Once", "messages": [{"role": "user", "content": "Once"}], "stream": stream,
        **ENDLESS,
    }  # fmt: skip

    async def hang_up(client: httpx.AsyncClient, patience_s: float) -> None:
        with contextlib.suppress(httpx.TimeoutException):
            async with client.stream("POST", path, json=body, timeout=patience_s) as response:
                async for _ in response.aiter_bytes():
                    break

    async def hang_up_all(url: str) -> None:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=url, limits=limits) as client:
            await asyncio.gather(*(hang_up(client, 0.3 + i / 100) for i in range(25)))

    with open_endpoint(pool, demo_ends, bounds=Bounds(8, 64, keep=2)) as endpoint:
        text = endpoint.services.text
        before = count_sessions(pool)
        asyncio.run(hang_up_all(endpoint.url))
        wait_until(lambda: text.engine.count_answers() == (0, 0))
        wait_until(lambda: count_sessions(pool) - before <= len(text.kept))
        assert len(text.kept) <= 2
        assert not any(kept.is_answering for kept in text.kept._kept)
        wait_until(lambda: endpoint.services.drain.running == 0)
        assert len(endpoint.complete("Once", max_tokens=2).choices) == 1
    wait_until(lambda: count_sessions(pool) <= before)


def test_a_hang_up_ends_a_generation_within_a_step_or_two(endpoint: Endpoint) -> None:
    engine = endpoint.services.text.engine
    stream = endpoint.complete("Once", stream=True, **ENDLESS)
    next(stream)
    (running,) = engine._running.values()
    made = running.text.stats.new_tokens
    stream.close()
    wait_until(lambda: engine.count_answers() == (0, 0))
    assert running.text.stats.new_tokens - made < 20  # of 500


def test_kept_conversations_are_bounded_and_the_oldest_gives_way(
    pool: LocalPool, demo_ends: ModelEnds
) -> None:
    with open_endpoint(pool, demo_ends, bounds=Bounds(keep=2)) as endpoint:
        text = endpoint.services.text
        before = count_sessions(pool)
        for prompt in ("Anna the fox was glad.", "Ben had a kite.", "Zoe saw a lake."):
            endpoint.chat(prompt, max_tokens=2)
        assert len(text.kept) == 2
        wait_until(lambda: count_sessions(pool) == before + 2)
        first, second = text.kept._kept
        endpoint.chat("Ben had a kite.", max_tokens=2)
        assert text.kept._kept == [second, first]
        busy = [endpoint.chat("Once", stream=True, **ENDLESS) for _ in range(3)]
        for stream in busy:
            next(stream)
        assert len(text.kept) == 2
        for stream in busy:
            stream.close()


def test_figures_count_what_happened(pool: LocalPool, demo_ends: ModelEnds) -> None:
    with open_endpoint(pool, demo_ends) as endpoint:
        body = endpoint.post(
            TEXT, prompt=[[0, 5, 6]], max_tokens=4, temperature=0, midspan=True
        ).json()
        endpoint.post(TEXT, prompt=[[0, 5, 6]], echo=True, logprobs=1, max_tokens=0, midspan=True)
        endpoint.post(CHAT)
        stats = body["midspan"][0]
        assert endpoint.metric('midspan_requests_total{kind="completions",status="200"}') == 2
        assert endpoint.metric('midspan_requests_total{kind="chat",status="400"}') == 1
        assert endpoint.metric('midspan_tokens_total{kind="prompt"}') == 6
        assert endpoint.metric('midspan_tokens_total{kind="completion"}') == 4
        assert endpoint.metric("midspan_first_token_seconds_count") == 1
        assert endpoint.metric("midspan_token_seconds_count") == 3
        up = endpoint.metric('midspan_boundary_bytes_total{direction="up"}')
        assert up > stats["bytes_up"] + 3 * 512  # and the prompt that was scored
        assert endpoint.metric("midspan_answers_running") == 0
        stream = endpoint.complete("Once", stream=True, **ENDLESS)
        next(stream)
        assert endpoint.metric("midspan_answers_running") == 1
        stream.close()


def test_the_page_can_ask_what_the_pool_is_and_what_is_sent(endpoint: Endpoint) -> None:
    report = endpoint.http.get("/midspan/pool").json()
    assert {worker["state"] for worker in report["workers"]} == {"ready"}
    model = endpoint.http.get("/midspan/model").json()
    assert (model["model"], model["cut"]) == (MODEL, "2:6")
    assert set(model["codecs"].values()) == {"fp32"}
    assert set(model["bits"].values()) == {32.0}
    ready = endpoint.http.get("/ready").json()
    assert ready["status"] == "ready"
    assert ready["worker"] in {worker["worker_id"] for worker in report["workers"]}
    assert endpoint.http.get("/openapi.json").json()["info"]["title"] == "midspan"
