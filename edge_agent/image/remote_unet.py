"""Stands in for the UNet in diffusers' own pipeline, and has the pool compute it.

The pipeline does everything else: prompts, noise, scheduler, guidance. With the whole UNet on the
workers they also guide, so what comes back is one noise for both halves of the pipeline's batch:
doubled, it goes through the pipeline's own guidance unchanged.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.codecs.spec import EXACT
from common.diffusion.schedulers import read_history
from common.diffusion.shapes import boundary_channels
from common.diffusion.tensors import decode_tensor, pack_tensors
from common.diffusion.unet import Conditioning, UnetPart
from common.errors import NonFiniteError, ProtocolError
from common.protocol.messages import BOUNDARY, ImageOpening, Need, StepReply
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.session_asks import SessionAsks

CONDITIONING = ("prompt_embeds", "text_embeds")
CONDITIONING_CODEC = "fp16+zstd"  # an empty negative prompt is all zeros


@dataclass(slots=True)
class ImageStats:
    """What an image cost."""

    steps: int = 0
    calls: int = 0  # steps that went to the pool
    bytes_up: int = 0
    bytes_down: int = 0
    total_s: float = 0.0
    pool_s: float = 0.0
    middle_s: float = 0.0
    tensors_resent: int = 0
    answers_unusable: int = 0
    calls_by_worker: Counter[str] = field(default_factory=Counter)

    def to_json(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "calls": self.calls,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "total_s": round(self.total_s, 3),
            "pool_s": round(self.pool_s, 3),
            "middle_s": round(self.middle_s, 3),
            "tensors_resent": self.tensors_resent,
            "answers_unusable": self.answers_unusable,
            "calls_by_worker": dict(self.calls_by_worker),
        }


@dataclass(frozen=True, slots=True)
class Travelled:
    """What went over the wire in one step, as the other side decoded it."""

    position: int
    up: Tensor | None
    down: Tensor


class RemoteUNet(nn.Module):
    """A UNet whose inner part, or all of it, is computed by the pool."""

    def __init__(
        self,
        client: BrokerClient,
        config: Any,
        outer: UnetPart | None,
        dtype: torch.dtype,
        device: torch.device,
        deadline_s: float = 120.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.dtype, self.device = dtype, device  # the pipeline asks
        self.add_embedding = _Widths(config.projection_class_embeddings_input_dim)
        self.stats = ImageStats()
        self.last_worker_id = ""
        self.on_travel: Callable[[Travelled], None] = lambda travelled: None
        self._client = client
        self._outer = [outer] if outer is not None else []  # not a module of this one
        self._deadline_s = deadline_s
        self._asks: SessionAsks | None = None
        self._scheduler: Any = None

    def begin(
        self,
        opening: ImageOpening,
        codec_up: str,
        codec_down: str,
        reuse: int,
        scheduler: Any,
        first: int = 0,
    ) -> None:
        """Begin a session at its step `first`; the opening names `list_codecs`."""
        self.stats = ImageStats()
        self._opening = opening
        self._asks = SessionAsks(opening, "midspan worker --image-model DIR, of the same weights")
        self._up, self._down = codec_up, codec_down
        self._reuse = reuse
        self._scheduler = scheduler
        self._raw_latents: Tensor | None = None
        self._position = first
        self._until_asked = 0  # steps
        self._deep: Tensor | None = None
        self._started = self._client.bytes_up, self._client.bytes_down
        if opening.keeps_latents:
            self._watch_latents(scheduler)

    def end(self) -> None:
        """Tell the pool that it may forget the session."""
        if self._asks is not None:
            self._client.end_session(self._asks.session_id)
            self._asks = None

    def _watch_latents(self, scheduler: Any) -> None:
        """See the latents before the scheduler scales them: a worker may need them anew."""
        scale = scheduler.scale_model_input

        def watch(sample: Tensor, timestep: Any = None) -> Tensor:
            self._raw_latents = sample
            scaled: Tensor = scale(sample, timestep)
            return scaled

        scheduler.scale_model_input = watch

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        added_cond_kwargs: dict[str, Tensor],
        **_: Any,
    ) -> tuple[Tensor]:
        """The noise in `sample` (n, 4, h, w), as UNet2DConditionModel.forward gives it."""
        assert self._asks is not None, "begin was not called"
        sample = sample.contiguous()  # as it will be at the worker, so that parts add alike
        conditioning = Conditioning(
            encoder_hidden_states, added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]
        )
        position = self._position
        self._position += 1
        self.stats.steps += 1
        if self._outer:
            noise = self._run_inner(sample, timestep, conditioning, position)
        else:
            noise = self._run_whole(sample, conditioning, position)
        now_up, now_down = self._client.bytes_up, self._client.bytes_down
        self.stats.bytes_up = now_up - self._started[0]
        self.stats.bytes_down = now_down - self._started[1]
        return (noise.to(sample.device, sample.dtype),)

    def _run_whole(self, sample: Tensor, conditioning: Conditioning, position: int) -> Tensor:
        halves = 2 if self._opening.guidance > 1 else 1
        own = sample.chunk(halves)[0]
        tensors = {} if self._opening.keeps_latents else {BOUNDARY: own}
        noise = self._ask(position, tensors, conditioning, tuple(own.shape))
        return torch.cat([noise] * halves)

    def _run_inner(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning, position: int
    ) -> Tensor:
        (outer,) = self._outer
        boundary, state = outer.run_before(sample, timestep, conditioning)
        if self._until_asked == 0 or self._deep is None:
            channels = boundary_channels(self.config)[1]
            shape = (len(boundary), channels, *boundary.shape[2:])
            deep = self._ask(position, {BOUNDARY: boundary}, conditioning, shape)
            self._deep = deep.to(outer.device, outer.dtype)
            self._until_asked = self._reuse
        self._until_asked -= 1
        return outer.run_after(self._deep, state)

    # --- asking the pool

    def _ask(
        self,
        position: int,
        tensors: dict[str, Tensor],
        conditioning: Conditioning,
        shape: tuple[int, ...],
    ) -> Tensor:
        """Have a step computed; sends what a worker lacks. The answer, float32, of that shape."""
        asks = self._asks
        assert asks is not None
        sent_at = time.monotonic()
        lacking = [] if asks.is_known else ["conditioning"]
        if not asks.is_known and self._opening.keeps_latents:
            lacking.append("latents")
        asks.begin_work()
        while True:
            sending = {**tensors, **self._state(lacking, conditioning)}
            answer, body = self._send(asks, position, sending, math.prod(shape) * 4)
            asks.is_known = True
            try:
                lacking = self._read_need(answer)
                if isinstance(answer, StepReply):
                    down = decode_tensor(body, shape, self._down)
            except (NonFiniteError, ProtocolError) as error:
                self.stats.answers_unusable += 1
                asks.on_unusable(answer, error)
                continue
            asks.on_usable(answer)
            if not isinstance(answer, StepReply):
                self.stats.tensors_resent += len(lacking)
                asks.on_need(answer, "the session")
                continue
            self.stats.calls += 1
            self.stats.calls_by_worker[answer.worker_id] += 1
            self.last_worker_id = answer.worker_id
            self.stats.pool_s += time.monotonic() - sent_at
            self.stats.middle_s += answer.compute_us / 1e6
            self.on_travel(Travelled(position, tensors.get(BOUNDARY), down))
            return down

    def _state(self, names: list[str], conditioning: Conditioning) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        if "conditioning" in names:
            tensors["prompt_embeds"] = conditioning.prompt_embeds
            tensors.update(conditioning.arguments())
        if "latents" in names:
            assert self._raw_latents is not None
            halves = 2 if self._opening.guidance > 1 else 1
            tensors["latents"] = self._raw_latents.chunk(halves)[0]
            for index, output in enumerate(read_history(self._scheduler)):
                tensors[f"history{index}"] = output
        return tensors

    def _read_need(self, answer: StepReply | Need) -> list[str]:
        """What a worker lacks. Raises ProtocolError for what it cannot lack, naming it."""
        if isinstance(answer, StepReply):
            return []
        known = {"conditioning", "latents"} if self._opening.keeps_latents else {"conditioning"}
        if not answer.names or set(answer.names) - known:
            lacking = answer.names or "rows"
            raise ProtocolError(f"worker {answer.worker_id} asks an image for {lacking}")
        return answer.names

    def _send(
        self, asks: SessionAsks, position: int, tensors: dict[str, Tensor], reply_bytes: int
    ) -> tuple[StepReply | Need, bytes]:
        codecs = self._opening.codecs
        chosen = dict.fromkeys(CONDITIONING, conditioning_codec(self._up)) | {BOUNDARY: self._up}
        parts, body = pack_tensors(tensors, chosen, codecs)
        answered = self._client.exchange(
            asks.make(
                position=position,
                parts=parts,
                body=body,
                reply_codec=codecs.index(self._down),
                deadline_s=self._deadline_s,
                reply_bytes=reply_bytes,
            )
        )
        return answered.answer, answered.body


class _Widths:
    """What the pipeline reads of the UNet's `add_embedding`."""

    def __init__(self, in_features: int) -> None:
        self.linear_1 = nn.Linear(in_features, 1, device="meta")


def conditioning_codec(codec_up: str) -> str:
    """Of the prompt's embeddings: float16 unless all shall be exact."""
    return EXACT if codec_up == EXACT else CONDITIONING_CODEC


def list_codecs(codec_up: str, codec_down: str) -> list[str]:
    """What an opening must name."""
    return list(dict.fromkeys([EXACT, conditioning_codec(codec_up), codec_up, codec_down]))
