"""Hundreds of texts, drafted and not: the same tokens, or two that rounding cannot tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.engine.streams import Token
from edge_agent.text.drafting.choice import Drafters
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

pytestmark = pytest.mark.long

PROMPTS, COUNT, BEGINNING = 200, 48, 12
SEEDS = 50
# of two likeliest tokens: what fp32 rounds, and what rounding does to an int8 code
CLOSE = {"fp32": 1e-4, "int8": 0.05}


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two texts part, and how far the two likeliest tokens are apart there."""

    prompt: int
    at: int
    one: int
    other: int
    margin: float


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, model="stories-llama")) as running:
        yield running


@pytest.fixture(scope="module")
def prompts(demo_directory: Path) -> list[list[int]]:
    tokenizer = TextTokenizer(demo_directory)
    stories = (demo_directory / "validation.txt").read_text().split("\n\n")
    ids = [tokenizer.encode(story)[:BEGINNING] for story in stories if story.strip()]
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    others = [tokenizer.encode(page.read_text()[300:600])[:BEGINNING] for page in pages]
    return (ids[: PROMPTS - len(others)] + others)[:PROMPTS]


def write_all(
    pool: LocalPool,
    ends: ModelEnds,
    codec: str,
    requests: Sequence[tuple[list[int], SamplingSettings]],
    drafts: bool,
    kills: int = 0,
) -> tuple[list[list[Token]], float]:
    """The tokens of each, and how many came of a round trip."""
    drafters = Drafters("auto") if drafts else None
    settings = uniform_settings(codec)
    with Engine(ends, [pool.edge_endpoint], settings, drafters=drafters, max_sessions=8) as engine:
        streams = [
            engine.submit(prompt, COUNT, sampling, top_logprobs=2) for prompt, sampling in requests
        ]
        texts = []
        for index, stream in enumerate(streams):
            if kills and index % (len(streams) // kills) == 0:
                pool.kill_worker(sorted(pool.workers)[0])
                pool.start_worker()
            texts.append(list(stream))
    trips = sum(stream.stats.round_trips for stream in streams)
    return texts, sum(len(text) - 1 for text in texts) / trips


def find_partings(one: list[list[Token]], other: list[list[Token]]) -> list[Parting]:
    found = []
    for index, (tokens, others) in enumerate(zip(one, other, strict=True)):
        for at, (a, b) in enumerate(zip(tokens, others, strict=False)):
            if a.token_id != b.token_id:
                assert a.logprob is not None
                (_, first), (_, second) = a.logprob.top
                found.append(Parting(index, at, a.token_id, b.token_id, first - second))
                break
        else:
            assert len(tokens) == len(others)
    return found


@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_two_hundred_greedy_texts(
    pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]], codec: str
) -> None:
    requests = [(prompt, SamplingSettings()) for prompt in prompts]
    plain, _ = write_all(pool, demo_ends, codec, requests, drafts=False)
    drafted, per_trip = write_all(pool, demo_ends, codec, requests, drafts=True, kills=5)
    partings = find_partings(plain, drafted)
    print(codec, f"{per_trip:.2f} tokens per round trip; texts that part:", partings)
    assert all(parting.margin < CLOSE[codec] for parting in partings)
    assert len(partings) <= PROMPTS // 40
    assert per_trip > 1.5


def test_fifty_seeds(pool: LocalPool, demo_ends: ModelEnds, prompts: list[list[int]]) -> None:
    """A drawn token depends on all logits: how far apart they are says nothing here."""
    requests = [
        (prompts[seed], SamplingSettings(temperature=1.0, top_p=0.95, seed=seed))
        for seed in range(SEEDS)
    ]
    plain, _ = write_all(pool, demo_ends, "fp32", requests, drafts=False)
    drafted, _ = write_all(pool, demo_ends, "fp32", requests, drafts=True, kills=2)
    assert find_partings(plain, drafted) == []
