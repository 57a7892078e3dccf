"""`midspan neurons`: which neurons of a model are active, and what lists of them have in common."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.inputs import check_file
from common.console.neuron_options import (
    NeuronOptions,
    base_option,
    loaded_option,
    neuron_layers_option,
    token_sparsity_option,
)
from common.console.option_types import COUNT, SEED
from common.console.options import new_tokens_option, threads_option
from common.console.outputs import check_writable
from common.console.tables import format_table
from common.console.waiting import waiting
from common.errors import SettingsError
from edge_agent.commands.task_options import task_option
from edge_agent.text.tasks import TASKS
from evaluation.options import (
    csv_option,
    documents_option,
    json_option,
    plot_option,
    text_option,
    tokens_option,
    window_option,
)
from evaluation.progress import counted_work, long_work

if TYPE_CHECKING:
    from common.neurons.lists import NeuronLists

SHARES = (0.1, 0.3, 0.5, 0.7)  # of the neurons of a layer


@click.group()
def neurons() -> None:
    """Find the active neurons of a model's MLPs, for --neurons."""


@neurons.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), help="Text to read.")
@task_option("prompts that come with midspan.")
@click.option("--random", "is_random", is_flag=True, help="Measure nothing, draw an order.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="What to write: lists as JSON.",
)  # fmt: skip
@new_tokens_option(32)
@tokens_option(20_000)
@window_option(256)
@documents_option
@click.option("--seed", type=SEED, default=0, help="Makes it repeatable.")
@threads_option
def profile(
    model: str,
    text: Path | None,
    task: str | None,
    is_random: bool,
    output: Path,
    max_new_tokens: int,
    tokens: int,
    window: int,
    documents: bool,
    seed: int,
    threads: int | None,
) -> None:
    """List the neurons of each layer of MODEL, the most active ones first.

    Measured on a text, on the prompts of a task, or without either on those of all tasks; tokens
    that the model goes on with count as well. Runs the whole model.
    """
    from common.console.processes import set_up_torch
    from common.neurons.lists import write_lists
    from common.weights.demo_model import find_model

    if sum((text is not None, task is not None, is_random)) > 1:
        raise SettingsError("--text, --task and --random are three sources of lists; give one")
    check_writable(output)
    set_up_torch(threads)
    from evaluation.neuron_profile import draw_lists, load_whole, split_texts

    directory = find_model(model)
    with waiting(f"loading {directory.resolve().name}"):
        whole, layers = load_whole(directory)
    if is_random:
        lists = draw_lists(layers, abs(seed), output.name)
    else:
        from edge_agent.text.tokenizer import TextTokenizer

        tokenizer = TextTokenizer(directory)
        if text is not None:
            texts = split_texts(text, tokenizer, documents, window, tokens)
        else:
            texts = [tokenizer.encode(prompt)[:window] for prompt in task_prompts(task)]
        about = f"{directory.resolve().name} on {text.name if text else task or 'all tasks'}"
        lists = _measure(whole, layers, texts, max_new_tokens, output.name, about)
    write_lists(output, lists)
    click.echo(f"{output}: {len(lists.layers)} layers of {len(lists.layers[0]):,} neurons")


def task_prompts(task: str | None) -> list[str]:
    """The predefined prompts of a task, or of all."""
    chosen = [TASKS[task]] if task is not None else list(TASKS.values())
    return [each.ask(example.given) for each in chosen for example in each.examples]


def _measure(
    whole: Any,
    layers: Sequence[Any],
    texts: Sequence[Sequence[int]],
    new_tokens: int,
    name: str,
    about: str,
) -> NeuronLists:
    from evaluation.neuron_profile import Activity, profile_texts

    activity = Activity(layers)
    with counted_work(len(texts), "measuring") as bar:
        for ids in texts:
            profile_texts(whole, activity, [ids], new_tokens)
            bar.update(1)
    return activity.lists(name, about)


@neurons.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def show(files: tuple[Path, ...], as_json: bool) -> None:
    """Say how much of the activity the first neurons of each list have, and what FILES share.

    A share of the activity is that of the first tenth, three tenths, half and seven tenths of a
    layer's neurons. What two lists share is said of as many of each; of random ones the tenth
    shares a tenth.
    """
    lists = [_read(path) for path in files]
    figures = describe(lists)
    if as_json:
        click.echo(json.dumps(figures))
        return
    headers = ["layer", *(f"{share:.0%}" for share in SHARES)]
    for name, layers in figures.items():
        rows = [[f"{number}", *map(_format_share, each)] for number, each in enumerate(layers)]
        click.echo(f"{name}\n{format_table(headers, rows)}\n")


def _read(path: Path) -> NeuronLists:
    from common.neurons.lists import read_lists

    check_file(path, "the list")
    return read_lists(path)


def _format_share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def describe(lists: Sequence[NeuronLists]) -> dict[str, list[list[float | None]]]:
    """By what is measured, for each layer, and each of SHARES: the table's columns.

    Raises SettingsError for lists of different models.
    """
    check_alike(lists)
    figures: dict[str, list[list[float | None]]] = {}
    for each in lists:
        if each.mass:
            figures[f"mass of {each.name}"] = [
                [mass_of_first(masses, share) for share in SHARES] for masses in each.mass
            ]
    for other in lists[1:]:
        figures[f"{lists[0].name} in {other.name}"] = [
            [overlap(one, two, share) for share in SHARES]
            for one, two in zip(lists[0].layers, other.layers, strict=True)
        ]
    return figures or {"mass": [[None] * len(SHARES) for _ in lists[0].layers]}


def check_alike(lists: Sequence[NeuronLists]) -> None:
    """Raises SettingsError unless all lists are of so many layers of so many neurons."""
    shapes = {each.name: [len(ids) for ids in each.layers] for each in lists}
    for name, shape in shapes.items():
        if shape != shapes[lists[0].name]:
            raise SettingsError(f"{name} and {lists[0].name} list other numbers of neurons")


def mass_of_first(masses: Sequence[float], share: float) -> float | None:
    """The part of a layer's activity that the first neurons of its list have."""
    total = sum(masses)
    return sum(masses[: round(share * len(masses))]) / total if total else None


def overlap(one: Any, other: Any, share: float) -> float | None:
    """The part of the first neurons of one list that is among the first of another, too."""
    count = round(share * len(one))
    return len(set(one[:count].tolist()) & set(other[:count].tolist())) / count if count else None


@neurons.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True,
    help="What to write: a PNG.",
)  # fmt: skip
def mask(files: tuple[Path, ...], output: Path) -> None:
    """Draw which neurons FILES list first, how much of the activity they have, what they share."""
    from evaluation.neuron_picture import draw_lists_picture

    check_writable(output)
    lists = [_read(path) for path in files]
    check_alike(lists)
    draw_lists_picture(lists, output)
    click.echo(f"{output}")


@neurons.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@text_option
@documents_option
@click.option(
    "--first-tokens", default=32, show_default=True, type=COUNT,
    help="Tokens of each text that are the prompt of the others.",
)  # fmt: skip
@window_option(128)
@tokens_option(8_000)
@loaded_option
@base_option
@token_sparsity_option
@neuron_layers_option
@csv_option
@plot_option
@json_option
def quality(
    model: str,
    files: tuple[Path, ...],
    text: Path,
    documents: bool,
    first_tokens: int,
    window: int,
    tokens: int,
    loaded: float,
    base: float,
    token_sparsity: float,
    neuron_layers: str,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Perplexity of MODEL, and a task, against the share of neurons computed, by lists of FILES.

    The task: to write the next four tokens as the text has them. Random neurons among those that
    are loaded are what a method has to beat.
    """
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.tokenizer import TextTokenizer

    for path in files:
        check_file(path, "the list")
    settings = NeuronOptions(
        files, loaded, base, min(loaded, 0.4), token_sparsity, neuron_layers=neuron_layers
    ).read()
    assert settings is not None
    check_writable(csv_path, plot_path)
    set_up_torch(1)
    from evaluation.neuron_profile import split_texts
    from evaluation.neuron_quality import Quality, cut_texts, draw_quality, sweep

    directory = find_model(model)
    texts = split_texts(text, TextTokenizer(directory), documents, window, tokens)
    measured: list[Quality] = []
    with long_work("measuring", is_shown=not as_json):
        for each in sweep(
            directory, settings, cut_texts(texts, first_tokens, window), first_tokens
        ):
            measured.append(each)
    headers = list(Quality.__slots__)
    rows = [
        [each.method, each.loaded, each.sparsity, round(each.perplexity, 4), round(each.exact, 4)]
        for each in measured
    ]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows([headers, *rows])
    if plot_path is not None:
        draw_quality(measured, plot_path)
    click.echo(
        json.dumps([asdict(each) for each in measured]) if as_json else format_table(headers, rows)
    )
