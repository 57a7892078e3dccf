"""A worker serves without its store, and says so; a slow one holds nobody up."""

from __future__ import annotations

import secrets
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from pools import PROMPTS, generate, reference_tokens

from chaos.thin_link import ThinLink
from cloud_worker.state.redis_store import RedisKvStore
from cloud_worker.state.store import Commit, Committed, StoreEvent
from deploy.child import Child
from deploy.embedded_redis import find_redis_server
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer


def poll_until(store: RedisKvStore, count: int, timeout_s: float = 30.0) -> list[StoreEvent]:
    events: list[StoreEvent] = []
    give_up_at = time.monotonic() + timeout_s
    while len(events) < count and time.monotonic() < give_up_at:
        events += store.poll()
        time.sleep(0.001)
    return events


def store_is_up(pool: LocalPool) -> bool:
    client = pool.connect()
    (worker,) = client.status()["workers"]
    client.close()
    return bool(worker["stats"]["store_up"])


def wait_for_store(pool: LocalPool, is_up: bool) -> None:
    give_up_at = time.monotonic() + 10
    while store_is_up(pool) != is_up:
        assert time.monotonic() < give_up_at
        time.sleep(0.1)


def test_a_worker_serves_without_a_redis_and_says_so(
    demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], 12)
    settings = PoolSettings(workers=1, redis_url="redis://127.0.0.1:1")
    with LocalPool(settings) as pool:
        tokens, session = generate(pool, demo_ends, tokenizer.encode(PROMPTS[0]), 12)
        assert not store_is_up(pool)
        (worker,) = pool.workers.values()
        assert "Redis at redis://127.0.0.1:1 cannot be reached" in worker.log_text()
    assert tokens == reference
    assert session.stats.committed == 0


@pytest.mark.parametrize("harm", [signal.SIGSTOP, signal.SIGKILL])
def test_an_idle_worker_notices_that_its_redis_is_gone(harm: signal.Signals) -> None:
    with LocalPool(PoolSettings(workers=1)) as pool:
        wait_for_store(pool, is_up=True)
        assert pool.redis is not None
        pool.redis.child.signal(harm)
        try:
            wait_for_store(pool, is_up=False)
        finally:
            pool.redis.child.signal(signal.SIGCONT)


def test_a_large_commit_to_a_slow_redis_returns_at_once_and_arrives(tmp_path: Path) -> None:
    """Longer than the time-out, but something moves all the while."""
    port_server = RedisOnPort(tmp_path)
    link = ThinLink(f"tcp://127.0.0.1:{port_server.port}")
    store = RedisKvStore(f"redis://{link.endpoint.removeprefix('tcp://')}", timeout_s=0.5)
    link.bytes_per_s = 400_000
    key, rows = secrets.token_bytes(16), bytes(1_000_000)
    store.begin_commit(Commit(key, "shape", 0, 0, 0, "w", 0, 10, False, rows, 100_000))
    assert store.is_sending()
    assert poll_until(store, 1) == [Committed(key, 0, 10)]
    store.close()
    link.close()
    port_server.stop()


class RedisOnPort:
    """A Redis that listens on a port of its own, on loopback."""

    def __init__(self, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [find_redis_server(), "--port", str(self.port), "--bind", "127.0.0.1"]
        self._child = Child("redis-port", [*command, "--save", ""], directory)
        self._child.wait_for("eady to accept connections")

    def stop(self) -> None:
        self._child.stop()
