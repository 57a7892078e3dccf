"""`midspan image`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.adapters.choice import check_weights, parse_choices
from common.console.options import (
    IMAGE_MODEL_HELP,
    device_option,
    dtype_option,
    image_lora_option,
    image_weights_option,
    threads_option,
)
from common.console.outputs import check_directory, check_writable
from common.console.processes import set_up_torch
from common.console.renamed import RenamedOption
from common.console.tables import format_table
from common.console.waiting import progress_bar, waiting
from common.security.keys import read_public
from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from edge_agent.commands.connection_options import Connection, connection_options
from edge_agent.commands.picture_options import Picture, picture_options
from edge_agent.commands.prompts import read_prompt
from edge_agent.commands.run_options import (
    encrypt_option,
    print_stats,
    report_options,
    timeout_option,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from edge_agent.image.maker import ImageMaker, ImageSettings, Progress


@click.command()
@click.argument("prompt")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("image.png"),
    show_default=True,
    help="What to write; with --count, a number is put before the suffix.",
)
@click.option(
    "--image-model",
    cls=RenamedOption,
    old=["--model"],
    default=DEMO_IMAGE_MODEL,
    show_default=True,
    help=IMAGE_MODEL_HELP,
)
@image_weights_option
@image_lora_option
@connection_options
@picture_options
@click.option("--preview-every", type=click.IntRange(min=1), help="Save a preview every K steps.")
@click.option(
    "--save-noise",
    "noise_directory",
    type=click.Path(path_type=Path, file_okay=False),
    help="Save pictures of what travelled.",
)
@click.option(
    "--prompt-in-png",
    is_flag=True,
    help="Write the prompt into the file, too, beside how the picture was made.",
)
@encrypt_option
@dtype_option
@device_option
@threads_option
@timeout_option(120.0)
@report_options("files, seeds, stats")
def image(
    prompt: str,
    output: Path,
    image_model: str,
    image_weights: Path | None,
    image_loras: tuple[str, ...],
    connection: Connection,
    picture: Picture,
    preview_every: int | None,
    noise_directory: Path | None,
    prompt_in_png: bool,
    pool_key: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    timeout_s: float,
    as_json: bool,
    with_stats: bool,
) -> None:
    """Make a picture of PROMPT with the pool's help; - reads the prompt from stdin.

    The prompt's text stays here. Its embeddings go to the workers, whatever these compute, and who
    holds the text encoders can search for the prompt that gives them. With --image-part unet the
    workers also see the noise of every step, which is the picture; with inner features of it.
    """
    prompt = read_prompt(prompt)
    with waiting("loading libraries", is_shown=not as_json):
        from edge_agent.image.files import describe_picture, save_pictures
        from edge_agent.image.maker import ImageMaker

        settings = picture.read_settings(prompt)
    picture.warn_of_negative()
    check_output(output)
    if noise_directory is not None:
        check_directory(noise_directory)
    pool_public = read_public(pool_key) if pool_key else None
    directory, loras = find_model(image_model), parse_choices(image_loras)
    check_weights(image_weights, image_model)
    client = connection.connect(timeout_s)
    try:
        client.status()  # a broker that is not there is better known before models are loaded
        with waiting(f"loading {directory.resolve().name}", is_shown=not as_json):
            set_up_torch(threads or os.cpu_count(), images=True)
            maker = ImageMaker(
                directory, client, picture.cut, dtype, device, timeout_s, pool_public, loras,
                image_weights,
            )  # fmt: skip
        for text in (prompt, picture.negative):
            warn_of_cut_off(maker, text)
        images = make_with_progress(
            maker, settings, output, preview_every, noise_directory, is_shown=not as_json
        )
    finally:
        client.close()
    model = image_weights.stem if image_weights else directory.resolve().name
    descriptions = [
        describe_picture(settings, model, index, prompt_in_png, loras)
        for index in range(settings.count)
    ]
    files = save_pictures(images, output, descriptions)
    stats = maker.stats.to_json()
    if as_json:
        said = {"files": list(map(str, files)), "seeds": settings.seeds, "stats": stats}
        click.echo(json.dumps(said))
    else:
        tell(files, settings.seed if picture.seed is None else None, stats if with_stats else None)


def tell(files: Sequence[Path], drawn_seed: int | None, stats: dict[str, Any] | None) -> None:
    """Where the pictures are; a seed that nobody gave, and what they cost, if that is wanted."""
    if drawn_seed is not None:
        click.echo(f"seed {drawn_seed}", err=True)
    for file in files:
        click.echo(str(file))
    if stats is not None:
        print_stats(format_image_stats(stats))


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
    is_shown: bool,
) -> list[Image]:
    """Make images with a progress bar on stderr, previews beside the output, and noise pictures."""
    from edge_agent.image.files import save_pictures
    from edge_agent.image.noise_pictures import NoisePictures

    noise = NoisePictures(noise_directory) if noise_directory else None
    with progress_bar(settings.steps, "steps", is_shown=is_shown) as bar:

        def on_step(progress: Progress) -> None:
            bar.length = progress.steps  # some schedulers take more steps than they were asked for
            bar.update(1)
            if preview_every and progress.step % preview_every == 0:
                previews = maker.decode(progress.latents)
                save_pictures(previews, output.with_stem(f"{output.stem}-step{progress.step:02}"))

        if noise is None:
            return maker.make(settings, on_step)
        return maker.make(settings, on_step, noise.add)


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
