"""Image sessions on a worker: conditioning and latents are found, steps computed in batches, saved.

A session's state is its conditioning, sent once, and, where the worker keeps the latents, those
before the next step. Both are in memory, in the store and at the edge, and are looked for in that
order. The store has the latents after a step under a generation that is the step's number.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from msgspec import structs
from torch import Tensor

from cloud_worker.image.executor import ImageExecutor, ImageInput, StepsCancelled
from cloud_worker.image.sessions import (
    HISTORY,
    ImageSession,
    Latents,
    Waiting,
    conditioning_fields,
    conditioning_key,
    latents_key,
    read_latents,
)
from cloud_worker.loop.batcher import Task
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.precision import check_precision, tell_precision
from cloud_worker.state.blobs import Blobs
from cloud_worker.state.row_seals import Checksum, KvCipher, RowSeal
from cloud_worker.state.session_cache import CacheBudget, SessionCache
from cloud_worker.state.store import KvStore, StoreEvent
from common.codecs.lambda_split import PREFIX
from common.codecs.spec import parse_codec
from common.diffusion.schedulers import (
    SCHEDULERS,
    describe_scheduler,
    go_to,
    make_scheduler,
    read_history,
)
from common.diffusion.tensors import (
    check_image_codec,
    decode_tensor,
    encode_tensor,
    from_blob,
    to_blob,
    unpack_tensors,
)
from common.diffusion.unet import INNER, WHOLE, Conditioning, boundary_channels
from common.errors import MidspanError, NonFiniteError, ProtocolError, SettingsError
from common.protocol.messages import (
    BOUNDARY,
    ImageOpening,
    Need,
    Service,
    Step,
    StepKey,
    StepReply,
)
from common.security.keys import KeyPair
from common.security.sealing import open_sealed

log = logging.getLogger("midspan.worker")

CONDITIONING = ("prompt_embeds", "text_embeds", "time_ids")
LATENTS_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
CHECK_CODEC = "int8"
MAX_TOKENS = 4096
MAX_STEP_VALUES = 1 << 26  # of all tensors of a step together
MAX_PROMPT_VALUES = 1 << 25
MAX_IMAGES = 64
MAX_SIDE = 1024  # of the latents
MAX_PIXELS = 1 << 18  # of the latents of all images of a step, doubled for guidance
ATTENTION_PIXELS = 1 << 15  # of one image; in a larger one each pixel costs more, as all see all
KEEP_REPLY_BYTES = 8 << 20


def is_cast(codec: str) -> bool:
    """Whether a codec keeps every value as a float: in a few bytes it cannot say much."""
    return not codec.startswith(PREFIX) and parse_codec(codec).kind == "cast"


def pooled_size(config: Any) -> int:
    """Of the prompt's embedding as a whole, for the UNet of this configuration."""
    size: int = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return size


class ImageService:
    """One part of one SDXL UNet."""

    kind = "image"

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
        self.service = service
        self.stats = dict.fromkeys(
            (
                "image_batches", "image_steps", "image_takeovers", "tensors_asked",
                "loads_given_up", "commits_over_share",
            ),
            0,
        )  # fmt: skip
        self._executor = executor
        self._scheduler_config = scheduler_config
        self._outbox = outbox
        self._max_batch_images = max_batch_images
        self._budget = budget
        self._pool_key = pool_key
        self._blobs = Blobs(store, f"{service.model} {service.part} blob", outbox.worker_id)
        self._sessions: SessionCache[ImageSession] = SessionCache(budget, self._find_busy)
        self._waiting: dict[bytes, Waiting] = {}  # for the store
        self._ready: list[Waiting] = []

    # --- what the worker asks

    def check_ready(self, is_over: Callable[[], bool]) -> None:
        """Compute a step of a tiny image, encode, store and read back what comes out.

        Raises MidspanError; StoreUnavailable if only the store is at fault.
        """
        config = self._executor.model.config
        channels = config.in_channels if self._executor.part == WHOLE else self._channels()[0]
        generator = torch.Generator().manual_seed(0)
        conditioning = Conditioning(
            torch.randn(1, 2, config.cross_attention_dim, generator=generator),
            torch.randn(1, pooled_size(config), generator=generator),
            torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]),
        )
        sample = torch.randn(1, channels, 8, 8, generator=generator)
        (result,) = self._executor.run([ImageInput(sample, 1.0, conditioning)])
        if isinstance(result, str):
            raise MidspanError(f"this worker cannot compute its own test step: {result}")
        try:
            body = encode_tensor(result, CHECK_CODEC)
            decode_tensor(body, result.shape, CHECK_CODEC)
        except NonFiniteError as error:
            raise MidspanError(f"this worker's own test step: {error}") from error
        self._blobs.check(body, is_over)

    def has_batch(self) -> bool:
        return bool(self._ready)

    def count_ready(self) -> int:
        return len(self._ready)

    def is_settled(self) -> bool:
        return not self._ready and not self._waiting and self._blobs.is_settled()

    def warm_bytes(self) -> int:
        return self._sessions.used_bytes()

    def tidy(self) -> None:
        """Forget the sessions that were longest not used, when they are too many or too large."""
        self._budget.evict()

    def _find_busy(self) -> set[bytes]:
        return {waiting.session.key for waiting in self._ready} | self._waiting.keys()

    def on_end(self, session_key: bytes) -> None:
        self._sessions.drop(session_key)
        self._drop(session_key)
        self._blobs.forget(conditioning_key(session_key))
        self._blobs.forget(latents_key(session_key))

    def on_store_event(self, event: StoreEvent) -> None:
        self._blobs.on_event(event)
        self.stats["loads_given_up"] = self._blobs.loads_given_up
        self.stats["commits_over_share"] = self._blobs.commits_over_share

    def on_step(self, task: Task) -> None:
        """Take a step; answers at once if it cannot be computed."""
        step, opening = task.step, task.opening
        if not isinstance(opening, ImageOpening):
            self._outbox.fail(task, f"an image's step comes with {opening.kind!r}")
            return
        try:
            check_precision(task, self.service)
            self._check(step, opening)
            self._check_tensors(step, opening)
            tensors = unpack_tensors(step.parts, task.body, opening.codecs)
            seal = self._find_seal(task, opening)
        except MidspanError as error:
            self._outbox.fail(task, str(error))
            return
        session = self._sessions.use(task.session_key, lambda: ImageSession(task.session_key, seal))
        if session.last_reply is not None and session.last_reply[0].key == step.key:
            reply, body = session.last_reply
            self._outbox.answer(task, structs.replace(reply, attempt=task.attempt), body)
            return
        if self._is_waiting(task):
            return
        self._drop(task.session_key)
        waiting = Waiting(task, session, tensors)
        self._take_state(waiting)
        self._prepare(waiting)

    def run_batch(self) -> None:
        """Compute the oldest step that is ready, and with it others of its shape."""
        if not self._ready:
            return
        started_at = time.monotonic()
        batch: list[tuple[Waiting, ImageInput, Any]] = []
        left: list[Waiting] = []
        images = 0
        for waiting in self._ready:
            try:
                item, scheduler = self._make_input(waiting)
            except Exception as error:  # a step must never end a worker
                log.exception("a step could not be prepared")
                self._outbox.fail(waiting.task, f"{type(error).__name__}: {error}")
                continue
            fits = not batch or (
                item.shape == batch[0][1].shape
                and images + len(item.sample) <= self._max_batch_images
            )
            if fits:
                batch.append((waiting, item, scheduler))
                images += len(item.sample)
            else:
                left.append(waiting)
        self._ready = left
        if not batch:
            return
        try:
            results = self._executor.run(
                [item for _, item, _ in batch],
                lambda: all(self._outbox.is_cancelled(waiting.task) for waiting, _, _ in batch),
            )
        except StepsCancelled:
            return  # the broker's cancel is confirmed when it is read
        self.stats["image_batches"] += 1
        for (waiting, _, scheduler), result in zip(batch, results, strict=True):
            if isinstance(result, str):
                self._outbox.fail(waiting.task, result)
                continue
            try:
                self._finish(waiting, result, scheduler, started_at)
            except NonFiniteError as error:
                self._outbox.fail(waiting.task, str(error))
            except Exception as error:  # as above
                log.exception("a step could not be finished")
                self._outbox.fail(waiting.task, f"{type(error).__name__}: {error}")

    # --- checks

    def _channels(self) -> tuple[int, int]:
        return boundary_channels(self._executor.model.config)

    def _check(self, step: Step, opening: ImageOpening) -> None:
        if not 1 <= opening.images <= MAX_IMAGES:
            raise ProtocolError(f"session has {opening.images} images; at most {MAX_IMAGES}")
        if step.position >= len(opening.timesteps):
            raise ProtocolError(
                f"step is number {step.position}; the session has {len(opening.timesteps)}"
            )
        if max(step.reply_codec, *(part.codec for part in step.parts), 0) >= len(opening.codecs):
            raise ProtocolError(f"step names a codec beyond the {len(opening.codecs)} it opened")
        for name in opening.codecs:
            check_image_codec(name)
        if not opening.keeps_latents:
            return
        if opening.route != [WHOLE]:
            raise ProtocolError("only sessions of the whole UNet may leave latents to a worker")
        name = opening.scheduler.split(" ")[0]
        if name not in SCHEDULERS:
            raise SettingsError(f"scheduler {name!r} is unknown; known are {', '.join(SCHEDULERS)}")
        if opening.latents_dtype not in LATENTS_DTYPES:
            raise ProtocolError(f"latents of {opening.latents_dtype!r} are unknown")
        ours = describe_scheduler(self._scheduler_config, name)
        if opening.scheduler != ours:
            raise SettingsError(
                f"the edge has scheduler {opening.scheduler!r} and this worker {ours!r}; both "
                "must read the same scheduler_config.json"
            )

    def _check_tensors(self, step: Step, opening: ImageOpening) -> None:
        """Names and shapes, before anything is decoded: a small body may announce much."""
        doubled = opening.images * (2 if opening.guidance > 1 else 1)
        inner = opening.route == [INNER]
        config = self._executor.model.config
        channels = self._channels()[0] if inner else config.in_channels
        names = [part.name for part in step.parts]
        if len(set(names)) < len(names):
            raise ProtocolError(f"step has a tensor twice: {names}")
        if sum(math.prod(part.shape) for part in step.parts) > MAX_STEP_VALUES:
            raise ProtocolError(f"step has more than {MAX_STEP_VALUES} values")
        for part in step.parts:
            name, shape, what = part.name, part.shape, part.name or "sample"
            if name in CONDITIONING:
                count = doubled
                self._check_conditioning(name, shape)
            elif name in (BOUNDARY, "latents") or name.startswith(HISTORY):
                count = doubled if name == BOUNDARY and inner else opening.images
                if len(shape) != 4 or shape[1] != channels:
                    raise ProtocolError(f"{what} has shape {shape}; expected (n, {channels}, h, w)")
                if max(shape[2:]) > MAX_SIDE:
                    raise ProtocolError(f"{what} has sides {shape[2:]}; at most {MAX_SIDE}")
            else:
                raise ProtocolError(f"step has an unknown tensor {name!r}")
            if name != BOUNDARY and not is_cast(opening.codecs[part.codec]):
                raise ProtocolError(f"{what} is in {opening.codecs[part.codec]!r}; expected fp16")
            if shape[0] != count:
                raise ProtocolError(f"{what} is of {shape[0]} images; expected {count}")
        self._check_work(step, doubled, inner)
        if not opening.keeps_latents and BOUNDARY not in names:
            raise ProtocolError("step has no sample")
        sides = {tuple(p.shape[2:]) for p in step.parts if p.name not in CONDITIONING}
        if len(sides) > 1:
            raise ProtocolError(f"the tensors of a step have several sizes: {sorted(sides)}")

    def _check_work(self, step: Step, doubled: int, inner: bool) -> None:
        """A few bytes can announce images that take minutes: a step has a budget of pixels."""
        for part in step.parts:
            if part.name in CONDITIONING:
                continue
            pixels = math.prod(part.shape[2:]) * (4 if inner else 1)
            if doubled * pixels * max(1.0, pixels / ATTENTION_PIXELS) > MAX_PIXELS:
                raise ProtocolError(
                    f"step has {doubled} images with {pixels} pixels of latents each; at most "
                    f"{MAX_PIXELS} in all, and fewer the more of them one image has"
                )

    def _check_conditioning(self, name: str, shape: list[int]) -> None:
        """Raise ProtocolError unless it is as the model wants it."""
        config = self._executor.model.config
        if name == "prompt_embeds":
            fits = len(shape) == 3 and shape[2] == config.cross_attention_dim
            fits = fits and shape[1] <= MAX_TOKENS and math.prod(shape) <= MAX_PROMPT_VALUES
        elif name == "text_embeds":
            fits = shape[1:] == [pooled_size(config)]
        else:
            fits = shape[1:] == [6]
        if not fits:
            raise ProtocolError(f"{name} has shape {shape}, which is not this model's, or too much")

    def _find_seal(self, task: Task, opening: ImageOpening) -> RowSeal:
        known = self._sessions.find(task.session_key)
        if known is not None:
            return known.seal
        if not opening.sealed_key:
            return Checksum(task.session_key)
        if self._pool_key is None:
            raise SettingsError(
                "the session wants its state encrypted, and this worker has no --pool-key"
            )
        return KvCipher(open_sealed(opening.sealed_key, self._pool_key), task.session_key)

    # --- finding a session's state

    def _take_state(self, waiting: Waiting) -> None:
        """State that came with a step is kept, and conditioning saved."""
        session, tensors = waiting.session, waiting.tensors
        if all(name in tensors for name in CONDITIONING):
            session.conditioning = Conditioning(*(tensors.pop(name) for name in CONDITIONING))
            named = dict(zip(CONDITIONING, conditioning_fields(session.conditioning), strict=True))
            key = conditioning_key(session.key)
            step = waiting.step.step  # newer than that of a writer who died half-way
            self._blobs.save(key, 0, step, to_blob(named), session.seal, waiting.task.account)
        if "latents" in tensors:
            dtype = LATENTS_DTYPES[waiting.opening.latents_dtype]
            session.latents = read_latents(tensors, waiting.step.position, dtype)

    def _missing(self, waiting: Waiting) -> list[str]:
        names = [] if waiting.session.conditioning is not None else ["conditioning"]
        if waiting.opening.keeps_latents:
            known = waiting.session.find_latents(waiting.step.position)
            names += ["latents"] if known is None else []
        return names

    def _prepare(self, waiting: Waiting) -> None:
        """Make a step ready, look into the store, or ask the edge."""
        missing = self._missing(waiting)
        session = waiting.session
        if not missing:
            self._waiting.pop(session.key, None)
            self._ready.append(waiting)
        elif not waiting.asked_store:
            waiting.asked_store = True
            waiting.loads_open = len(missing)
            self._waiting[session.key] = waiting
            self.stats["image_takeovers"] += waiting.step.position > 0
            for name in missing:
                self._begin_load(waiting, name)
        else:
            self._waiting.pop(session.key, None)
            self.stats["tensors_asked"] += len(missing)
            need = Need(
                *waiting.step.key, waiting.task.attempt, 0, missing, self._outbox.worker_id,
                tell_precision(waiting.task, self.service),
            )  # fmt: skip
            self._outbox.answer(waiting.task, need)

    def _begin_load(self, waiting: Waiting, name: str) -> None:
        session, position = waiting.session, waiting.step.position

        def then(blob: bytes) -> None:
            if self._waiting.get(session.key) is not waiting:
                return  # a newer step has come, perhaps with newer state
            tensors = from_blob(blob)
            if name == "latents" and "latents" in tensors:
                dtype = LATENTS_DTYPES[waiting.opening.latents_dtype]
                session.latents = read_latents(tensors, position, dtype)
            elif name == "conditioning" and all(n in tensors for n in CONDITIONING):
                session.conditioning = Conditioning(*(tensors[n] for n in CONDITIONING))
            waiting.loads_open -= 1
            if not waiting.loads_open:
                self._prepare(waiting)

        if name == "latents":
            self._blobs.load(latents_key(session.key), position, session.seal, then)
        else:
            self._blobs.load(conditioning_key(session.key), 0, session.seal, then)

    def _drop(self, session_key: bytes) -> None:
        """An older step of a session is no longer wanted; brokers are told."""
        waiting = self._waiting.pop(session_key, None)
        dropped = [w for w in self._ready if w.session.key == session_key]
        self._ready = [w for w in self._ready if w.session.key != session_key]
        for old in [*dropped, *([waiting] if waiting else [])]:
            self._outbox.drop(old.task)

    def on_cancel(self, session_key: bytes, key: StepKey) -> None:
        waiting = self._waiting.get(session_key)
        if waiting is not None and waiting.step.key == key:
            del self._waiting[session_key]
        self._ready = [w for w in self._ready if w.session.key != session_key or w.step.key != key]

    def _is_waiting(self, task: Task) -> bool:
        """Whether a step that was sent again is here already; it keeps its place."""
        here = [*self._ready, *self._waiting.values()]
        for known in here:
            if known.session.key == task.session_key and known.step.key == task.step.key:
                known.task = task
                return True
        return False

    # --- computing

    def _make_input(self, waiting: Waiting) -> tuple[ImageInput, Any]:
        opening, position = waiting.opening, waiting.step.position
        conditioning = waiting.session.conditioning
        assert conditioning is not None
        scheduler = None
        if opening.keeps_latents:
            latents = waiting.session.find_latents(position)
            assert latents is not None
            name, steps = opening.scheduler.split(" ")[0], len(opening.timesteps)
            scheduler = make_scheduler(self._scheduler_config, name, steps)
            go_to(scheduler, position, latents.history)
            sample = latents.sample
        else:
            sample = waiting.tensors[BOUNDARY]
        if opening.route == [WHOLE] and opening.guidance > 1:
            sample = torch.cat([sample] * 2)
        if scheduler is not None:
            sample = scheduler.scale_model_input(sample, scheduler.timesteps[position])
        return ImageInput(sample, opening.timesteps[position], conditioning), scheduler

    def _finish(self, waiting: Waiting, result: Tensor, scheduler: Any, started_at: float) -> None:
        """Guide, encode and answer; then step and save the latents that are kept here."""
        step, opening, session = waiting.step, waiting.opening, waiting.session
        if opening.route == [WHOLE] and opening.guidance > 1:
            without, with_text = result.chunk(2)
            result = without + opening.guidance * (with_text - without)
        codec = opening.codecs[step.reply_codec]
        body = encode_tensor(result, codec)
        done_at = time.monotonic()
        reply = StepReply(
            *step.key,
            attempt=waiting.task.attempt,
            rows=0,
            committed=0,
            worker_id=self._outbox.worker_id,
            queue_us=waiting.task.broker_queue_us
            + round((started_at - waiting.task.arrived_at) * 1e6),
            compute_us=round((done_at - started_at) * 1e6),
            precision=tell_precision(waiting.task, self.service),
        )
        session.last_reply = (reply, body) if len(body) <= KEEP_REPLY_BYTES else None
        self._outbox.answer(waiting.task, reply, body)
        self.stats["image_steps"] += 1
        if scheduler is None:
            return
        # in the edge's own dtype, so that both sides round alike
        dtype = LATENTS_DTYPES[opening.latents_dtype]
        travelled = decode_tensor(body, result.shape, codec).to(dtype)
        before = session.find_latents(step.position)
        assert before is not None
        sample = scheduler.step(
            travelled, scheduler.timesteps[step.position], before.sample, return_dict=False
        )[0]
        session.before = before
        session.latents = Latents(step.position + 1, sample, read_history(scheduler))
        self._blobs.save(
            latents_key(session.key), step.position + 1, step.step,
            to_blob(session.latents.to_tensors()), session.seal, waiting.task.account,
        )  # fmt: skip
