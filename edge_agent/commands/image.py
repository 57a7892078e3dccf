"""`midspan image`."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.option_types import SEED, THREADS
from common.console.outputs import check_directory, check_writable
from common.console.processes import set_up_torch
from common.console.tables import format_table
from common.security.keys import read_public
from common.weights.demo_model import DEMO_IMAGE_MODEL
from edge_agent.commands.connection_options import connect, connection_options
from edge_agent.commands.prompts import check_text, read_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_agent.image.maker import ImageMaker, ImageSettings, Progress

MAX_SIDE = 8192  # of a picture in pixels; workers take no larger latents


@click.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("image.png"),
    show_default=True,
    help="With --count, a number is put before the suffix.",
)
@click.option(
    "--model",
    "model_name",
    default=DEMO_IMAGE_MODEL,
    show_default=True,
    help="SDXL pipeline: a directory in diffusers format.",
)
@connection_options
@click.option("--negative", default="", help="What the picture shall not show.")
@click.option("--steps", default=20, show_default=True)
@click.option("--guidance", default=2.5, show_default=True, help="Scale; 1 is none.")
@click.option("--seed", default=0, type=SEED, show_default=True)
@click.option("--size", help="As WIDTHxHEIGHT or one number.  [default: the model's own]")
@click.option("--count", default=1, show_default=True, help="Images made at once.")
@click.option(
    "--scheduler",
    default="euler",
    show_default=True,
    type=click.Choice(["euler", "ddim", "dpm++2m"]),
)
@click.option(
    "--image-cut",
    "cut",
    default="unet",
    show_default=True,
    type=click.Choice(["unet", "inner"]),
    help="What the workers compute: the whole UNet, or its inner blocks.",
)
@click.option(
    "--image-sync",
    "sync",
    default="edge",
    show_default=True,
    type=click.Choice(["edge", "cloud"]),
    help="Who keeps the latents; cloud sends nothing up after the first step.",
)
@click.option("--codec", default="int8", show_default=True, help="Of what travels, up and down.")
@click.option(
    "--reuse",
    default=1,
    show_default=True,
    help="With cut inner: ask the pool every so many steps only.",
)
@click.option("--preview-every", type=click.IntRange(min=1), help="Save a preview every K steps.")
@click.option(
    "--save-noise",
    "noise_directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Save pictures of what travelled.",
)
@click.option(
    "--encrypt-kv",
    "pool_key",
    metavar="POOL_KEY",
    help="Have what is stored encrypted for workers with this pool key.",
)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=THREADS, help="torch threads.  [default: all cores]")
@click.option(
    "--timeout", "timeout_s", default=120.0, show_default=True, help="Seconds for a step."
)
@click.option("--json", "as_json", is_flag=True, help="Print one object: files and stats.")
@click.option("--stats", "with_stats", is_flag=True, help="Print what it cost, to stderr.")
def image(
    prompt: str,
    output: Path,
    model_name: str,
    brokers: tuple[str, ...],
    key: Path | None,
    broker_key: str | None,
    negative: str,
    steps: int,
    guidance: float,
    seed: int,
    size: str | None,
    count: int,
    scheduler: str,
    cut: str,
    sync: str,
    codec: str,
    reuse: int,
    preview_every: int | None,
    noise_directory: Path | None,
    pool_key: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    timeout_s: float,
    as_json: bool,
    with_stats: bool,
) -> None:
    """Make a picture of PROMPT with the pool's help; - reads the prompt from stdin.

    The prompt's text stays here. Its embeddings go to the workers, in either cut, and who holds the
    text encoders can search for the prompt that gives them. With cut unet the workers also see the
    noise of every step, which is the picture; with inner they see features of it.
    """
    from common.weights.demo_model import find_model
    from edge_agent.image.maker import ImageMaker, ImageSettings

    prompt = read_prompt(prompt)
    check_text("--negative", negative)
    width, height = parse_size(size)
    settings = ImageSettings(
        prompt, negative, steps, guidance, seed, height, width, count, scheduler, cut, sync,
        codec, codec, reuse,
    )  # fmt: skip
    settings.check()
    if negative and guidance <= 1:
        click.echo(
            f"warning: --negative does nothing with --guidance {guidance:g}; it guides above 1",
            err=True,
        )
    check_output(output)
    if noise_directory is not None:
        check_directory(noise_directory)
    client = connect(brokers, key, broker_key, timeout_s)
    try:
        client.status()  # a broker that is not there is better known before models are loaded
        set_up_torch(threads or os.cpu_count())
        maker = ImageMaker(
            find_model(model_name), client, cut, dtype, device, timeout_s,
            read_public(pool_key) if pool_key else None,
        )  # fmt: skip
        for text in (prompt, negative):
            warn_of_cut_off(maker, text)
        images = make_with_progress(maker, settings, output, preview_every, noise_directory)
    finally:
        client.close()
    files = save_images(images, output)
    stats = maker.stats.to_json()
    if as_json:
        click.echo(json.dumps({"files": [str(file) for file in files], "stats": stats}))
        return
    for file in files:
        click.echo(str(file))
    if with_stats:
        click.echo(f"\n{format_image_stats(stats)}", err=True)


def parse_size(text: str | None) -> tuple[int | None, int | None]:
    """`512x768` or `512` to width and height. Raises SettingsError."""
    from common.errors import SettingsError

    if text is None:
        return None, None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(re.fullmatch("[0-9]{1,9}", side) for side in sides):
        raise SettingsError(f"--size is {text!r}; expected WIDTHxHEIGHT, as 1024x768, or a number")
    if max(map(int, sides)) > MAX_SIDE:
        raise SettingsError(f"--size is {text!r}; expected at most {MAX_SIDE} pixels")
    return int(sides[0]), int(sides[-1])


def check_output(output: Path) -> None:
    """Raises SettingsError if no picture can be written there: better known before it is made."""
    from PIL import Image as Images

    from common.errors import SettingsError

    if output.suffix.lower() not in Images.registered_extensions():
        raise SettingsError(f"{output} has no suffix of a picture format, as .png")
    check_writable(output)


def warn_of_cut_off(maker: ImageMaker, text: str) -> None:
    """Say which words of a prompt the text encoders will not see."""
    rest = maker.find_cut_off(text)
    if rest:
        click.echo(
            f"warning: the model reads {maker.max_prompt_tokens - 2} tokens of a prompt; "
            f"cut off: {rest!r}",
            err=True,
        )


def make_with_progress(
    maker: ImageMaker,
    settings: ImageSettings,
    output: Path,
    preview_every: int | None,
    noise_directory: Path | None,
) -> list[Image]:
    """Make images with a progress bar on stderr, previews beside the output, and noise pictures."""
    from edge_agent.image.noise_pictures import NoisePictures

    noise = NoisePictures(noise_directory) if noise_directory else None
    stderr = sys.stderr
    steps = range(settings.steps)
    with click.progressbar(steps, label="steps", file=stderr) as bar:

        def on_step(progress: Progress) -> None:
            bar.update(1)
            if preview_every and progress.step % preview_every == 0:
                previews = maker.decode(progress.latents)
                save_images(previews, output.with_stem(f"{output.stem}-step{progress.step:02}"))

        if noise is None:
            return maker.make(settings, on_step)
        return maker.make(settings, on_step, noise.add)


def save_images(images: list[Image], output: Path) -> list[Path]:
    """Write images; several get numbers. Raises SettingsError if that cannot be done."""
    from common.errors import SettingsError

    files = [output]
    if len(images) > 1:
        files = [output.with_stem(f"{output.stem}-{index}") for index in range(1, len(images) + 1)]
    try:
        for picture, file in zip(images, files, strict=True):
            picture.save(file)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{output} cannot be written: {error}") from error
    return files


def format_image_stats(stats: dict[str, Any]) -> str:
    """The table that --stats prints."""
    workers = ", ".join(f"{name} {count}" for name, count in stats["calls_by_worker"].items())
    rows = [
        ("steps", f"{stats['steps']}, of which {stats['calls']} went to the pool"),
        ("bytes", f"{stats['bytes_up']:,} up, {stats['bytes_down']:,} down"),
        ("seconds", f"{stats['total_s']}, waiting for the pool {stats['pool_s']}, "
                    f"of which computing {stats['middle_s']}"),
        ("steps by worker", workers),
        ("tensors sent again", str(stats["tensors_resent"])),
    ]  # fmt: skip
    return format_table(("what it cost", ""), rows)
