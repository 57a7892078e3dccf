"""Images in a pool of one honest worker and one that answers each step with a lie."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_images import EXACT, WAYS, difference

from chaos.bad_peers import IMAGE_LIES, LyingWorker
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, ImageSettings
from edge_agent.image.remote_unet import ImageStats

STEPS = 3


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1, image_model=DEMO_IMAGE_MODEL)) as running:
        yield running


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


def wait_for_workers(pool: LocalPool, wanted: set[str]) -> list[dict[str, Any]]:
    """Until the broker knows these and no others; their services."""
    client = pool.connect()
    give_up_at = time.monotonic() + 10
    while True:
        workers = client.status()["workers"]
        if {worker["worker_id"] for worker in workers} == wanted:
            client.close()
            return [service for worker in workers for service in worker["services"]]
        assert time.monotonic() < give_up_at, workers
        time.sleep(0.02)


def start_liar(pool: LocalPool, lie: str) -> LyingWorker:
    """One that gets a new session's first step: of idle workers, whoever was there first."""
    services = wait_for_workers(pool, {"w1"})
    pool.workers["w1"].signal(signal.SIGSTOP)
    try:
        wait_for_workers(pool, set())
        liar = LyingWorker(pool.worker_endpoint, services, seed=1, lie=lie)
        wait_for_workers(pool, {liar.worker_id})
    finally:
        pool.workers["w1"].signal(signal.SIGCONT)
    wait_for_workers(pool, {liar.worker_id, "w1"})
    return liar


def make(
    pool: LocalPool, directory: Path, settings: ImageSettings
) -> tuple[list[Image.Image], ImageStats]:
    """A session of its own, over a connection of its own."""
    client = pool.connect()
    maker = ImageMaker(directory, client, settings.cut)
    images = maker.make(settings)
    client.close()
    return images, maker.stats


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lie", IMAGE_LIES)
def test_a_lying_worker_changes_no_image(
    pool: LocalPool, directory: Path, lie: str, way: str
) -> None:
    settings = dataclasses.replace(EXACT, steps=STEPS, **WAYS[way])
    undisturbed, _ = make(pool, directory, settings)
    liar = start_liar(pool, lie)
    try:
        for _ in range(5):  # a liar that was late with its heartbeat comes second
            images, stats = make(pool, directory, settings)
            assert difference(images, undisturbed) == 0
            if liar.lies:
                break
    finally:
        liar.close()
    assert liar.lies > 0
    assert stats.calls_by_worker == {"w1": STEPS}
    # what a worker may lack it is given once; that it lacks it again is a lie
    plausible = lie == "asks for conditioning without end"
    plausible |= lie == "asks for latents" and way == "unet-cloud"
    if plausible:
        assert (stats.answers_unusable, stats.tensors_resent >= 2) == (0, True)
    else:
        assert stats.answers_unusable == liar.lies
