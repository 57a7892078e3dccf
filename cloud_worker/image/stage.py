"""An image session at its part of a UNet: conditioning and latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cloud_worker.state.blobs import LATENTS
from cloud_worker.state.stage import OVERHEAD_BYTES, Stage
from common.diffusion.unet import Conditioning

CONDITIONING = ("prompt_embeds", "text_embeds", "time_ids")
HISTORY = "history"


@dataclass(slots=True)
class Latents:
    """What a worker that keeps the latents needs before step `position`."""

    position: int
    sample: Tensor  # (B, 4, h, w)
    history: list[Tensor] = field(default_factory=list)  # of a multistep scheduler

    def to_tensors(self) -> dict[str, Tensor]:
        named = {f"{HISTORY}{index}": tensor for index, tensor in enumerate(self.history)}
        return {LATENTS: self.sample, **named}


@dataclass(slots=True)
class ImageStage(Stage):
    """One image session: its conditioning, and its latents where the worker keeps them."""

    conditioning: Conditioning | None = None
    latents: Latents | None = None
    before: Latents | None = None  # of the step before, in case that is asked for again
    sample: Tensor | None = None  # that came with the step that waits

    def find_latents(self, position: int) -> Latents | None:
        """Those before a step, if they are here."""
        known = (self.latents, self.before)
        return next((x for x in known if x is not None and x.position == position), None)

    @property
    def items_size(self) -> int:
        tensors: list[Tensor] = []
        for latents in (self.latents, self.before):
            tensors += [latents.sample, *latents.history] if latents is not None else []
        if self.conditioning is not None:
            tensors += [self.conditioning.prompt_embeds, self.conditioning.text_embeds]
        if self.sample is not None:
            tensors.append(self.sample)
        return OVERHEAD_BYTES + sum(tensor.nbytes for tensor in tensors)


def conditioning_fields(conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
    return conditioning.prompt_embeds, conditioning.text_embeds, conditioning.time_ids


def read_latents(tensors: dict[str, Tensor], position: int, dtype: torch.dtype) -> Latents:
    """Latents and history out of a step's or a blob's tensors."""
    names = sorted(name for name in tensors if name.startswith(HISTORY))
    history = [tensors[name].to(dtype) for name in names]
    return Latents(position, tensors[LATENTS].to(dtype), history)
