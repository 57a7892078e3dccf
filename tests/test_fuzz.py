"""The short form of `python tests/fuzzing.py`."""

from __future__ import annotations

from fuzzing import fuzz_decoder, fuzz_endpoint, fuzz_worker, memory_kb
from pools import PROMPTS, generate

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

GROWTH_KB = 40_000  # what bursts of messages take in buffers comes and goes


def test_the_decoder_refuses_and_never_fails() -> None:
    assert fuzz_decoder(seed=1, count=10_000) > 5_000


def test_a_live_broker_and_worker_neither_end_nor_hang_nor_grow(demo_ends: ModelEnds) -> None:
    with LocalPool(PoolSettings(workers=1)) as pool:
        assert pool.broker is not None
        fuzz_endpoint(pool.edge_endpoint, 2, 4000)
        before = memory_kb(pool.broker.pid)
        fuzz_endpoint(pool.edge_endpoint, 3, 4000)
        fuzz_endpoint(pool.worker_endpoint, 4, 4000)
        assert memory_kb(pool.broker.pid) < before + GROWTH_KB
        before, after = fuzz_worker(pool, 5, 4000)
        assert after < before + GROWTH_KB
        ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
        assert len(generate(pool, demo_ends, ids, 5)[0]) == 5
        pool.check()
