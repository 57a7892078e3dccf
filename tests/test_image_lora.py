"""A LoRA for SDXL makes the pictures of the model that it is merged into, on edge and worker."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import StableDiffusionXLPipeline
from diffusers.configuration_utils import FrozenDict
from forks import run_midspan
from PIL import Image
from safetensors.torch import save_file
from test_images import EXACT, PROMPT, WAYS, difference, load_whole
from test_images import reference as draw
from torch import Tensor, nn

from common.adapters.choice import LoraChoice, parse_choice
from common.diffusion.ldm_names import LdmNames
from common.diffusion.lora import ImageLora
from common.diffusion.unet import open_unet
from common.errors import CheckpointError, NoWorker, SettingsError
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker

RANK, ALPHA, SCALE = 2, 3.0, 0.75
ENCODER = "encoder.layers.0.self_attn.q_proj"  # of the text encoders
SETTINGS = dataclasses.replace(EXACT, steps=3)
Factors = dict[str, tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


@pytest.fixture(scope="module")
def whole(directory: Path) -> StableDiffusionXLPipeline:
    return load_whole(directory)


@pytest.fixture(scope="module")
def factors(whole: StableDiffusionXLPipeline) -> Factors:
    """Random factors for every linear layer and convolution of the UNet, by diffusers' names."""
    generator = torch.Generator().manual_seed(1)
    made = {}
    for name, module in whole.unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            made[name] = random_factors(module.weight, generator)
    return made


def random_factors(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tail = (1,) * (weight.ndim - 2)
    return (
        torch.randn(RANK, *weight.shape[1:], generator=generator) * 0.05,
        torch.randn(len(weight), RANK, *tail, generator=generator) * 0.05,
    )


def merge(module: nn.Module, factors: Factors, scale: float) -> None:
    """W + scale B A, by hand."""
    for name, (down, up) in factors.items():
        weight = module.get_submodule(name).weight
        product = torch.einsum("or,r...->o...", up.flatten(1), down)
        weight.data = weight.data + scale * product.view(weight.shape)


@pytest.fixture(scope="module")
def changed(directory: Path, factors: Factors) -> StableDiffusionXLPipeline:
    """diffusers' own pipeline, with the LoRA merged into UNet and first text encoder."""
    pipeline = load_whole(directory)
    merge(pipeline.unet, factors, SCALE * ALPHA / RANK)
    encoder = dict(pipeline.text_encoder.named_modules())
    (name,) = [name for name in encoder if name.endswith(ENCODER)]
    merge(pipeline.text_encoder, {name: encoder_factors(encoder[name])}, SCALE * ALPHA / RANK)
    return pipeline


def encoder_factors(module: Any) -> tuple[Tensor, Tensor]:
    return random_factors(module.weight, torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def kohya(
    factors: Factors, whole: StableDiffusionXLPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """As kohya's trainer writes it: the first publication's names, with underscores."""
    names = LdmNames(dict(whole.unet.config))
    tensors = {}
    for name, pair in factors.items():
        tensors |= kohya_tensors(f"lora_unet_{(names.find(name) or '').replace('.', '_')}", pair)
    encoder = next(
        module for name, module in whole.text_encoder.named_modules() if name.endswith(ENCODER)
    )
    called = f"lora_te1_text_model_{ENCODER.replace('.', '_')}"
    tensors |= kohya_tensors(called, encoder_factors(encoder))
    path = tmp_path_factory.mktemp("lora") / "kohya.safetensors"
    save_file(tensors, path)
    return path


def kohya_tensors(name: str, factors: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    down, up = factors
    return {
        f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(ALPHA),
    }  # fmt: skip


@pytest.fixture(scope="module")
def pool(directory: Path, kohya: Path) -> Iterator[LocalPool]:
    settings = PoolSettings(workers=1, image_model=str(directory), image_loras=[f"{kohya}@{SCALE}"])
    with LocalPool(settings) as running:
        yield running


def test_pictures_are_those_of_the_model_that_the_lora_is_merged_into(
    pool: LocalPool,
    kohya: Path,
    directory: Path,
    whole: StableDiffusionXLPipeline,
    changed: StableDiffusionXLPipeline,
) -> None:
    client = pool.connect()
    for way in WAYS.values():
        settings = dataclasses.replace(SETTINGS, **way)
        choice = LoraChoice(kohya, SCALE)
        maker = ImageMaker(directory, client, settings.cut, loras=[choice])
        made = maker.make(settings)
        # B A is added in another order than by hand: last bits of the weights differ
        assert difference(made, draw(changed, directory, settings)) <= 1
        assert difference(made, draw(whole, directory, settings)) > 20
    client.close()


def test_a_worker_with_the_lora_serves_nobody_without_it_or_with_less_of_it(
    pool: LocalPool, kohya: Path, directory: Path
) -> None:
    client = pool.connect(timeout_s=5)
    for loras in ([], [LoraChoice(kohya, 0.5)]):
        with pytest.raises(NoWorker, match="no worker serves unet of the model"):
            ImageMaker(directory, client, loras=loras).make(SETTINGS)
    client.close()


def test_a_check_sends_steps_to_a_service_with_a_lora(pool: LocalPool, directory: Path) -> None:
    done = run_midspan(
        "status", "--check", "--json", "--broker", pool.edge_endpoint,
        "--image-model", str(directory),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout)["checks"]
    assert {c["service"]: (c["worker_id"], c["failure"], c["skipped"]) for c in checks} == {
        f"{directory.name} {part}": ("w1", "", "") for part in ("unet", "inner")
    }


def test_the_command_takes_a_lora(
    pool: LocalPool,
    kohya: Path,
    directory: Path,
    changed: StableDiffusionXLPipeline,
    tmp_path: Path,
) -> None:
    run_midspan(
        "image", PROMPT, "-o", str(tmp_path / "out.png"), "--steps", "3", "--seed", "0",
        "--codec", "fp32", "--image-lora", f"{kohya}@{SCALE}", "--threads", "1",
        "--broker", pool.edge_endpoint,
    )  # fmt: skip
    picture = Image.open(tmp_path / "out.png")
    assert difference([picture], draw(changed, directory, SETTINGS)) <= 1
    said = json.loads(picture.text["midspan"])  # type: ignore[attr-defined]
    assert said["loras"] == [f"{kohya.name}@{SCALE}"]
    done = CliRunner().invoke(midspan, ["image", "x", "--image-lora", "none.safetensors@1"])
    assert done.exit_code == 1
    assert "the LoRA 'none.safetensors' does not exist; expected PATH or PATH@SCALE" in done.output


def test_diffusers_finds_the_same_modules_behind_kohyas_names(
    whole: StableDiffusionXLPipeline, factors: Factors
) -> None:
    """Its converter, where that knows a module; each tensor is found by its values."""
    names = LdmNames(dict(whole.unet.config))
    attended = {n: f for n, f in factors.items() if ".attentions." in n or ".resnets." in n}
    tensors = {}
    for name, pair in attended.items():
        tensors |= kohya_tensors(f"lora_unet_{(names.find(name) or '').replace('.', '_')}", pair)
    converted, _ = StableDiffusionXLPipeline.lora_state_dict(
        tensors, unet_config=FrozenDict(whole.unet.config)
    )
    by_value = {id(tensor): key for key, tensor in converted.items()}
    for name, (down, _) in attended.items():
        key = by_value[id(down)].removeprefix("unet.").replace("_lora.", ".lora.")
        found = key.split(".lora.")[0].replace(".processor.", ".")
        assert name in (found, f"{found}.0")


def names_of(spelling: str, name: str) -> tuple[str, str]:
    older = name.removesuffix(".0").rpartition(".")
    return {
        "diffusers": (f"unet.{name}.lora_A.weight", f"unet.{name}.lora_B.weight"),
        "older": (f"unet.{name}.lora.down.weight", f"unet.{name}.lora.up.weight"),
        "processors": (
            f"unet.{older[0]}.processor.{older[2]}_lora.down.weight",
            f"unet.{older[0]}.processor.{older[2]}_lora.up.weight",
        ),
        "peft": (
            f"base_model.model.{name}.lora_A.weight",
            f"base_model.model.{name}.lora_B.weight",
        ),
        "flat": (
            f"lora_unet_{name.replace('.', '_')}.lora_down.weight",
            f"lora_unet_{name.replace('.', '_')}.lora_up.weight",
        ),
    }[spelling]


@pytest.mark.parametrize("spelling", ["diffusers", "older", "processors", "peft", "flat"])
def test_every_spelling_is_the_same_lora(
    factors: Factors, directory: Path, tmp_path: Path, spelling: str
) -> None:
    attentions = {n: f for n, f in factors.items() if "attn1." in n or "attn2." in n}
    assert any(name.endswith("to_out.0") for name in attentions)
    checkpoint = open_unet(directory)
    digests = []
    for written in ("diffusers", spelling):
        tensors = {}
        for name, pair in attentions.items():
            tensors |= dict(zip(names_of(written, name), pair, strict=True))
        save_file(tensors, tmp_path / f"{written}.safetensors")
        lora = ImageLora(LoraChoice(tmp_path / f"{written}.safetensors"))
        digests.append(lora.for_unet(checkpoint.tensor_names, checkpoint.config_json).digest())
    assert digests[0] == digests[1]


def test_a_folder_says_its_alpha_in_the_header_or_beside(
    factors: Factors, directory: Path, tmp_path: Path
) -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = dict(zip(names_of("diffusers", name), factors[name], strict=True))
    header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})}
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", header)
    checkpoint = open_unet(directory)
    weight = checkpoint.read_once(f"{name}.weight", torch.float32)
    lora = ImageLora(LoraChoice(tmp_path, SCALE))
    adapter = lora.for_unet(checkpoint.tensor_names, checkpoint.config_json)
    down, up = factors[name]
    wanted = weight + SCALE * ALPHA / RANK * (up @ down)
    assert torch.allclose(adapter.apply(f"{name}.weight", weight), wanted, atol=1e-6)  # last bits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"unet.none.lora_A.weight": (2, 8), "unet.none.lora_B.weight": (8, 2)},
         "changes unet.none, which the model's unet has not"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3)}, "has only one of the two factors of unet.c"),
        ({"unet.conv_in.lora_A.weight": (2, 4, 3, 3), "unet.conv_in.lora_B.weight": (64, 3, 1, 1)},
         "which do not fit"),
        ({"unet.conv_in.lora_A.weight": (2, 5, 3, 3), "unet.conv_in.lora_B.weight": (64, 2, 1, 1)},
         r"conv_in.weight of shape \[64, 5, 3, 3\]; the checkpoint has one of \[64, 4, 3, 3\]"),
        ({"lora_unet_conv_in.hada_w1_a": (4, 4)}, "hada_w1_a, which nothing here understands"),
        ({"unet.conv_in.dora_scale": (4,)}, "is a DoRA"),
        ({"unet.conv_in.weight": (4,)}, "unet.conv_in.weight, which nothing here understands"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_lora_has_that_is_not_understood_is_named(
    directory: Path, tmp_path: Path, changes: dict[str, tuple[int, ...]], words: str
) -> None:
    save_file(
        {name: torch.ones(shape) for name, shape in changes.items()}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CheckpointError, match=words):
        open_unet(directory, [ImageLora(LoraChoice(tmp_path / "a.safetensors"))])


def test_a_choice_is_a_path_and_perhaps_a_scale(tmp_path: Path) -> None:
    odd = tmp_path / "a@2"
    odd.write_text("")
    assert parse_choice(str(odd)) == LoraChoice(odd)
    assert parse_choice(f"{odd}@-0.5") == LoraChoice(odd, -0.5)
    for text, words in ((f"{odd}@nan", "has scale nan"), (f"{odd}@x", "does not exist")):
        with pytest.raises(SettingsError, match=words):
            parse_choice(text)
