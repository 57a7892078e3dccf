"""Make images with the pool: diffusers' own SDXL pipeline around a remote UNet."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.adapters.choice import LoraChoice
from common.diffusion.lora import ImageLora
from common.diffusion.schedulers import (
    OWN,
    check_resumable,
    describe_scheduler,
    make_scheduler,
    read_scheduler_config,
)
from common.diffusion.shapes import INNER, OUTER, WHOLE
from common.diffusion.tensors import check_image_codec
from common.diffusion.unet import load_unet, open_unet
from common.errors import SettingsError
from common.protocol.messages import MAX_TIMESTEPS, ImageOpening
from common.security.sealing import draw_key, seal
from common.weights.loading import check_device, parse_dtype
from edge_agent.engine.client import BrokerClient
from edge_agent.image.init_picture import DEFAULT_STRENGTH, SIDE_MULTIPLE, fit_picture
from edge_agent.image.pipelines import Pipelines
from edge_agent.image.remote_unet import ImageStats, RemoteUNet, Travelled, list_codecs

MAX_COUNT = 16
MAX_GUIDANCE = 1000


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """What to make, and how it goes to the pool. Sizes in pixels, None for the model's own."""

    prompt: str
    negative_prompt: str = ""
    steps: int = 20
    guidance: float = 5.0
    seed: int = 0
    height: int | None = None
    width: int | None = None
    count: int = 1
    scheduler: str = OWN
    cut: str = WHOLE
    sync: str = "edge"  # whether edge or cloud keeps the latents; only with cut unet
    codec_up: str = "int8"
    codec_down: str = "int8"
    reuse: int = 1  # ask the pool every so many steps; only with cut inner
    init_image: Image.Image | None = None  # what the picture begins with
    strength: float = DEFAULT_STRENGTH  # how much of the steps is done anew, with an init image

    @property
    def seeds(self) -> list[int]:
        """Of each image: it is the one that its seed gives alone."""
        each = [self.seed + index for index in range(self.count)]
        return [seed - 2**64 if seed >= 2**64 else seed for seed in each]

    @property
    def skipped(self) -> int:
        """Steps that are not made, because the picture does not begin with noise alone."""
        if self.init_image is None:
            return 0
        return max(self.steps - min(int(self.steps * self.strength), self.steps), 0)

    def check(self) -> None:
        """Raises SettingsError, which names what is wrong."""
        if not self.prompt.strip():
            raise SettingsError("the prompt is empty")
        if self.steps < 1:
            raise SettingsError(f"the number of steps is {self.steps}; expected 1 or more")
        if self.steps > MAX_TIMESTEPS:
            raise SettingsError(f"the number of steps is {self.steps}; at most {MAX_TIMESTEPS}")
        if not 0 < self.strength <= 1:
            raise SettingsError(f"the strength is {self.strength}; expected 0 to 1, but not 0")
        if self.skipped == self.steps:
            raise SettingsError(
                f"the strength is {self.strength}, which leaves none of {self.steps} steps; "
                f"expected {1 / self.steps:.2g} or more"
            )
        if not math.isfinite(self.guidance) or abs(self.guidance) > MAX_GUIDANCE:
            raise SettingsError(f"the guidance is {self.guidance}; expected at most {MAX_GUIDANCE}")
        if not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"the seed is {self.seed}; expected 64 bits")
        if not 1 <= self.count <= MAX_COUNT:
            raise SettingsError(f"the number of images is {self.count}; expected 1 to {MAX_COUNT}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None and (size <= 0 or size % SIDE_MULTIPLE):
                nearest = max(SIDE_MULTIPLE, round(size / SIDE_MULTIPLE) * SIDE_MULTIPLE)
                raise SettingsError(
                    f"the {name} is {size}; expected a multiple of {SIDE_MULTIPLE}, as {nearest}"
                )
        if self.cut not in (WHOLE, INNER):
            raise SettingsError(f"the cut is {self.cut!r}; expected {WHOLE} or {INNER}")
        if self.sync not in ("edge", "cloud"):
            raise SettingsError(f"the sync is {self.sync!r}; expected edge or cloud")
        if self.sync == "cloud" and self.cut != WHOLE:
            raise SettingsError(f"sync cloud goes with cut {WHOLE}; {INNER} keeps latents here")
        if self.reuse < 1:
            raise SettingsError(f"reuse is {self.reuse}; expected 1 or more")
        if self.reuse > 1 and self.cut != INNER:
            raise SettingsError(f"reuse goes with cut {INNER}: it reuses what comes back there")
        check_image_codec(self.codec_up)
        check_image_codec(self.codec_down)


@dataclass(frozen=True, slots=True)
class Progress:
    """After a step: its number from 1, of how many, and the latents (B, 4, h, w)."""

    step: int
    steps: int
    latents: Tensor


class ImageMaker:
    """The edge's side of an SDXL pipeline. Raises CheckpointError for a directory that is none.

    With `cut` unet the edge loads no UNet at all, with inner the outer blocks only.
    """

    def __init__(
        self,
        directory: Path,
        client: BrokerClient,
        cut: str = WHOLE,
        dtype: str = "float32",
        device: str = "cpu",
        deadline_s: float = 120.0,
        pool_key: bytes | None = None,
        loras: Sequence[LoraChoice] = (),
        weights: Path | None = None,
    ) -> None:
        self._pool_key = pool_key
        self._cut = cut
        self._torch_dtype, self._device = parse_dtype(dtype), check_device(device)
        opened = [ImageLora(choice) for choice in loras]
        checkpoint = open_unet(directory, opened, weights)
        self._fingerprint = checkpoint.fingerprint()
        self._scheduler_config = read_scheduler_config(directory)
        outer = None
        if cut == INNER:
            outer = load_unet(checkpoint, OUTER, self._torch_dtype, self._device)
        config = _Config(checkpoint.config_json)
        self.unet = RemoteUNet(client, config, outer, self._torch_dtype, self._device, deadline_s)
        checkpoint.close()
        self._pipelines = Pipelines(
            directory, self.unet, self._scheduler_config, self._torch_dtype, self._device, opened,
            weights,
        )  # fmt: skip

    @property
    def stats(self) -> ImageStats:
        return self.unet.stats

    def find_cut_off(self, text: str) -> str:
        """The end of a prompt that the text encoders will not see, or nothing."""
        tokenizer = self._pipelines.tokenizer
        ids = tokenizer(text, truncation=False, verbose=False).input_ids
        beyond = ids[tokenizer.model_max_length - 1 : -1]
        return str(tokenizer.decode(beyond)).strip() if beyond else ""

    @property
    def max_prompt_tokens(self) -> int:
        """Of a prompt, with the two tokens around it."""
        return int(self._pipelines.tokenizer.model_max_length)

    def make(
        self,
        settings: ImageSettings,
        on_step: Callable[[Progress], None] = lambda progress: None,
        on_travel: Callable[[Travelled], None] = lambda travelled: None,
    ) -> list[Image.Image]:
        """Make images. Raises SettingsError, NoWorker, StepRefused or BrokerUnavailable."""
        settings.check()
        if settings.cut != self._cut:
            raise SettingsError(f"this maker was loaded for cut {self._cut}, not {settings.cut}")
        pipeline, begins_with = self._pick_pipeline(settings)
        if settings.sync == "cloud":
            check_resumable(self._scheduler_config, settings.scheduler)
        scheduler = make_scheduler(self._scheduler_config, settings.scheduler, settings.steps)
        first = settings.skipped * scheduler.order
        timesteps = [float(time) for time in scheduler.timesteps]
        if len(timesteps) > MAX_TIMESTEPS:
            raise SettingsError(
                f"scheduler {settings.scheduler} takes {len(timesteps)} steps for "
                f"{settings.steps}; at most {MAX_TIMESTEPS}"
            )
        opening = ImageOpening(
            model=self._fingerprint,
            route=[settings.cut],
            codecs=list_codecs(settings.codec_up, settings.codec_down),
            images=settings.count,
            guidance=settings.guidance,
            timesteps=timesteps,
            keeps_latents=settings.sync == "cloud",
            scheduler=describe_scheduler(self._scheduler_config, settings.scheduler),
            latents_dtype=str(self._torch_dtype).removeprefix("torch."),
            sealed_key=seal(draw_key(), self._pool_key) if self._pool_key else b"",
        )
        pipeline.scheduler = scheduler
        self.unet.on_travel = on_travel
        self.unet.begin(
            opening, settings.codec_up, settings.codec_down, settings.reuse, scheduler, first
        )

        def after_step(_: Any, index: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
            on_step(Progress(index + 1, len(timesteps) - first, values["latents"]))
            return values

        started_at = time.monotonic()
        try:
            result = pipeline(
                settings.prompt,
                negative_prompt=settings.negative_prompt or None,
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance,
                num_images_per_prompt=settings.count,
                generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
                callback_on_step_end=after_step,
                **begins_with,
            )
        finally:
            self.unet.end()
            self.stats.total_s = time.monotonic() - started_at
        images: list[Image.Image] = result.images
        return images

    def _pick_pipeline(self, settings: ImageSettings) -> tuple[Any, dict[str, Any]]:
        """The one that makes this picture, and what else it is told."""
        pipelines, picture = self._pipelines, settings.init_image
        if picture is not None:
            fitted = fit_picture(picture, settings.width, settings.height)
            return pipelines.from_picture, {"image": fitted, "strength": settings.strength}
        if pipelines.are_scored:
            raise SettingsError("a refiner makes a picture of another one; expected an init image")
        return pipelines.from_text, {"height": settings.height, "width": settings.width}

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, 4, h, w) to pictures: for previews."""
        vae = self._pipelines.vae
        scaled = latents.to(vae.dtype) / vae.config.scaling_factor
        mean, spread = vae.config.latents_mean, vae.config.latents_std
        if mean is not None and spread is not None:
            scaled = scaled * _per_channel(spread, scaled) + _per_channel(mean, scaled)
        decoded = vae.decode(scaled, return_dict=False)[0]
        processor = self._pipelines.from_picture.image_processor
        pictures: list[Image.Image] = processor.postprocess(decoded)
        return pictures


class _Config(dict[str, Any]):
    """A UNet's configuration, read by name as the pipeline does."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            if name.startswith("__"):
                raise AttributeError(name) from None
            return None


def _per_channel(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)
