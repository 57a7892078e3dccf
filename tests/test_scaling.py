"""Workers that are told to leave while sessions run, and connections that end."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from pools import PROMPTS, generate_together, reference_tokens

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer


@pytest.mark.long
def test_half_of_the_workers_leave_and_sixteen_sessions_notice_nothing(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    prompts = PROMPTS[:16]
    want = reference_tokens(whole_model, tokenizer, prompts, 48)
    sessions: list[Session] = []
    with LocalPool(PoolSettings(workers=4)) as pool:
        leave = [pool.workers[name] for name in ("w1", "w2")]

        def scale_down() -> None:
            time.sleep(1.0)
            for name in ("w1", "w2"):
                threading.Thread(target=pool.drain_worker, args=(name,)).start()

        timer = threading.Thread(target=scale_down)
        timer.start()
        ids = [tokenizer.encode(prompt) for prompt in prompts]
        assert generate_together(pool, demo_ends, ids, 48, sessions) == want
        timer.join()
        assert len(pool.workers) == 2
        assert all(not child.is_running() for child in leave)
        client = pool.connect()
        left = {worker["worker_id"] for worker in client.status()["workers"]}
        client.close()
    assert left == {"w3", "w4"}
    assert sum(session.stats.rows_replayed for session in sessions) == 0
    moved = sum(len(session.stats.tokens_by_worker) > 1 for session in sessions)
    assert moved > 0, "no session was on a worker that left"
