"""--cache-mb bounds a worker, whatever it serves."""

from __future__ import annotations

import pytest

from cloud_worker.batcher import Task
from cloud_worker.image_service import ImageService
from cloud_worker.memory_store import MemoryKvStore
from cloud_worker.serving import ServingSettings, load_services
from cloud_worker.text_service import TextService
from common.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
from common.messages import NeedRows, NeedTensors, StepReply


class NoOutbox:
    worker_id = "w1"

    def answer(
        self, task: Task, message: StepReply | NeedRows | NeedTensors, *bodies: bytes
    ) -> None: ...

    def fail(self, task: Task, reason: str) -> None: ...


def cache_limits(text: bool, image_parts: list[str]) -> list[int]:
    """What each service of a worker with 600 bytes of cache keeps at most."""
    makers = load_services(
        find_model(DEMO_TEXT_MODEL) if text else None,
        None,
        None,
        find_model(DEMO_IMAGE_MODEL) if image_parts else None,
        image_parts,
        MemoryKvStore(),
        ServingSettings(cache_bytes=600),
    )
    limits = []
    for make in makers:
        service = make(NoOutbox())
        if isinstance(service, TextService):
            limits.append(service._warm._limit_bytes)
        else:
            assert isinstance(service, ImageService)
            limits.append(service._cache_bytes)
    return limits


@pytest.mark.parametrize(
    ("text", "image_parts", "limits"),
    [
        (True, [], [600]),
        (False, ["inner"], [600]),
        (True, ["unet", "inner"], [200, 200, 200]),
        (True, ["inner", "inner"], [300, 300]),
    ],
)
def test_the_services_of_a_worker_share_one_cache_bound(
    text: bool, image_parts: list[str], limits: list[int]
) -> None:
    assert cache_limits(text, image_parts) == limits
