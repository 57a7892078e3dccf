"""--cache-mb bounds a worker, whatever it serves: one budget for text and images."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import pytest
from pools import PROMPTS

from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.text_session import rows_of_piece
from edge_agent.text.tokenizer import TextTokenizer

CACHE_MB = 2


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    settings = PoolSettings(
        workers=1,
        model=DEMO_TEXT_MODEL,
        image_model=DEMO_IMAGE_MODEL,
        worker_options=["--cache-mb", str(CACHE_MB)],
    )
    with LocalPool(settings) as running:
        yield running


def begin(client: BrokerClient, ends: ModelEnds, prompt: str) -> Iterator[int]:
    """A session of which one token is there."""
    ids = TextTokenizer(ends.directory).encode(prompt)
    stream = Session(ends, client, uniform_settings("fp32")).generate(ids, 4, SamplingSettings())
    next(stream)
    return stream


def count_steps(ends: ModelEnds, prompt: str) -> int:
    """Of a prompt, which goes in pieces if it is long."""
    rows = len(TextTokenizer(ends.directory).encode(prompt))
    return math.ceil(rows / rows_of_piece(rows))


def stats_after(client: BrokerClient, steps: int) -> dict[str, Any]:
    """What the worker announces once it has computed so many steps."""
    give_up_at = time.monotonic() + 10
    while True:
        (worker,) = client.status()["workers"]
        if worker["stats"]["steps"] >= steps:
            return dict(worker["stats"])
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_text_may_have_more_than_an_even_share_of_the_cache(
    pool: LocalPool, demo_ends: ModelEnds
) -> None:
    long = " ".join(PROMPTS)
    client = pool.connect()
    first = begin(client, demo_ends, long)
    short = begin(client, demo_ends, PROMPTS[0])
    next(first)  # still warm
    steps = count_steps(demo_ends, long) + 1 + 1
    stats = stats_after(client, steps)
    assert stats["takeovers"] == 0
    assert stats["warm_bytes"] > (CACHE_MB << 20) / 3  # there are three services
    others = [begin(client, demo_ends, prompt + long) for prompt in PROMPTS[:2]]
    next(first)  # used longest ago, it had to go
    steps += sum(count_steps(demo_ends, prompt + long) for prompt in PROMPTS[:2])
    stats = stats_after(client, steps + 1)
    assert stats["takeovers"] == 1
    assert stats["warm_bytes"] <= CACHE_MB << 20
    for stream in (first, short, *others):
        stream.close()  # type: ignore[attr-defined]
    client.close()
