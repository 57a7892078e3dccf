"""`midspan demo`: the main job in a minute, with a kill -9 in the middle of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console.option_types import SEED
from common.console.options import new_tokens_option
from common.console.outputs import check_writable
from common.console.renamed import RenamedOption
from edge_agent.commands.prompts import check_text

if TYPE_CHECKING:
    from deploy.pool import LocalPool

PROMPT = "Once upon a time, there was a brave mouse named Lily."
KILL_AFTER_TOKENS = 40
IMAGE_PROMPT = "a red house on a green hill under a blue sky with the sun"
KILL_AFTER_STEPS = 6


@click.command()
@click.option("--prompt", default=PROMPT, show_default=True, help="Prompt: how the story begins.")
@click.option("--seed", default=7, type=SEED, show_default=True, help="Makes it repeatable.")
@new_tokens_option(200)
@click.option(
    "-o",
    "--output",
    "image_file",
    cls=RenamedOption,
    old=["--image"],
    type=click.Path(path_type=Path),
    default=Path("demo-image.png"),
    show_default=True,
    help="What to write: the picture.",
)
def demo(prompt: str, seed: int, max_new_tokens: int, image_file: Path) -> None:
    """Start a pool, stream a story and a picture through it, kill the serving worker in both."""
    from common.console.processes import set_up_torch

    check_text("the prompt", prompt)
    check_writable(image_file)
    set_up_torch(threads=1)
    from common.errors import MidspanError
    from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model
    from deploy.pool import LocalPool, PoolSettings
    from edge_agent.commands.cost_tables import format_stats
    from edge_agent.commands.draft_options import DraftChoice
    from edge_agent.text.ends import load_ends
    from edge_agent.text.generation import Generation, start_generation
    from edge_agent.text.sampling import SamplingSettings
    from edge_agent.text.session import Session
    from edge_agent.text.tokenizer import TextTokenizer

    click.echo("Starting an embedded Redis, a broker and two workers …")
    settings = PoolSettings(workers=2, model=DEMO_TEXT_MODEL, image_model=DEMO_IMAGE_MODEL)
    with LocalPool(settings) as pool:
        directory = find_model(None)
        ends, tokenizer = load_ends(directory), TextTokenizer(directory)
        drafters = DraftChoice().open(ends)  # as midspan ask
        click.echo(
            f"Ready. Layers 0-{ends.cut.begin} and {ends.cut.end}-{ends.layers} of "
            f"{ends.name} run here, layers {ends.cut.middle} in the pool.\n"
        )

        def begin() -> Generation:
            client = pool.connect()
            sampling = SamplingSettings(temperature=0.7, top_p=0.95, seed=seed)
            session = Session(ends, client, drafters=drafters)
            return start_generation(session, tokenizer, prompt, max_new_tokens, sampling)

        disturbed = begin()
        click.echo(click.style(prompt, bold=True), nl=False)
        killed = ""
        for piece in disturbed.stream():
            click.echo(piece, nl=False)
            if not killed and len(disturbed.token_ids) >= KILL_AFTER_TOKENS:
                killed = disturbed.session.last_worker_id
                pool.kill_worker(killed)
                click.echo(click.style(f" [kill -9 {killed}]", fg="red"), nl=False)
        click.echo(f"\n\n{format_stats(disturbed.stats.to_json())}\n")

        undisturbed = begin()
        for _ in undisturbed.stream():
            pass
        if undisturbed.token_ids != disturbed.token_ids:
            raise MidspanError("the story differs from that of a run in which nobody was killed")
        click.echo(
            f"Worker {killed or '(none)'} was killed with -9 and the text went on: its "
            f"{len(disturbed.token_ids)} tokens equal those of an undisturbed run."
        )
        pool.start_worker()
        pool.wait_for_workers(2)
        make_picture(pool, image_file)
    click.echo(
        "\nTo see it as it happens, run `midspan serve --with-pool` (after `make demo` it is in "
        ".venv/bin) and open http://127.0.0.1:8080"
    )


def make_picture(pool: LocalPool, file: Path) -> None:
    """Make a picture with the outer UNet blocks here; the serving worker dies on the way."""
    from common.errors import MidspanError
    from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
    from edge_agent.image.maker import ImageMaker, ImageSettings, Progress

    client = pool.connect()
    maker = ImageMaker(find_model(DEMO_IMAGE_MODEL), client, cut="inner")
    settings = ImageSettings(IMAGE_PROMPT, steps=20, guidance=2.5, seed=1, cut="inner")
    killed = ""

    def kill_once(progress: Progress) -> None:
        nonlocal killed
        if progress.step == KILL_AFTER_STEPS:
            killed = maker.unet.last_worker_id
            pool.kill_worker(killed)

    click.echo(f"\nA picture of {click.style(IMAGE_PROMPT, bold=True)} …")
    (picture,) = maker.make(settings, kill_once)
    stats = maker.stats
    (undisturbed,) = maker.make(settings)
    client.close()
    if picture.tobytes() != undisturbed.tobytes():
        raise MidspanError("the picture differs from that of a run in which nobody was killed")
    picture.save(file)
    click.echo(
        f"{settings.steps} steps, {stats.bytes_up:,} bytes up and {stats.bytes_down:,} down. "
        f"Worker {killed} was killed with -9 at step {KILL_AFTER_STEPS}; the picture equals that "
        f"of an undisturbed run.\nIt is in {file.resolve()}"
    )
