"""An admitted peer that does wrong harms itself only: real processes, one of them bad."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pools import PROMPTS, generate, generate_together, reference_tokens

from chaos.bad_peers import LyingWorker, abandon, flood
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2)) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(demo_ends: ModelEnds) -> TextTokenizer:
    return TextTokenizer(demo_ends.directory)


def read_status(pool: LocalPool) -> dict[str, Any]:
    client = pool.connect()
    report = client.status()
    client.close()
    return report


def services(pool: LocalPool) -> list[dict[str, Any]]:
    return [service for worker in read_status(pool)["workers"] for service in worker["services"]]


def wait_until_idle(pool: LocalPool) -> None:
    give_up_at = time.monotonic() + 60
    while read_status(pool)["steps_in_flight"] or any(
        queue["queued"] for queue in read_status(pool)["queues"]
    ):
        assert time.monotonic() < give_up_at, read_status(pool)
        time.sleep(0.05)


def test_a_pool_with_a_lying_worker_gives_every_session_its_tokens(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module, tokenizer: TextTokenizer
) -> None:
    references = reference_tokens(whole_model, tokenizer, PROMPTS[:6], NEW_TOKENS)
    liar = LyingWorker(pool.worker_endpoint, services(pool), seed=1)
    sessions: list[Session] = []
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:6]]
    tokens = generate_together(pool, demo_ends, prompts, NEW_TOKENS, sessions)
    liar.close()
    assert tokens == references
    assert liar.lies > 0
    assert sum(session.stats.answers_unusable for session in sessions) > 0


def test_small_bad_messages_do_not_stop_the_pool(
    pool: LocalPool, demo_ends: ModelEnds, whole_model: torch.nn.Module, tokenizer: TextTokenizer
) -> None:
    """Kinds that do not fit, deadlines of 2^53 ms, rows without end: 1,000 of them."""
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], NEW_TOKENS)
    flood(pool.edge_endpoint, services(pool), steps=1000)
    tokens, _ = generate(pool, demo_ends, tokenizer.encode(PROMPTS[0]), NEW_TOKENS)
    assert tokens == reference
    wait_until_idle(pool)


def test_steps_of_an_edge_that_is_gone_leave_the_workers(pool: LocalPool) -> None:
    before = read_status(pool)["counters"]["cancelled"]
    abandon(pool.edge_endpoint, services(pool)[0], sessions=200)
    wait_until_idle(pool)
    report = read_status(pool)
    assert report["steps_in_flight"] == 0
    assert report["counters"]["cancelled"] >= before


def test_a_session_is_not_continued_in_another_precision(
    demo_ends: ModelEnds, whole_model: torch.nn.Module, tokenizer: TextTokenizer
) -> None:
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], NEW_TOKENS)
    with LocalPool(PoolSettings(workers=1)) as mixed:
        names: list[str] = []

        def swap(index: int, _: Session) -> None:
            """The float32 worker makes place for a bfloat16 one; later another comes."""
            if index == 4:
                mixed.settings = PoolSettings(workers=1, dtype="bfloat16")
                mixed.start_worker()
                mixed.wait_for_workers(2)
                mixed.kill_worker("w1")
                mixed.settings = PoolSettings(workers=1)
                timer = threading.Timer(1.0, mixed.start_worker)
                timer.start()
                names.append("swapped")

        tokens, session = generate(
            mixed, demo_ends, tokenizer.encode(PROMPTS[0]), NEW_TOKENS, on_token=swap
        )
        assert tokens == reference
        assert names == ["swapped"]
        assert set(session.stats.tokens_by_worker) == {"w1", "w3"}
