"""What an image model must be: which pipelines and UNets there is a place for, and their sizes.

Any UNet with SDXL's added conditions can be computed as a whole. To be cut, its outermost blocks
must be without cross-attention, as SDXL's are, for then one tensor crosses; how many blocks there
are does not matter, from two on. A refiner's UNet differs in what it is told: five numbers about
the picture instead of six, with a score of how it pleases instead of the size it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import CheckpointError
from common.weights.model_files import read_json

WHOLE, INNER, OUTER = "unet", "inner", "outer"
FROM_TEXT, FROM_PICTURE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"
SCORED = "requires_aesthetics_score"  # of a refiner, in model_index.json
DOWN_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D"}
UP_BLOCKS = {"UpBlock2D", "CrossAttnUpBlock2D"}
# inputs that a UNet has if this is set, and that nobody here gives it
OTHER_INPUTS = (
    "class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type",
    "time_cond_proj_dim",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ConditioningSizes:
    """Widths of what a UNet is told besides the sample and the time."""

    prompt: int  # of a token's embedding
    pooled: int  # of the embedding of the prompt as a whole
    time_ids: int  # numbers about the picture


def read_index(directory: Path) -> dict[str, Any]:
    """model_index.json of an SDXL pipeline's directory. Raises CheckpointError if it is none."""
    if directory.is_file():
        raise CheckpointError(
            f"{directory} is one file: give it as --image-weights, and as --image-model a "
            "directory in diffusers format with configurations and tokenizers; weights need not be "
            "in it"
        )
    path = directory / "model_index.json"
    if not path.exists():
        raise CheckpointError(
            f"{directory} has no model_index.json; expected a directory in diffusers format"
        )
    index: dict[str, Any] = read_json(path)
    if index.get("_class_name") not in (FROM_TEXT, FROM_PICTURE):
        raise CheckpointError(
            f"{directory} holds a {index.get('_class_name')}; expected a {FROM_TEXT}, or a "
            f"{FROM_PICTURE} (a refiner)"
        )
    return index


def find_sizes(config: dict[str, Any], index: dict[str, Any]) -> ConditioningSizes:
    """Of a UNet's configuration and its pipeline's index. Raises CheckpointError."""
    check_unet(config)
    time_ids = 5 if index.get(SCORED) else 6
    pooled = config["projection_class_embeddings_input_dim"]
    pooled -= time_ids * config["addition_time_embed_dim"]
    if pooled < 1:
        raise CheckpointError(
            f"the UNet's added conditions are {pooled} wide beside {time_ids} numbers; its "
            f"config.json and model_index.json ({SCORED}) do not fit"
        )
    return ConditioningSizes(config["cross_attention_dim"], pooled, time_ids)


def check_part(config: dict[str, Any], part: str) -> None:
    """Raises CheckpointError, with the reason, unless a UNet has this part."""
    check_unet(config)
    reason = why_uncut(config)
    if part != WHOLE and reason:
        raise CheckpointError(f"{reason}: it cannot be cut; --image-part {WHOLE} computes all")


def check_unet(config: dict[str, Any]) -> None:
    """Raises CheckpointError unless a UNet is told what SDXL's is, and nothing else."""
    kind, added = config.get("_class_name"), config.get("addition_embed_type")
    if kind != "UNet2DConditionModel" or added != "text_time":
        raise CheckpointError(
            f"the UNet is a {kind} with added conditions {added!r}; expected a "
            "UNet2DConditionModel with 'text_time', as SDXL's is"
        )
    others = [name for name in OTHER_INPUTS if config.get(name) is not None]
    if others:
        raise CheckpointError(f"the UNet has {others[0]} {config[others[0]]!r}; SDXL's has none")
    if not isinstance(config.get("cross_attention_dim"), int):
        raise CheckpointError(
            f"the UNet has cross_attention_dim {config.get('cross_attention_dim')!r}; expected a "
            "number"
        )
    channels = config.get("in_channels"), config.get("out_channels")
    if channels[0] != channels[1]:
        raise CheckpointError(
            f"the UNet takes {channels[0]} channels and gives {channels[1]}; expected as many, for "
            "inpainting is not done"
        )


def why_uncut(config: dict[str, Any]) -> str:
    """Why a UNet has no inner part; empty if it has."""
    down, up = config.get("down_block_types", []), config.get("up_block_types", [])
    are_known = set(down) <= DOWN_BLOCKS and set(up) <= UP_BLOCKS
    if not are_known or not len(down) == len(up) >= 2 or _are_crossed(down, up):
        return f"the UNet has blocks {list(down)}, {list(up)}"
    for name in ("center_input_sample", "time_embedding_act_fn"):
        if config.get(name):
            return f"the UNet has {name} {config[name]!r}"
    return ""


def _are_crossed(down: Sequence[str], up: Sequence[str]) -> bool:
    """Whether the outermost blocks see the prompt."""
    return down[0] != "DownBlock2D" or up[-1] != "UpBlock2D"


def boundary_channels(config: dict[str, Any]) -> tuple[int, int]:
    """C0 and C1: channels that cross the inner cut on the way up and down."""
    widths = config["block_out_channels"]
    return widths[0], widths[1]
