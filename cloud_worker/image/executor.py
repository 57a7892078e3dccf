"""Compute denoising steps of several image sessions in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cloud_worker.loop.together import StepsCancelled, run_together
from common.diffusion.shapes import INNER, WHOLE
from common.diffusion.unet import Conditioning, UnetPart


@dataclass(frozen=True, slots=True)
class ImageInput:
    """One session's part of a batch. `sample` (n, C, h, w) is already doubled for guidance."""

    sample: Tensor
    time: float
    conditioning: Conditioning

    @property
    def shape(self) -> tuple[object, ...]:
        """Inputs of one shape go into one batch."""
        tokens = self.conditioning.prompt_embeds.shape[1:]
        return (*self.sample.shape[1:], *tokens)


class ImageExecutor:
    """Runs one part of one UNet."""

    def __init__(self, model: UnetPart, part: str) -> None:
        assert part in (WHOLE, INNER)
        self.model = model
        self.part = part

    def run(
        self, batch: Sequence[ImageInput], is_cancelled: Callable[[], bool] = lambda: False
    ) -> list[Tensor | str]:
        """What each input gives, on the CPU, or why it could not be computed.

        Between the UNet's blocks `is_cancelled` is asked; raises StepsCancelled if it says so.
        """
        self.model.on_block = lambda: _stop_if(is_cancelled())
        return run_together(batch, self._run_together, lambda _: _free_device_memory())

    def _run_together(self, batch: Sequence[ImageInput]) -> Sequence[Tensor]:
        device, dtype = self.model.device, self.model.dtype
        sizes = [len(item.sample) for item in batch]
        sample = _join([item.sample for item in batch]).to(device, dtype)
        conditioning = Conditioning(
            _join([item.conditioning.prompt_embeds for item in batch]).to(device, dtype),
            _join([item.conditioning.text_embeds for item in batch]).to(device, dtype),
            _join([item.conditioning.time_ids for item in batch]).to(device, dtype),
        )
        times = torch.tensor([item.time for item in batch], device=device)
        times = times.repeat_interleave(torch.tensor(sizes, device=device))
        run = self.model.run_whole if self.part == WHOLE else self.model.run_inner
        return torch.split(run(sample, times, conditioning).cpu(), sizes)


def _free_device_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _stop_if(cancelled: bool) -> None:
    if cancelled:
        raise StepsCancelled


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
