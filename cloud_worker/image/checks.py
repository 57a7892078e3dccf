"""What a step of an image may be: judged by its header, before anything is decoded.

A small body may announce much: tensors of a gigabyte are a few hundred bytes, an image that takes
minutes is no longer than one that takes a second.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from cloud_worker.image.stage import CONDITIONING, HISTORY
from cloud_worker.state.blobs import LATENTS
from common.codecs.lambda_split import PREFIX
from common.codecs.spec import parse_codec
from common.diffusion.schedulers import check_resumable, describe_scheduler
from common.diffusion.shapes import INNER, WHOLE, ConditioningSizes, boundary_channels
from common.diffusion.tensors import check_image_codec
from common.errors import ProtocolError, SettingsError
from common.protocol.messages import BOUNDARY, ImageOpening, Part, Step

LATENTS_DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip
MAX_TOKENS = 4096
MAX_STEP_VALUES = 1 << 26  # of all tensors of a step together
MAX_PROMPT_VALUES = 1 << 25
MAX_IMAGES = 64
MAX_SIDE = 1024  # of the latents
MAX_PIXELS = 1 << 18  # of the latents of all images of a step, doubled for guidance
ATTENTION_PIXELS = 1 << 15  # of one image; in a larger one each pixel costs more, as all see all


def is_cast(codec: str) -> bool:
    """Whether a codec keeps every value as a float: in a few bytes it cannot say much."""
    return not codec.startswith(PREFIX) and parse_codec(codec).kind == "cast"


def is_guided(opening: ImageOpening) -> bool:
    """Whether every image is computed twice, with the prompt and without."""
    return opening.guidance > 1


class ImageChecks:
    """Judges openings and steps for one UNet and its scheduler's configuration."""

    def __init__(
        self, config: Any, sizes: ConditioningSizes, scheduler_config: dict[str, Any]
    ) -> None:
        self._config = config
        self._sizes = sizes
        self._scheduler_config = scheduler_config

    def check(self, step: Step, opening: ImageOpening) -> None:
        """Raise ProtocolError or SettingsError for what cannot be computed, or is too much."""
        self._check_opening(step, opening)
        self._check_parts(step, opening)

    def _check_opening(self, step: Step, opening: ImageOpening) -> None:
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
        if opening.keeps_latents:
            self._check_scheduler(opening)

    def _check_scheduler(self, opening: ImageOpening) -> None:
        if opening.route != [WHOLE]:
            raise ProtocolError("only sessions of the whole UNet may leave latents to a worker")
        name = opening.scheduler.split(" ")[0]
        check_resumable(self._scheduler_config, name)
        if opening.latents_dtype not in LATENTS_DTYPES:
            raise ProtocolError(f"latents of {opening.latents_dtype!r} are unknown")
        ours = describe_scheduler(self._scheduler_config, name)
        if opening.scheduler != ours:
            raise SettingsError(
                f"the edge has scheduler {opening.scheduler!r} and this worker {ours!r}; both "
                "must read the same scheduler_config.json"
            )

    def _check_parts(self, step: Step, opening: ImageOpening) -> None:
        names = [part.name for part in step.parts]
        if len(set(names)) < len(names):
            raise ProtocolError(f"step has a tensor twice: {names}")
        if sum(math.prod(part.shape) for part in step.parts) > MAX_STEP_VALUES:
            raise ProtocolError(f"step has more than {MAX_STEP_VALUES} values")
        for part in step.parts:
            self._check_part(part, opening)
        self._check_work(step, opening)
        if not opening.keeps_latents and BOUNDARY not in names:
            raise ProtocolError("step has no sample")
        sides = {tuple(p.shape[2:]) for p in step.parts if p.name not in CONDITIONING}
        if len(sides) > 1:
            raise ProtocolError(f"the tensors of a step have several sizes: {sorted(sides)}")

    def _check_part(self, part: Part, opening: ImageOpening) -> None:
        """Its name, shape and codec."""
        name, shape, what = part.name, part.shape, part.name or "sample"
        doubled = opening.images * (2 if is_guided(opening) else 1)
        inner = opening.route == [INNER]
        if name in CONDITIONING:
            count = doubled
            self._check_conditioning(name, shape)
        elif name in (BOUNDARY, LATENTS) or name.startswith(HISTORY):
            if name != BOUNDARY and not opening.keeps_latents:
                raise ProtocolError(f"{what} comes in a session that keeps its latents to itself")
            count = doubled if name == BOUNDARY and inner else opening.images
            channels = boundary_channels(self._config)[0] if inner else self._config.in_channels
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

    def _check_work(self, step: Step, opening: ImageOpening) -> None:
        """A few bytes can announce images that take minutes: a step has a budget of pixels."""
        doubled = opening.images * (2 if is_guided(opening) else 1)
        for part in step.parts:
            if part.name in CONDITIONING:
                continue
            pixels = math.prod(part.shape[2:]) * (4 if opening.route == [INNER] else 1)
            if doubled * pixels * max(1.0, pixels / ATTENTION_PIXELS) > MAX_PIXELS:
                raise ProtocolError(
                    f"step has {doubled} images with {pixels} pixels of latents each; at most "
                    f"{MAX_PIXELS} in all, and fewer the more of them one image has"
                )

    def _check_conditioning(self, name: str, shape: list[int]) -> None:
        sizes = self._sizes
        if name == "prompt_embeds":
            fits = len(shape) == 3 and shape[2] == sizes.prompt
            fits = fits and shape[1] <= MAX_TOKENS and math.prod(shape) <= MAX_PROMPT_VALUES
        elif name == "text_embeds":
            fits = shape[1:] == [sizes.pooled]
        else:
            fits = shape[1:] == [sizes.time_ids]
        if not fits:
            raise ProtocolError(f"{name} has shape {shape}, which is not this model's, or too much")
