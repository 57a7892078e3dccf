"""A picture through the pool against diffusers' own pipeline on the same model, in one run.

    python benchmarks/images.py [--json]

The demo model on two processes, one torch thread each; both ways in turns. `same_pictures` is
whether the fp32 codec gave the pipeline's very pixels; times are of `--codec`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, ImageChops

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.diffusion.schedulers import make_scheduler, read_scheduler_config
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.image.maker import ImageMaker, ImageSettings

PROMPT = "a red house on a green hill under a blue sky"
STEPS = 20


def make_whole(directory: Path) -> Callable[[ImageSettings], Image.Image]:
    """diffusers' own pipeline, unsplit."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        directory, torch_dtype=torch.float32, add_watermarker=False, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    config = read_scheduler_config(directory)

    def make(settings: ImageSettings) -> Image.Image:
        pipeline.scheduler = make_scheduler(config, settings.scheduler, settings.steps)
        (image,) = pipeline(
            settings.prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in settings.seeds],
        ).images
        assert isinstance(image, Image.Image)
        return image

    return make


def measure(codec: str, rounds: int) -> dict[str, Any]:
    directory = find_model(DEMO_IMAGE_MODEL)
    whole = make_whole(directory)
    exact = ImageSettings(prompt=PROMPT, steps=STEPS, seed=1, codec_up="fp32", codec_down="fp32")
    chosen = ImageSettings(prompt=PROMPT, steps=STEPS, seed=1, codec_up=codec, codec_down=codec)
    with LocalPool(PoolSettings(workers=1, image_model=DEMO_IMAGE_MODEL)) as pool:
        client = pool.connect()
        maker = ImageMaker(directory, client)
        freeze_loaded_objects()
        (split,) = maker.make(exact)
        same = ImageChops.difference(split, whole(exact)).getbbox() is None
        ours, plain = [], []
        for _ in range(rounds):
            started_at = time.perf_counter()
            whole(chosen)
            plain.append(time.perf_counter() - started_at)
            started_at = time.perf_counter()
            maker.make(chosen)
            ours.append(time.perf_counter() - started_at)
        stats = maker.stats
        client.close()
    return {
        "ratio": round(statistics.median(p / o for o, p in zip(ours, plain, strict=True)), 3),
        "diffusers_s": round(statistics.median(plain), 3),
        "midspan_s": round(statistics.median(ours), 3),
        "added_ms_per_step": round(
            statistics.median(o - p for o, p in zip(ours, plain, strict=True)) / STEPS * 1e3, 2
        ),
        "bytes_up": stats.bytes_up,
        "bytes_down": stats.bytes_down,
        "same_pictures": same,
        "steps": STEPS,
        "codec": codec,
    }


@click.command()
@click.option("--codec", default="int8", show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(codec: str, rounds: int, as_json: bool) -> None:
    set_up_torch(threads=1)
    result = measure(codec, rounds)
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, value in result.items():
        click.echo(f"{name:20} {value}")


if __name__ == "__main__":
    main()
