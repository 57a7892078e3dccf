"""Pictures that begin with a picture, and refiners, are those of diffusers' own pipeline."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from forks import error_line, run_midspan
from PIL import Image
from test_images import EXACT, PROMPT, WAYS, Makers, difference
from test_unet import FOUR_LEVELS
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from common.diffusion.schedulers import make_scheduler, read_scheduler_config
from common.errors import SettingsError
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.cli import midspan
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.init_picture import MAX_PIXELS, fit_picture, read_picture
from edge_agent.image.maker import ImageSettings, Progress

BEGUN = dataclasses.replace(EXACT, steps=6, strength=0.5)
SIDE = 64


@pytest.fixture(scope="module")
def directory() -> Path:
    return find_model(DEMO_IMAGE_MODEL)


@pytest.fixture(scope="module")
def pool(directory: Path) -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=2, image_model=str(directory))) as running:
        yield running


@pytest.fixture(scope="module")
def makers(directory: Path, pool: LocalPool) -> Iterator[Makers]:
    loaded = Makers(directory, pool)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def whole(directory: Path) -> StableDiffusionXLImg2ImgPipeline:
    return load_whole(directory)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A sky over a field, with a sun."""
    drawn = Image.new("RGB", (SIDE, SIDE), (90, 140, 220))
    drawn.paste((60, 130, 50), (0, 40, SIDE, SIDE))
    drawn.paste((250, 220, 80), (44, 6, 56, 18))
    return drawn


def load_whole(directory: Path) -> StableDiffusionXLImg2ImgPipeline:
    pipeline = StableDiffusionXLImg2ImgPipeline.from_pretrained(
        directory, torch_dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    # the VAE leaves latents with their channels last in memory, where convolutions add in another
    # order; what travelled has them first
    pipeline.unet.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    return pipeline


def reference(
    whole: StableDiffusionXLImg2ImgPipeline, directory: Path, settings: ImageSettings
) -> list[Image.Image]:
    config = read_scheduler_config(directory)
    whole.scheduler = make_scheduler(config, settings.scheduler, settings.steps)
    images: list[Image.Image] = whole(
        settings.prompt,
        image=settings.init_image,
        strength=settings.strength,
        negative_prompt=settings.negative_prompt or None,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        num_images_per_prompt=settings.count,
        generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
    ).images
    return images


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"scheduler": "dpm++2m"}, {"strength": 1.0, "scheduler": "ddim"}, {"strength": 0.2},
        {"count": 2, "guidance": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_a_picture_that_begins_with_one_equals_diffusers(
    makers: Makers,
    whole: StableDiffusionXLImg2ImgPipeline,
    directory: Path,
    picture: Image.Image,
    way: str,
    changes: dict[str, Any],
) -> None:
    settings = dataclasses.replace(BEGUN, init_image=picture, **WAYS[way], **changes)
    steps: list[Progress] = []
    made = makers.make(settings, on_step=steps.append)
    assert difference(made, reference(whole, directory, settings)) == 0
    wanted = int(settings.steps * settings.strength)
    assert [(step.step, step.steps) for step in steps][-1] == (wanted, wanted)
    assert makers[settings.cut].stats.calls == wanted


@pytest.mark.parametrize("scheduler", ["heun", "euler-a", "pndm", "lcm"])
def test_a_picture_begins_with_one_whatever_the_scheduler(
    makers: Makers,
    whole: StableDiffusionXLImg2ImgPipeline,
    directory: Path,
    picture: Image.Image,
    scheduler: str,
) -> None:
    settings = dataclasses.replace(BEGUN, init_image=picture, scheduler=scheduler)
    assert difference(makers.make(settings), reference(whole, directory, settings)) == 0


def test_a_worker_that_keeps_the_latents_dies_soon_after_a_late_beginning(
    pool: LocalPool, makers: Makers, picture: Image.Image
) -> None:
    """The next one remembers fewer outputs than the number of the step suggests."""
    settings = dataclasses.replace(
        BEGUN, steps=8, init_image=picture, sync="cloud", scheduler="dpm++2m"
    )
    undisturbed = makers.make(settings)
    maker = makers["unet"]

    def kill(progress: Progress) -> None:
        if progress.step == 1:
            pool.kill_worker(maker.unet.last_worker_id)
            pool.start_worker()

    assert difference(makers.make(settings, on_step=kill), undisturbed) == 0
    assert len(maker.stats.calls_by_worker) == 2
    pool.wait_for_workers(2)


def test_reuse_counts_from_where_a_picture_begins(makers: Makers, picture: Image.Image) -> None:
    settings = dataclasses.replace(BEGUN, steps=10, init_image=picture, cut="inner", reuse=2)
    makers.make(settings)  # of steps 5 to 9 the pool computes 5, 7 and 9
    assert (makers["inner"].stats.steps, makers["inner"].stats.calls) == (5, 3)


def test_a_picture_is_made_to_fit_and_what_is_none_is_named(
    picture: Image.Image, tmp_path: Path
) -> None:
    assert fit_picture(picture, None, None) is picture
    assert fit_picture(picture.resize((67, 50)), None, None).size == (64, 48)
    assert fit_picture(picture, 96, None).size == (96, 64)
    for size in ((7, 64), (MAX_PIXELS // 8, 16)):
        with pytest.raises(SettingsError, match=f"has {size[0]} x {size[1]} pixels; expected"):
            fit_picture(Image.new("RGB", size), None, None)
    turned = picture.crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert read_picture(tmp_path / "turned.jpg", "it").size == (32, 64)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", "it").getpixel((0, 0)) == (255, 255, 255)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (1 << 13, (1 << 12) + 1)).save(tmp_path / "giant.png")
    for name in ("text.png", "none.png", "giant.png"):
        with pytest.raises(SettingsError, match="--init-image x cannot be read as a picture"):
            read_picture(tmp_path / name, "--init-image x")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 0.0}, "the strength is 0"),
        ({"strength": 1.5}, r"the strength is 1\.5; expected 0 to 1"),
        ({"strength": 0.1}, r"leaves none of 6 steps; expected 0\.17 or more"),
    ],
)
def test_a_strength_that_cannot_be_is_named(
    picture: Image.Image, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingsError, match=words):
        dataclasses.replace(BEGUN, init_image=picture, **changes).check()


def test_options_of_a_first_picture_that_mean_nothing_are_named(tmp_path: Path) -> None:
    assert "--strength is how much of --init-image" in error_line("image", "x", "--strength", "0.5")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert f"--init-image {pipe} cannot be read: it is no file" in error_line(
        "image", "x", "--init-image", str(pipe)
    )


def test_the_command_begins_with_a_picture_and_says_so_in_the_file(
    pool: LocalPool, makers: Makers, picture: Image.Image, tmp_path: Path
) -> None:
    picture.save(tmp_path / "begin.png")
    run_midspan(
        "image", PROMPT, "-o", str(tmp_path / "out.png"), "--steps", "4", "--strength", "0.5",
        "--init-image", str(tmp_path / "begin.png"), "--seed", "3", "--codec", "fp32",
        "--threads", "1", "--broker", pool.edge_endpoint,
    )  # fmt: skip
    made = Image.open(tmp_path / "out.png")
    settings = dataclasses.replace(
        EXACT, steps=4, strength=0.5, seed=3, init_image=picture, guidance=2.5
    )
    assert difference([made], makers.make(settings)) == 0
    said = json.loads(made.text["midspan"])  # type: ignore[attr-defined]
    assert said["strength"] == 0.5
    assert len(said["init_image"]) == 16
    none = CliRunner().invoke(midspan, ["image", "x", "--init-image", str(tmp_path / "none.png")])
    assert none.exit_code == 1
    assert "none.png cannot be read: there is no such file" in none.output


# --- refiners


@pytest.fixture(scope="module")
def refiner(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published refiner's shape, narrow: four levels, one text encoder, a score."""
    made = tmp_path_factory.mktemp("refiner")
    torch.manual_seed(2)
    tokenizer = CLIPTokenizer.from_pretrained(directory / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=32, max_position_embeddings=32, vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    StableDiffusionXLImg2ImgPipeline(
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8), norm_num_groups=8, scaling_factor=0.13025,
            force_upcast=False,
        ),
        text_encoder=None,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=UNet2DConditionModel(**FOUR_LEVELS),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(made)  # fmt: skip
    return made


def test_a_refiner_equals_diffusers_and_refines_only(refiner: Path, picture: Image.Image) -> None:
    whole = load_whole(refiner)
    settings = dataclasses.replace(BEGUN, init_image=picture, steps=4, guidance=5.0)
    with LocalPool(PoolSettings(workers=1, image_model=str(refiner))) as pool:
        makers = Makers(refiner, pool)
        for way in WAYS.values():
            changed = dataclasses.replace(settings, **way)
            assert difference(makers.make(changed), reference(whole, refiner, changed)) == 0
        with pytest.raises(SettingsError, match="a refiner makes a picture of another one"):
            makers["unet"].make(dataclasses.replace(settings, init_image=None))
        assert makers["unet"].find_cut_off("a red house " * 40).endswith("red house")
        makers.close()
        run_midspan(
            "status", "--check", "--image-model", str(refiner), "--broker", pool.edge_endpoint
        )
