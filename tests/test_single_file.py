"""SDXL in one file makes the pictures that diffusers makes of that file, on edge and workers."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from forks import run_midspan
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import EXACT, PROMPT, WAYS, difference, reference
from test_unet import NARROW
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from common.diffusion.ldm_names import LdmNames
from common.diffusion.unet import open_unet
from common.errors import CheckpointError
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker

SHAPE = NARROW | {
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 1],
    "projection_class_embeddings_input_dim": 96 + 40,
}
VAE_NAMES = [
    (r"encoder\.down_blocks\.(\d)\.resnets\.", r"encoder.down.\1.block."),
    (r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.", r"encoder.down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."), (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."), (r"attn_1\.to_out\.0\.", "attn_1.proj_out."),
    ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
]  # fmt: skip
OPEN_CLIP_NAMES = [
    (r"^text_model\.embeddings\.token_embedding\.weight", "token_embedding.weight"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."), ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"), (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"), (r"^text_projection\.weight", "text_projection"),
]  # fmt: skip


def rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def name_vae(tensors: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """As the first publication has a VAE: up blocks backwards, attention as convolutions."""
    named = {}
    for name, tensor in tensors.items():
        other = re.sub(
            r"decoder\.up_blocks\.(\d)\.(resnets|upsamplers\.0)\.",
            lambda match: (
                f"decoder.up.{levels - 1 - int(match[1])}."
                f"{'block' if match[2] == 'resnets' else 'upsample'}."
            ),
            name,
        )
        other = rename(other, VAE_NAMES)
        is_linear = "attn_1" in other and tensor.ndim == 2
        named[f"first_stage_model.{other}"] = tensor[..., None, None] if is_linear else tensor
    return named


def name_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As OpenCLIP has a text encoder: queries, keys and values in one, the projection turned."""
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(
            r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(\w+)", name
        ):
            three = [
                tensors[name.replace("q_proj", which)] for which in ("q_proj", "k_proj", "v_proj")
            ]
            named[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(three)
        elif not re.search(r"self_attn\.[kv]_proj", name):
            turned = tensor.T if name.startswith("text_projection") else tensor
            named[rename(name, OPEN_CLIP_NAMES)] = turned
    return {f"conditioner.embedders.1.model.{name}": tensor for name, tensor in named.items()}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow SDXL in diffusers format, its text encoders of different widths."""
    made = tmp_path_factory.mktemp("narrow")
    torch.manual_seed(4)
    tokenizer = CLIPTokenizer.from_pretrained(find_model(DEMO_IMAGE_MODEL) / "tokenizer")

    def text(width: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=width, max_position_embeddings=32, vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip

    StableDiffusionXLPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 16, 16), norm_num_groups=8, scaling_factor=0.13025,
            force_upcast=False,
        ),
        text_encoder=CLIPTextModel(text(24)),
        text_encoder_2=CLIPTextModelWithProjection(text(40)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**SHAPE),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        add_watermarker=False,
    ).save_pretrained(made)  # fmt: skip
    return made


@pytest.fixture(scope="module")
def weights(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights in one file, with the names of the first publication."""
    unet, vae = (
        load_file(directory / part / "diffusion_pytorch_model.safetensors")
        for part in ("unet", "vae")
    )
    clip, open_clip = (
        load_file(directory / part / "model.safetensors")
        for part in ("text_encoder", "text_encoder_2")
    )
    ldm = LdmNames(UNet2DConditionModel.load_config(directory / "unet"))
    tensors = {f"model.diffusion_model.{ldm.find(name)}": t for name, t in unet.items()}
    tensors |= name_vae(vae, levels=4) | name_open_clip(open_clip)
    for name, tensor in clip.items():
        inner = name.removeprefix("text_model.")
        tensors[f"conditioner.embedders.0.transformer.text_model.{inner}"] = tensor
    path = tmp_path_factory.mktemp("single") / "fine-tune.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def bare(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory without its weights."""
    made = tmp_path_factory.mktemp("bare") / "sdxl"
    shutil.copytree(directory, made, ignore=shutil.ignore_patterns("*.safetensors"))
    return made


@pytest.fixture(scope="module")
def whole(bare: Path, weights: Path) -> StableDiffusionXLPipeline:
    """What diffusers reads out of the file: the reference."""
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(weights), config=str(bare), local_files_only=True, torch_dtype=torch.float32,
        add_watermarker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pool(bare: Path, weights: Path) -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, image_model=str(bare), image_weights=weights)
    with LocalPool(settings) as running:
        yield running


def test_pictures_are_those_that_diffusers_makes_of_the_file(
    pool: LocalPool, bare: Path, weights: Path, whole: StableDiffusionXLPipeline
) -> None:
    client = pool.connect()
    for way in WAYS.values():
        settings = dataclasses.replace(EXACT, steps=2, height=64, width=64, **way)
        maker = ImageMaker(bare, client, settings.cut, weights=weights)
        assert difference(maker.make(settings), reference(whole, bare, settings)) == 0
    client.close()


def test_a_file_and_the_directory_of_the_same_weights_meet(
    directory: Path, bare: Path, weights: Path
) -> None:
    one = open_unet(bare, weights=weights)
    assert one.fingerprint() == open_unet(directory).fingerprint()
    assert one.name == "fine-tune"


def test_the_command_takes_a_file_and_asks_for_the_rest(
    pool: LocalPool, bare: Path, weights: Path, whole: StableDiffusionXLPipeline, tmp_path: Path
) -> None:
    run_midspan(
        "image", PROMPT, "-o", str(tmp_path / "out.png"), "--steps", "2", "--seed", "0",
        "--codec", "fp32", "--image-model", str(bare), "--image-weights", str(weights), "--size",
        "64", "--threads", "1", "--broker", pool.edge_endpoint,
    )  # fmt: skip
    settings = dataclasses.replace(EXACT, steps=2, height=64, width=64)
    picture = Image.open(tmp_path / "out.png")
    assert difference([picture], reference(whole, bare, settings)) == 0
    for options, words in (
        (["--image-weights", str(weights)], "give --image-model"),
        (["--image-model", str(weights)], "is one file: give it as --image-weights"),
        (
            ["--image-model", str(bare), "--image-weights", "none"],
            "--image-weights none cannot be read: there is no such file",
        ),
    ):
        done = CliRunner().invoke(midspan, ["worker", *options])
        assert done.exit_code == 1
        assert words in done.output


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def add(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: torch.ones(2)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("model.diffusion_model.input_blocks.0.0.weight"),
         r"the file lacks model\.diffusion_model\.input_blocks\.0\.0\.weight"),
        (add("model.diffusion_model.input_blocks.99.0.weight"), "also has model.diffusion_model"),
        (drop("first_stage_model.decoder.conv_in.bias"),
         r"lacks decoder\.conv_in\.bias of the AutoencoderKL that its configuration describes"),
        (drop("conditioner.embedders.1.model.ln_final.bias"),
         r"lacks text_model\.final_layer_norm\.bias of the CLIPTextModelWithProjection"),
    ],
    ids=["UNet", "more of a UNet", "VAE", "text encoder"],
)  # fmt: skip
def test_what_a_file_lacks_is_named(
    pool: LocalPool,
    bare: Path,
    weights: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], None],
    words: str,
) -> None:
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, tmp_path / "other.safetensors")
    client = pool.connect()
    with pytest.raises(CheckpointError, match=words):
        ImageMaker(bare, client, weights=tmp_path / "other.safetensors")
    client.close()
