"""Cut an SDXL UNet: the whole of it, its inner blocks for a worker, its outer ones for an edge.

    outer  conv_in, down_blocks.0 | the last but one up block's upsampler, the last up block,
           conv_norm_out, conv_out
    inner  down_blocks 1.., mid_block, the up blocks but the last, without that upsampler

What crosses is the output of down_blocks.0 on the way up, (n, C0, h/2, w/2), and what goes into the
upsampler on the way down, (n, C1, h/2, w/2); for SDXL base C0 = 320 and C1 = 640. All other skip
connections stay on their side. The embedding of time and added conditions is cheap, so both sides
compute it. Blocks are diffusers' own, called as its UNet calls them.

Letters: n images of a batch (twice as many with guidance), h and w of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.diffusion.lora import UNET, ImageLora
from common.diffusion.shapes import (
    INNER,
    OUTER,
    ConditioningSizes,
    check_part,
    find_sizes,
    read_index,
)
from common.diffusion.single_file import SingleFileUnet
from common.errors import CheckpointError
from common.weights.checkpoint import Checkpoint
from common.weights.shapes import build_without_values

STEM = "diffusion_pytorch_model"


@dataclass(frozen=True, slots=True)
class Conditioning:
    """What the UNet is told besides the sample and the time."""

    prompt_embeds: Tensor  # (n, tokens, cross-attention width)
    text_embeds: Tensor  # (n, pooled width)
    time_ids: Tensor  # (n, 6): original size, crop, target size; (n, 5) with a score instead

    def arguments(self) -> dict[str, Tensor]:
        return {"text_embeds": self.text_embeds, "time_ids": self.time_ids}


def open_unet(
    directory: Path, loras: Sequence[ImageLora] = (), weights: Path | None = None
) -> Checkpoint:
    """The UNet's checkpoint, changed, of a pipeline's directory; `weights` is a file with others.

    Raises CheckpointError.
    """
    read_index(directory)
    if weights is not None:
        checkpoint: Checkpoint = SingleFileUnet(directory, weights)
    else:
        checkpoint = Checkpoint(
            directory / "unet", stem=STEM, config_key="_class_name", name=directory.name
        )
    for lora in loras:
        if lora.changes(UNET):
            checkpoint.adapt(lora.for_unet(checkpoint.tensor_names, checkpoint.config_json))
    return checkpoint


def load_unet(
    checkpoint: Checkpoint, part: str, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> UnetPart:
    """Build a part and read its tensors, and only those. Raises CheckpointError."""
    unet = build_unet(checkpoint.config_json, part)
    names = sorted(unet.state_dict())
    missing = set(names) - set(checkpoint.tensor_names)
    if missing:
        raise CheckpointError(f"{checkpoint.directory} lacks tensors: {sorted(missing)[:3]} …")
    unet.load_state_dict(checkpoint.read(names, dtype), assign=True)
    sizes = find_sizes(checkpoint.config_json, read_index(checkpoint.directory.parent))
    return UnetPart(unet.to(device).eval().requires_grad_(False), part, sizes)


def build_unet(config: dict[str, Any], part: str) -> Any:
    """A UNet on the meta device that has the modules of a part only. Raises CheckpointError."""
    from diffusers import UNet2DConditionModel

    check_part(config, part)
    unet: Any = build_without_values(lambda: UNet2DConditionModel.from_config(config))
    if part == INNER:
        for name in ("conv_in", "conv_norm_out", "conv_act", "conv_out"):
            setattr(unet, name, None)
        unet.down_blocks[0] = nn.Identity()
        unet.up_blocks[-1] = nn.Identity()
        unet.up_blocks[-2].upsamplers = None
    elif part == OUTER:
        unet.mid_block = None
        for index in range(1, len(unet.down_blocks)):
            unet.down_blocks[index] = nn.Identity()
        for index in range(len(unet.up_blocks) - 2):
            unet.up_blocks[index] = nn.Identity()
        upsamplers = unet.up_blocks[-2].upsamplers
        unet.up_blocks[-2] = nn.Module()
        unet.up_blocks[-2].upsamplers = upsamplers
    return unet


class UnetPart:
    """A part of a UNet. Which methods it has sense for depends on the part."""

    def __init__(self, unet: Any, part: str, sizes: ConditioningSizes) -> None:
        self.unet = unet  # diffusers' modules are not typed
        self.part = part
        self.sizes = sizes
        self.on_block: Callable[[], None] = lambda: None  # called before each block
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            if block is not None:
                block.register_forward_pre_hook(lambda *_: self.on_block())

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.unet.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.unet.parameters()).dtype
        return dtype

    @torch.inference_mode()
    def run_whole(self, sample: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Part unet: latents (n, 4, h, w) and times (n,) to noise of the same shape."""
        noise: Tensor = self.unet(
            sample,
            times,
            encoder_hidden_states=conditioning.prompt_embeds,
            added_cond_kwargs=conditioning.arguments(),
            return_dict=False,
        )[0]
        return noise

    @torch.inference_mode()
    def run_inner(self, boundary: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        """Parts inner and unet: from (n, C0, h/2, w/2) to (n, C1, h/2, w/2)."""
        unet = self.unet
        embedding = self._embed(boundary, times, conditioning)
        prompt = conditioning.prompt_embeds
        sample: Tensor = boundary
        skips: tuple[Tensor, ...] = (boundary,)
        for block in unet.down_blocks[1:]:
            if getattr(block, "has_cross_attention", False):
                sample, more = block(
                    hidden_states=sample, temb=embedding, encoder_hidden_states=prompt
                )
            else:
                sample, more = block(hidden_states=sample, temb=embedding)
            skips += more
        sample = self._run_middle(sample, embedding, prompt)
        odd = any(size % 2 ** (len(unet.up_blocks) - 2) for size in boundary.shape[-2:])
        for index, block in enumerate(unet.up_blocks[:-1]):
            is_last = index == len(unet.up_blocks) - 2
            count = len(block.resnets)
            own, skips = skips[-count:], skips[:-count]
            size = skips[-1].shape[2:] if odd and not is_last else None
            upsamplers = block.upsamplers
            if is_last:
                block.upsamplers = None
            arguments: dict[str, Any] = {
                "hidden_states": sample, "temb": embedding, "res_hidden_states_tuple": own,
                "upsample_size": size,
            }  # fmt: skip
            if getattr(block, "has_cross_attention", False):
                arguments["encoder_hidden_states"] = prompt
            sample = block(**arguments)
            block.upsamplers = upsamplers
        return sample

    def _run_middle(self, sample: Tensor, embedding: Tensor, prompt: Tensor) -> Tensor:
        block = self.unet.mid_block
        if block is None:
            return sample
        crosses = getattr(block, "has_cross_attention", False)
        more = {"encoder_hidden_states": prompt} if crosses else {}
        result: Tensor = block(sample, embedding, **more)
        return result

    @torch.inference_mode()
    def run_before(
        self, sample: Tensor, times: Tensor, conditioning: Conditioning
    ) -> tuple[Tensor, OuterState]:
        """Part outer: latents (n, 4, h, w) to the boundary (n, C0, h/2, w/2) and what stays."""
        unet = self.unet
        embedding = self._embed(sample, times, conditioning)
        first = unet.conv_in(sample)
        boundary, skips = unet.down_blocks[0](hidden_states=first, temb=embedding)
        return boundary, OuterState(embedding, (first, *skips[:-1]))

    @torch.inference_mode()
    def run_after(self, deep: Tensor, state: OuterState) -> Tensor:
        """Part outer: what comes back (n, C1, h/2, w/2) to noise (n, 4, h, w)."""
        unet = self.unet
        size = state.skips[-1].shape[2:]
        doubled = tuple(2 * side for side in deep.shape[-2:])
        sample = deep
        for upsampler in unet.up_blocks[-2].upsamplers:
            sample = upsampler(sample, None if tuple(size) == doubled else size)
        sample = unet.up_blocks[-1](
            hidden_states=sample, temb=state.embedding, res_hidden_states_tuple=state.skips
        )
        if unet.conv_norm_out is not None:
            sample = unet.conv_act(unet.conv_norm_out(sample))
        noise: Tensor = unet.conv_out(sample)
        return noise

    def _embed(self, sample: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        unet = self.unet
        projected = unet.get_time_embed(sample=sample, timestep=times.to(sample.device))
        embedding: Tensor = unet.time_embedding(projected, None)
        added: Tensor = unet.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=conditioning.prompt_embeds,
            added_cond_kwargs=conditioning.arguments(),
        )
        return embedding + added


@dataclass(frozen=True, slots=True)
class OuterState:
    """What the edge keeps between the two halves of a step."""

    embedding: Tensor
    skips: tuple[Tensor, ...]
