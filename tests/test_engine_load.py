"""256 sessions in one engine while a worker is killed every five seconds."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path

import pytest
import torch
from pools import PROMPTS

from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

SESSIONS, COUNT = 256, 40
MINUTE_S, KILL_S = 60.0, 5.0
GROWTH_KB = 50_000


def resident_kb() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_256_sessions_write_their_own_tokens_while_workers_are_killed(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    wanted = []
    for ids in prompts:
        batch = torch.tensor([ids])
        options = {"attention_mask": torch.ones_like(batch), "do_sample": False}
        output = whole_model.generate(batch, max_new_tokens=COUNT, **options)
        wanted.append(output[0, len(ids) :].tolist())
    wrong: list[str] = []
    finished = [0] * SESSIONS
    with LocalPool(PoolSettings(workers=2, model="stories-llama")) as pool:
        settings = uniform_settings("fp32")
        with Engine(
            demo_ends, [pool.edge_endpoint], settings, max_sessions=SESSIONS, timeout_s=120
        ) as engine:
            stop_at = time.monotonic() + MINUTE_S

            def keep_asking(index: int) -> None:
                while time.monotonic() < stop_at:
                    which = (index + finished[index]) % len(prompts)
                    try:
                        got = [t.token_id for t in engine.submit(prompts[which], COUNT)]
                    except Exception as error:
                        wrong.append(f"{type(error).__name__}: {error}")
                        return
                    if got != wanted[which]:
                        wrong.append(f"{got} instead of {wanted[which]}")
                    finished[index] += 1

            threads = [threading.Thread(target=keep_asking, args=(i,)) for i in range(SESSIONS)]
            for thread in threads:
                thread.start()
            kills = 0
            while time.monotonic() + KILL_S < stop_at:
                time.sleep(KILL_S)
                pool.kill_worker(sorted(pool.workers)[0])
                pool.start_worker()
                kills += 1
            for thread in threads:
                thread.join()
            assert wrong == []
            assert kills >= 10
            assert min(finished) >= 1
            gc.collect()
            before = resident_kb()
            for _ in range(3):
                for stream in [engine.submit(prompts[i % 20], COUNT) for i in range(SESSIONS)]:
                    assert len(list(stream)) == COUNT
            gc.collect()
            assert resident_kb() - before < GROWTH_KB
