"""A takeover does not wait for a slow Redis: what is not loaded in time comes from the edge."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from pools import PROMPTS, generate, record_of, reference_tokens
from test_images import EXACT, WAYS, difference
from test_store_away import RedisOnPort

from chaos.thin_link import ThinLink
from cloud_worker.state.redis_store import LOAD_LIMIT_S
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, Progress
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

ROW_BYTES = 2048 + 8  # of the demo model's KV, with its checksum
NEW_TOKENS = 8


class SlowStore:
    """A Redis behind a link that can be made thin, and a pool whose workers use it."""

    def __init__(self, directory: Path) -> None:
        self.server = RedisOnPort(directory)
        self.link = ThinLink(f"tcp://127.0.0.1:{self.server.port}")
        self.raw = redis.Redis(port=self.server.port)
        self.pool = LocalPool(
            PoolSettings(
                workers=1,
                model=DEMO_TEXT_MODEL,
                image_model=DEMO_IMAGE_MODEL,
                redis_url=self.link.endpoint.replace("tcp://", "redis://"),
            )
        )

    def take_over_slowly(self, bytes_per_s: float) -> None:
        """Another worker has to go on from what it loads through a thin link."""
        old = next(iter(self.pool.workers))
        self.pool.start_worker()
        self.pool.wait_for_workers(2)
        self.link.bytes_per_s = bytes_per_s
        self.pool.kill_worker(old)

    def stats(self) -> dict[str, Any]:
        client = self.pool.connect()
        (stats,) = [w["stats"] for w in client.status()["workers"] if w["state"] == "ready"]
        client.close()
        return dict(stats)

    def wait_for_rows(self, session: Session, rows: int) -> None:
        """Until all that the session has is in the store."""
        give_up_at = time.monotonic() + 20
        while int(self.raw.hget(record_of(session), "position") or 0) < rows:  # type: ignore[arg-type]
            assert time.monotonic() < give_up_at
            time.sleep(0.01)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[SlowStore]:
    store = SlowStore(tmp_path)
    with store.pool:
        yield store
        store.link.bytes_per_s = None
    store.link.close()
    store.server.stop()


def test_a_takeover_does_not_wait_for_a_slow_load_nor_does_a_bystander(
    slow: SlowStore, demo_ends: ModelEnds, whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(demo_ends.directory)
    prompt = " ".join(PROMPTS)
    (reference,) = reference_tokens(whole_model, tokenizer, [prompt], NEW_TOKENS)
    prompt_ids = tokenizer.encode(prompt)
    taken_over = threading.Event()
    bystander_tokens: list[float] = []
    bytes_per_s = 40_000
    loaded_bytes = 0

    def stand_by() -> None:
        torch.set_num_threads(1)
        while not taken_over.is_set():
            generate(
                slow.pool, demo_ends, tokenizer.encode(PROMPTS[0]), 20,
                on_token=lambda *_: bystander_tokens.append(time.monotonic()),
            )  # fmt: skip

    bystander = threading.Thread(target=stand_by)

    def harm(index: int, session: Session) -> None:
        nonlocal loaded_bytes
        if index == 3:
            slow.wait_for_rows(session, len(prompt_ids) + 2)
            slow.take_over_slowly(bytes_per_s)
            loaded_bytes = slow.link.bytes_down
            bystander.start()
        if index == 4:
            taken_over.set()
            loaded_bytes = slow.link.bytes_down - loaded_bytes

    tokens, session = generate(slow.pool, demo_ends, prompt_ids, NEW_TOKENS, on_token=harm)
    bystander.join()
    stats = slow.stats()
    kv_bytes = len(prompt_ids) * ROW_BYTES
    assert tokens == reference
    assert kv_bytes / bytes_per_s > 15 * LOAD_LIMIT_S  # else the link was not thin
    assert loaded_bytes < kv_bytes / 2
    assert stats["loads_given_up"] == 1
    assert session.stats.rows_replayed >= len(prompt_ids)
    assert len(bystander_tokens) > 3


def test_an_image_does_not_wait_for_a_slow_load(slow: SlowStore) -> None:
    settings = dataclasses.replace(EXACT, **WAYS["unet-cloud"])
    client = slow.pool.connect()
    maker = ImageMaker(find_model(DEMO_IMAGE_MODEL), client)
    undisturbed = maker.make(settings)

    def harm(progress: Progress) -> None:
        if progress.step == 4:
            slow.take_over_slowly(2_000)

    assert difference(maker.make(settings, on_step=harm), undisturbed) == 0
    assert maker.stats.tensors_resent >= 1
    assert slow.stats()["loads_given_up"] >= 1
    client.close()
