"""The main job, with real processes: a split model writes what the unsplit one writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pools import GREEDY, PROMPTS, generate, generate_together, reference_tokens

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.generation import start_generation
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

NEW_TOKENS = 64


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(demo_ends: ModelEnds) -> TextTokenizer:
    return TextTokenizer(demo_ends.directory)


@pytest.fixture(scope="module")
def references(whole_model: torch.nn.Module, tokenizer: TextTokenizer) -> list[list[int]]:
    return reference_tokens(whole_model, tokenizer, PROMPTS, NEW_TOKENS)


def test_twenty_prompts_give_the_tokens_of_generate(
    pool: LocalPool,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    references: list[list[int]],
) -> None:
    assert len(PROMPTS) == 20
    ours = [generate(pool, demo_ends, tokenizer.encode(p), NEW_TOKENS)[0] for p in PROMPTS]
    assert ours == references


def test_eight_sessions_at_once_are_batched_and_give_the_tokens_of_generate(
    pool: LocalPool,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    references: list[list[int]],
) -> None:
    before = _worker_stats(pool)
    prompts_ids = [tokenizer.encode(prompt) for prompt in PROMPTS[::2][:8]]
    assert generate_together(pool, demo_ends, prompts_ids, NEW_TOKENS) == references[::2][:8]
    after = _worker_stats(pool)
    steps = after["steps"] - before["steps"]
    batches = after["batches"] - before["batches"]
    assert batches < steps  # some batches held several sessions; one at a time they are equal


def _worker_stats(pool: LocalPool) -> dict[str, int]:
    client = pool.connect()
    workers = client.status()["workers"]
    client.close()
    return {name: sum(w["stats"][name] for w in workers) for name in ("steps", "batches")}


def test_a_prompt_in_small_chunks_gives_the_same_tokens(
    pool: LocalPool,
    demo_ends: ModelEnds,
    tokenizer: TextTokenizer,
    references: list[list[int]],
) -> None:
    ids = tokenizer.encode(PROMPTS[0])
    tokens, session = generate(pool, demo_ends, ids, NEW_TOKENS, prefill_rows=4)
    assert tokens == references[0]
    assert session.stats.rows_replayed == 0


def test_a_seed_makes_sampling_repeatable(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    sampling = SamplingSettings(temperature=1.0, top_k=40, top_p=0.9, seed=3)
    ids = tokenizer.encode(PROMPTS[1])
    first, second = (
        generate(pool, demo_ends, ids, 40, codec="int8", sampling=sampling)[0] for _ in range(2)
    )
    assert first == second
    assert first != generate(pool, demo_ends, ids, 40, codec="int8")[0]


def test_stats_count_what_went_over_the_wire(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    _, session = generate(pool, demo_ends, tokenizer.encode(PROMPTS[2]), 20, codec="fp32")
    stats = session.stats.to_json()
    row_bytes = demo_ends.hidden * 4
    assert stats["new_tokens"] == 20
    assert row_bytes < stats["bytes_up_per_token"] < row_bytes + 300
    assert row_bytes < stats["bytes_down_per_token"] < row_bytes + 300
    prompt_rows = stats["prompt_tokens"]
    assert sum(stats["tokens_by_worker"].values()) == prompt_rows + 19
    assert all(ms > 0 for name, ms in stats["ms_per_token"].items() if name != "queue")


def test_a_stop_string_ends_the_text_before_it(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    client = pool.connect()
    full = start_generation(Session(demo_ends, client), tokenizer, PROMPTS[0], 100, GREEDY)
    text = "".join(full.stream())
    stop = text[40:46]
    cut = start_generation(
        Session(demo_ends, client), tokenizer, PROMPTS[0], 100, GREEDY, [stop, "never there"]
    )
    assert "".join(cut.stream()) == text[: text.index(stop)]
    assert (cut.finish_reason, full.text) == ("stop", text)
    client.close()


def test_a_story_ends_by_itself_at_the_end_of_sequence(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    client = pool.connect()
    generation = start_generation(Session(demo_ends, client), tokenizer, PROMPTS[0], 400, GREEDY)
    text = "".join(generation.stream())
    client.close()
    assert generation.finish_reason == "stop"
    assert text.endswith("The end.")
    assert generation.token_ids[-1] in demo_ends.eos_ids


def test_the_generation_stops_at_the_end_of_the_context(
    pool: LocalPool, demo_ends: ModelEnds, tokenizer: TextTokenizer
) -> None:
    assert demo_ends.context is not None
    ids = (tokenizer.encode(PROMPTS[0]) * 99)[: demo_ends.context - 3]
    tokens, _ = generate(pool, demo_ends, ids, 50)
    assert len(tokens) <= 3
