"""Image sessions in a worker's memory, and the names of what they leave in the store."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from cloud_worker.loop.batcher import Task
from cloud_worker.state.row_seals import RowSeal
from common.diffusion.unet import Conditioning
from common.protocol.messages import ImageOpening, Step, StepReply

HISTORY = "history"


@dataclass(slots=True)
class Latents:
    """What a worker that keeps the latents needs before step `position`."""

    position: int
    sample: Tensor  # (B, 4, h, w)
    history: list[Tensor] = field(default_factory=list)  # of a multistep scheduler

    def to_tensors(self) -> dict[str, Tensor]:
        named = {f"{HISTORY}{index}": tensor for index, tensor in enumerate(self.history)}
        return {"latents": self.sample, **named}


@dataclass(slots=True)
class ImageSession:
    """One image session in memory: a cache, worth nothing once lost."""

    key: bytes
    seal: RowSeal
    conditioning: Conditioning | None = None
    latents: Latents | None = None
    before: Latents | None = None  # of the step before, in case that is asked for again
    last_reply: tuple[StepReply, bytes] | None = None

    def find_latents(self, position: int) -> Latents | None:
        """Those before a step, if they are here."""
        known = (self.latents, self.before)
        return next((x for x in known if x is not None and x.position == position), None)

    @property
    def size(self) -> int:
        tensors: list[Tensor] = []
        for latents in (self.latents, self.before):
            tensors += [latents.sample, *latents.history] if latents is not None else []
        if self.conditioning is not None:
            tensors += [self.conditioning.prompt_embeds, self.conditioning.text_embeds]
        reply = len(self.last_reply[1]) if self.last_reply else 0
        return reply + 1000 + sum(tensor.nbytes for tensor in tensors)


@dataclass(slots=True)
class Waiting:
    """A step on its way to being computed."""

    task: Task
    session: ImageSession
    tensors: dict[str, Tensor]
    asked_store: bool = False
    loads_open: int = 0

    @property
    def step(self) -> Step:
        return self.task.step

    @property
    def opening(self) -> ImageOpening:
        assert isinstance(self.task.opening, ImageOpening)
        return self.task.opening


def conditioning_key(session_key: bytes) -> bytes:
    return session_key + b"/conditioning"


def latents_key(session_key: bytes) -> bytes:
    return session_key + b"/latents"


def conditioning_fields(conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
    return conditioning.prompt_embeds, conditioning.text_embeds, conditioning.time_ids


def read_latents(tensors: dict[str, Tensor], position: int, dtype: torch.dtype) -> Latents:
    """Latents and history out of a step's or a blob's tensors."""
    names = sorted(name for name in tensors if name.startswith(HISTORY))
    history = [tensors[name].to(dtype) for name in names]
    return Latents(position, tensors["latents"].to(dtype), history)
