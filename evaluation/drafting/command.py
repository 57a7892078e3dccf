"""`midspan train-drafter`: make what guesses a model's next tokens on the device."""

from __future__ import annotations

from pathlib import Path

import click

from common.console.option_types import COUNT, SEED
from common.console.options import span_option, threads_option
from common.console.outputs import check_directory
from common.console.tables import format_bytes, format_table
from common.console.waiting import waiting
from evaluation.options import documents_option, text_option
from evaluation.progress import counted_work, long_work


@click.command("train-drafter")
@click.argument("model")
@text_option
@documents_option
@click.option(
    "--kind", type=click.Choice(["ngram", "model", "both"]), default="both", show_default=True,
    help="What to make: a table of n-grams, a trained layer.",
)  # fmt: skip
@span_option("the middle half")
@click.option(
    "--own-texts", default=1000, show_default=True, type=COUNT,
    help="Beginnings of the text that the model goes on from.",
)  # fmt: skip
@click.option(
    "--training-steps", default=600, show_default=True, type=COUNT, help="Of 8 texts each."
)
@click.option("--seed", default=0, show_default=True, type=SEED, help="Makes it repeatable.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path),
    help="What to write: a directory.  [default: drafting in the model directory]",
)  # fmt: skip
@threads_option
def train_drafter(
    model: str,
    text: Path,
    documents: bool,
    kind: str,
    span_text: str | None,
    own_texts: int,
    training_steps: int,
    seed: int,
    output: Path | None,
    threads: int | None,
) -> None:
    """Make drafters for MODEL, of texts that it writes itself to beginnings of a text of yours.

    A table of n-grams serves any cut, a trained layer one cut of the model; --draft of ask,
    chat and serve uses both. Runs the whole model. One text in twenty is held out, and what the
    drafters reach on these is printed: tokens per round trip.
    """
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.drafting.choice import FOLDER, layer_path, table_path
    from edge_agent.text.drafting.layer_file import save_layer
    from evaluation.drafting.making import LIMITS, Workshop

    set_up_torch(threads)
    directory = find_model(model)
    target = output or directory / FOLDER
    check_directory(target)
    with waiting(f"loading {directory.name}"):
        workshop = Workshop(directory, span_text, wants_layer=kind != "ngram")
    beginnings = workshop.read_beginnings(text, documents, own_texts, seed)
    with counted_work(len(beginnings), "writing texts") as bar:
        texts, held_out = workshop.write_texts(beginnings, bar.update)
    table, layer, made = None, None, list[Path]()
    if kind != "model":
        table = workshop.make_table(texts)
        made.append(table_path(target))
        table.save(made[-1])
    if kind != "ngram":
        with counted_work(training_steps, "training") as bar:
            layer = workshop.train(texts, training_steps, seed, lambda: bar.update(1))
        made.append(layer_path(target, str(workshop.ends.cut.middle)))
        save_layer(layer, made[-1], workshop.ends.fingerprint, str(workshop.ends.cut.middle))
    with long_work("measuring"):
        rows = workshop.measure(table, layer, held_out)
    for path in made:
        click.echo(f"{path}  {format_bytes(path.stat().st_size)}")
    click.echo(f"\nTokens per round trip, {len(held_out)} texts held out:\n")
    click.echo(format_table(["--draft", *(f"{n} drafts" for n in LIMITS)], rows))
