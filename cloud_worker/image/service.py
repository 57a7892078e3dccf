"""Image sessions on a worker: a stage is conditioning and latents, computed in batches and saved.

Conditioning is sent once. Latents are kept where the session leaves them to the worker; the store
has those after a step under a generation that is the step's number.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cloud_worker.image.checks import LATENTS_DTYPES, ImageChecks, is_guided
from cloud_worker.image.executor import ImageExecutor, ImageInput
from cloud_worker.image.self_test import compute_test_image
from cloud_worker.image.stage import (
    CONDITIONING,
    ImageStage,
    Latents,
    conditioning_fields,
    read_latents,
)
from cloud_worker.loop.batcher import Batcher, Task
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.stage_service import StageService
from cloud_worker.loop.together import StepsCancelled
from cloud_worker.state.blobs import CONDITIONING_ITEM, LATENTS, item_key, item_keys
from cloud_worker.state.row_seals import RowSeal
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.state.store import KvStore
from common.diffusion.schedulers import go_to, make_scheduler, read_history
from common.diffusion.shapes import WHOLE
from common.diffusion.tensors import (
    decode_tensor,
    encode_tensor,
    from_blob,
    to_blob,
    unpack_tensors,
)
from common.diffusion.unet import Conditioning
from common.errors import NonFiniteError, ProtocolError
from common.protocol.messages import BOUNDARY, ImageOpening, Service
from common.security.keys import KeyPair

log = logging.getLogger("midspan.worker")

MAX_BATCH_STEPS = 64


@dataclass(frozen=True, slots=True)
class Prepared:
    """A step with what goes into the UNet, and the scheduler where latents are kept here."""

    task: Task
    stage: ImageStage
    input: ImageInput
    scheduler: Any


class ImageService(StageService[ImageStage]):
    """One part of one SDXL UNet."""

    kind = "image"
    counters = ("image_batches", "image_steps", "image_takeovers", "tensors_asked")
    keep_reply_bytes = 8 << 20

    def __init__(
        self,
        executor: ImageExecutor,
        service: Service,
        scheduler_config: dict[str, Any],
        store: KvStore,
        outbox: Outbox,
        *,
        max_batch_images: int,
        budget: CacheBudget,
        pool_key: KeyPair | None,
    ) -> None:
        batcher = Batcher(max_batch_images, MAX_BATCH_STEPS, self._count_images, self._shape_of)
        super().__init__(service, store, outbox, batcher=batcher, budget=budget, pool_key=pool_key)
        self._executor = executor
        self._scheduler_config = scheduler_config
        self._checks = ImageChecks(executor.model.config, executor.model.sizes, scheduler_config)

    # --- a step and its items

    def _compute_test_step(self) -> bytes:
        return compute_test_image(self._executor)

    def _check(self, task: Task) -> None:
        self._checks.check(task.step, image_opening(task))

    def _new_stage(self, task: Task, seal: RowSeal) -> ImageStage:
        return ImageStage(task.session_key, seal)

    def _take(self, task: Task, stage: ImageStage) -> None:
        opening, position = image_opening(task), task.step.position
        tensors = unpack_tensors(task.step.parts, task.body, opening.codecs)
        stage.sample = tensors.get(BOUNDARY)
        if all(name in tensors for name in CONDITIONING):
            stage.conditioning = Conditioning(*(tensors[name] for name in CONDITIONING))
            named = dict(zip(CONDITIONING, conditioning_fields(stage.conditioning), strict=True))
            # under the step's number, newer than that of a writer who died half-way
            self._save(task, stage, CONDITIONING_ITEM, 0, named)
        if LATENTS in tensors:
            dtype = LATENTS_DTYPES[opening.latents_dtype]
            stage.latents = read_latents(tensors, position, dtype)

    def _lacking(self, task: Task, stage: ImageStage) -> list[str]:
        items = [] if stage.conditioning is not None else [CONDITIONING_ITEM]
        keeps_latents = image_opening(task).keeps_latents
        if keeps_latents and stage.find_latents(task.step.position) is None:
            items.append(LATENTS)
        return items

    def _load(self, task: Task, stage: ImageStage, item: str) -> None:
        position = task.step.position
        self.stats["image_takeovers"] += position > 0 and item == self._lacking(task, stage)[0]
        key, dtype = stage.key, LATENTS_DTYPES.get(image_opening(task).latents_dtype)

        def then(blob: bytes) -> None:
            loading = self._loading.get(key)
            if loading is None or loading.task.step.key != task.step.key:
                return  # a newer step has come, perhaps with newer state
            tensors = from_blob(blob)
            if item == LATENTS and LATENTS in tensors and dtype is not None:
                stage.latents = read_latents(tensors, position, dtype)
            elif item == CONDITIONING_ITEM and all(name in tensors for name in CONDITIONING):
                stage.conditioning = Conditioning(*(tensors[name] for name in CONDITIONING))
            self._on_item_read(key, item)

        generation = position if item == LATENTS else 0
        self._blobs.load(item_key(key, item), generation, stage.seal, then)

    def _ask_edge(self, task: Task, stage: ImageStage, items: list[str]) -> None:
        self.stats["tensors_asked"] += len(items)
        super()._ask_edge(task, stage, items)

    def _save(
        self, task: Task, stage: ImageStage, item: str, generation: int, named: dict[str, Tensor]
    ) -> None:
        self._blobs.save(
            item_key(stage.key, item), generation, task.step.step, to_blob(named), stage.seal,
            stage.account,
        )  # fmt: skip

    def _forget_stored(self, session_key: bytes) -> None:
        for key in item_keys(session_key):
            self._blobs.forget(key)

    # --- computing

    def _count_images(self, task: Task) -> int:
        opening = image_opening(task)
        return opening.images * (2 if is_guided(opening) else 1)

    def _shape_of(self, task: Task) -> object:
        """Steps of one shape go into one batch."""
        stage = self._stages.find(task.session_key)
        if stage is None or stage.conditioning is None:
            return None
        latents = stage.find_latents(task.step.position)
        sample = latents.sample if latents is not None else stage.sample
        tokens = stage.conditioning.prompt_embeds.shape[1:]
        return (sample.shape[1:] if sample is not None else (), tokens)

    def _compute(self, pairs: Sequence[tuple[Task, ImageStage]], started_at: float) -> None:
        batch: list[Prepared] = []
        for task, stage in pairs:
            try:
                batch.append(self._make_input(task, stage))
            except Exception as error:  # a step must never end a worker
                log.exception("a step could not be prepared")
                self._outbox.fail(task, f"{type(error).__name__}: {error}")
        if not batch:
            return
        try:
            results = self._executor.run(
                [prepared.input for prepared in batch],
                lambda: all(self._outbox.is_cancelled(prepared.task) for prepared in batch),
            )
        except StepsCancelled:
            return  # the broker's cancel is confirmed when it is read
        self.stats["image_batches"] += 1
        for prepared, result in zip(batch, results, strict=True):
            if isinstance(result, str):
                self._outbox.fail(prepared.task, result)
                continue
            try:
                self._finish(prepared, result, started_at)
            except NonFiniteError as error:
                self._outbox.fail(prepared.task, str(error))
            except Exception as error:  # as above
                log.exception("a step could not be finished")
                self._outbox.fail(prepared.task, f"{type(error).__name__}: {error}")

    def _make_input(self, task: Task, stage: ImageStage) -> Prepared:
        opening, position = image_opening(task), task.step.position
        assert stage.conditioning is not None
        scheduler, sample = None, stage.sample
        if opening.keeps_latents:
            latents = stage.find_latents(position)
            assert latents is not None
            name, steps = opening.scheduler.split(" ")[0], len(opening.timesteps)
            scheduler = make_scheduler(self._scheduler_config, name, steps)
            go_to(scheduler, position, latents.history)
            sample = latents.sample
        assert sample is not None
        if opening.route == [WHOLE] and is_guided(opening):
            sample = torch.cat([sample] * 2)
        if scheduler is not None:
            sample = scheduler.scale_model_input(sample, scheduler.timesteps[position])
        image_input = ImageInput(sample, opening.timesteps[position], stage.conditioning)
        return Prepared(task, stage, image_input, scheduler)

    def _finish(self, prepared: Prepared, result: Tensor, started_at: float) -> None:
        """Guide, encode and answer; then step and save the latents that are kept here."""
        task, stage = prepared.task, prepared.stage
        opening = image_opening(task)
        if opening.route == [WHOLE] and is_guided(opening):
            without, with_text = result.chunk(2)
            result = without + opening.guidance * (with_text - without)
        codec = opening.codecs[task.step.reply_codec]
        body = encode_tensor(result, codec)
        self._reply(task, stage, body, started_at, rows=0, committed=0)
        self.stats["image_steps"] += 1
        if prepared.scheduler is not None:
            self._step_latents(prepared, decode_tensor(body, result.shape, codec))

    def _step_latents(self, prepared: Prepared, travelled: Tensor) -> None:
        """Go on to the next step with the noise as the edge has it, and in the edge's dtype.

        So that both sides round alike.
        """
        task, stage, scheduler = prepared.task, prepared.stage, prepared.scheduler
        position, dtype = task.step.position, LATENTS_DTYPES[image_opening(task).latents_dtype]
        before = stage.find_latents(position)
        assert before is not None
        sample = scheduler.step(
            travelled.to(dtype), scheduler.timesteps[position], before.sample, return_dict=False
        )[0]
        stage.before = before
        stage.latents = Latents(position + 1, sample, read_history(scheduler))
        self._save(task, stage, LATENTS, position + 1, stage.latents.to_tensors())


def image_opening(task: Task) -> ImageOpening:
    """How a step's session was opened. Raises ProtocolError for a text's."""
    if not isinstance(task.opening, ImageOpening):
        raise ProtocolError(f"an image's step comes with {task.opening.kind!r}")
    return task.opening
