"""An SDXL UNet cut in parts computes what diffusers' own does, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from cloud_worker.serving import pick_image_parts
from common.diffusion.shapes import INNER, OUTER, WHOLE, boundary_channels, find_sizes, read_index
from common.diffusion.unet import Conditioning, build_unet, load_unet, open_unet
from common.errors import CheckpointError
from common.weights.checkpoint import Checkpoint
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model

SDXL_BASE = Path(__file__).parents[2] / "shared" / "data" / "sdxl-base-config" / "unet"
# SDXL base's own blocks and depths, about a tenth as wide
NARROW: dict[str, Any] = {
    "sample_size": 32,
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [1, 2, 3],
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 96 + 32,
    "use_linear_projection": True,
}


# other members of the family: a refiner's four levels and five numbers, a distilled one's two
# levels, one without a middle
FOUR_LEVELS = NARROW | {
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "transformer_layers_per_block": 1,
    "attention_head_dim": [1, 2, 2, 2],
    "projection_class_embeddings_input_dim": 80 + 32,
}
TWO_LEVELS = NARROW | {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [1, 2],
}
NO_MIDDLE = NARROW | {"mid_block_type": None, "transformer_layers_per_block": 1}
CROSSED = TWO_LEVELS | {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
SHAPES = {
    "narrow SDXL base": NARROW, "refiner": FOUR_LEVELS, "two levels": TWO_LEVELS,
    "no middle": NO_MIDDLE,
}  # fmt: skip


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


@pytest.fixture(scope="module", params=["demo", *SHAPES])
def unet_directory(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "demo":
        return directory
    made = tmp_path_factory.mktemp("random")
    return save_unet(SHAPES[request.param], made, is_scored=request.param == "refiner")


def save_unet(shape: dict[str, Any], made: Path, is_scored: bool = False) -> Path:
    """A pipeline's directory of which only the UNet is there, of random weights."""
    torch.manual_seed(0)
    UNet2DConditionModel(**shape).save_pretrained(made / "unet")
    index = {"_class_name": "StableDiffusionXLPipeline"}
    if is_scored:
        index = {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
        index["requires_aesthetics_score"] = True
    (made / "model_index.json").write_text(json.dumps(index))
    return made


def make_inputs(directory: Path, side: tuple[int, int]) -> tuple[torch.Tensor, Conditioning]:
    sizes = find_sizes(open_unet(directory).config_json, read_index(directory))
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 4, *side, generator=generator), Conditioning(
        torch.randn(2, 7, sizes.prompt, generator=generator),
        torch.randn(2, sizes.pooled, generator=generator),
        torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0][: sizes.time_ids]] * 2),
    )


@pytest.mark.parametrize("side", [(16, 16), (20, 12), (15, 17), (10, 14)])
@pytest.mark.parametrize("time", [999.0, 0.0])
def test_whole_and_cut_equal_diffusers(
    unet_directory: Path, side: tuple[int, int], time: float
) -> None:
    reference = UNet2DConditionModel.from_pretrained(
        unet_directory / "unet", torch_dtype=torch.float32
    ).eval()
    checkpoint = open_unet(unet_directory)
    sample, conditioning = make_inputs(unet_directory, side)
    with torch.inference_mode():
        want = reference(
            sample, torch.tensor(time), encoder_hidden_states=conditioning.prompt_embeds,
            added_cond_kwargs=conditioning.arguments(), return_dict=False,
        )[0]  # fmt: skip
    whole, inner, outer = (
        load_unet(checkpoint, part, torch.float32) for part in (WHOLE, INNER, OUTER)
    )
    times = torch.full((2,), time)
    assert torch.equal(whole.run_whole(sample, times, conditioning), want)
    boundary, state = outer.run_before(sample, torch.tensor(time), conditioning)
    channels = boundary_channels(checkpoint.config_json)
    halved = tuple(-(-s // 2) for s in side)
    assert boundary.shape == (2, channels[0], *halved)
    deep = inner.run_inner(boundary, times, conditioning)
    assert deep.shape == (2, channels[1], *halved)
    assert torch.equal(whole.run_inner(boundary, times, conditioning), deep)
    assert torch.equal(outer.run_after(deep, state), want)


def test_a_part_reads_only_its_own_tensors(directory: Path) -> None:
    checkpoint = open_unet(directory)
    inner, outer = (load_unet(checkpoint, part, torch.float16) for part in (INNER, OUTER))
    names = [set(part.unet.state_dict()) for part in (inner, outer)]
    both = names[0] & names[1]
    assert all(name.startswith(("time_embedding.", "add_embedding.")) for name in both)
    assert names[0] | names[1] == set(checkpoint.tensor_names)
    assert not any(
        name.startswith(("conv_", "down_blocks.0.", "up_blocks.2.")) for name in names[0]
    )
    assert inner.dtype == torch.float16


@pytest.mark.skipif(not SDXL_BASE.exists(), reason="the real configuration is not here")
def test_what_crosses_in_the_real_sdxl_base() -> None:
    config = json.loads((SDXL_BASE / "config.json").read_text())
    assert boundary_channels(config) == (320, 640)
    parts = {part: build_unet(config, part) for part in (WHOLE, INNER, OUTER)}
    sizes = {
        part: sum(parameter.numel() for parameter in unet.parameters()) / 1e6
        for part, unet in parts.items()
    }
    assert round(sizes[WHOLE]) == 2567
    assert round(sizes[INNER]) == 2547
    assert round(sizes[OUTER]) == 28
    first = parts[OUTER].down_blocks[0]
    assert first.downsamplers[0].conv.out_channels == 320
    assert parts[OUTER].up_blocks[-2].upsamplers[0].conv.in_channels == 640


def test_what_is_no_sdxl_is_named(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no model_index\.json"):
        open_unet(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(CheckpointError, match="holds a StableDiffusionPipeline; expected"):
        open_unet(tmp_path)
    config = open_unet(directory).config_json
    for changes, words in (
        ({"addition_embed_type": None}, "with added conditions None; expected"),
        ({"time_cond_proj_dim": 256}, "has time_cond_proj_dim 256; SDXL's has none"),
        ({"in_channels": 9}, "takes 9 channels and gives 4; expected as many"),
    ):
        with pytest.raises(CheckpointError, match=words):
            build_unet({**config, **changes}, WHOLE)


def test_a_unet_whose_outer_blocks_see_the_prompt_is_computed_whole_and_not_cut(
    tmp_path: Path,
) -> None:
    made = save_unet(CROSSED, tmp_path)
    sample, conditioning = make_inputs(made, (16, 16))
    reference = UNet2DConditionModel.from_pretrained(made / "unet").eval()
    time = torch.tensor(999.0)
    with torch.inference_mode():
        want = reference(
            sample, time, encoder_hidden_states=conditioning.prompt_embeds,
            added_cond_kwargs=conditioning.arguments(), return_dict=False,
        )[0]  # fmt: skip
    checkpoint = open_unet(made)
    whole = load_unet(checkpoint, WHOLE, torch.float32)
    assert torch.equal(whole.run_whole(sample, time.repeat(2), conditioning), want)
    with pytest.raises(CheckpointError, match=r"CrossAttnUpBlock2D.*cannot be cut; --image-part"):
        load_unet(checkpoint, INNER, torch.float32)
    assert pick_image_parts(checkpoint.config_json, [WHOLE, INNER]) == [WHOLE]
    assert pick_image_parts(checkpoint.config_json, [INNER]) == [INNER]


def test_a_language_model_is_no_image_model(demo_directory: Path) -> None:
    with pytest.raises(CheckpointError, match="names no _class_name"):
        Checkpoint(demo_directory, config_key="_class_name")
