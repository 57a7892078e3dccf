"""What the modules of SDXL's UNet are called where it was first published, and by LoRA trainers.

Names are made from the configuration's blocks, forwards: every module here has one there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from common.errors import CheckpointError

# within a resnet
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class LdmNames:
    """From diffusers' name of a UNet's module to the other one."""

    def __init__(self, config: dict[str, Any]) -> None:
        if not isinstance(config.get("layers_per_block"), int):
            raise CheckpointError(
                f"the UNet has layers_per_block {config.get('layers_per_block')!r}; expected one "
                "number for all blocks"
            )
        self._prefixes = OUTSIDE | dict(_list_blocks(config))

    def find(self, name: str) -> str | None:
        """Of a module or tensor; None if it has none."""
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            prefix = self._prefixes.get(".".join(parts[:length]))
            if prefix is not None:
                return ".".join([prefix, *_within(parts, length)])
        return None


def _within(parts: list[str], length: int) -> list[str]:
    rest = parts[length:]
    if "resnets" in parts[:length] and rest and rest[0] in RESNET:
        return [RESNET[rest[0]], *rest[1:]]
    return rest


def _list_blocks(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    layers, down, up = (
        config["layers_per_block"], config["down_block_types"], config["up_block_types"],
    )  # fmt: skip
    for index in range(len(down)):
        first = 1 + index * (layers + 1)
        for layer in range(layers):
            yield f"down_blocks.{index}.resnets.{layer}", f"input_blocks.{first + layer}.0"
            yield f"down_blocks.{index}.attentions.{layer}", f"input_blocks.{first + layer}.1"
        sampler = f"down_blocks.{index}.downsamplers.0.conv"
        yield sampler, f"input_blocks.{first + layers}.0.op"
    for place, name in enumerate(("resnets.0", "attentions.0", "resnets.1")):
        yield f"mid_block.{name}", f"middle_block.{place}"
    for index, kind in enumerate(up):
        first = index * (layers + 1)
        for layer in range(layers + 1):
            yield f"up_blocks.{index}.resnets.{layer}", f"output_blocks.{first + layer}.0"
            yield f"up_blocks.{index}.attentions.{layer}", f"output_blocks.{first + layer}.1"
        place = 2 if "CrossAttn" in kind else 1
        sampler = f"up_blocks.{index}.upsamplers.0.conv"
        yield sampler, f"output_blocks.{first + layers}.{place}.conv"
