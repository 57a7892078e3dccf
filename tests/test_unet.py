"""An SDXL UNet cut in parts computes what diffusers' own does, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from common.diffusion.unet import (
    INNER,
    OUTER,
    WHOLE,
    Conditioning,
    boundary_channels,
    build_unet,
    load_unet,
    open_unet,
)
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


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


@pytest.fixture(scope="module", params=["demo", "narrow SDXL base"])
def unet_directory(
    request: pytest.FixtureRequest, directory: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    if request.param == "demo":
        return directory
    made = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(0)
    UNet2DConditionModel(**NARROW).save_pretrained(made / "unet")
    (made / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return made


def make_inputs(config: Any, side: tuple[int, int]) -> tuple[torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return torch.randn(2, 4, *side, generator=generator), Conditioning(
        torch.randn(2, 7, config["cross_attention_dim"], generator=generator),
        torch.randn(2, pooled, generator=generator),
        torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2),
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
    sample, conditioning = make_inputs(checkpoint.config_json, side)
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
    with pytest.raises(CheckpointError, match="only SDXL's shape can be cut"):
        build_unet({**config, "addition_embed_type": None}, INNER)


def test_a_language_model_is_no_image_model(demo_directory: Path) -> None:
    with pytest.raises(CheckpointError, match="names no _class_name"):
        Checkpoint(demo_directory, config_key="_class_name")
