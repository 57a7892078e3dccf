"""`midspan eval speed`, `hardware` and `tasks`: predefined prompts, all neurons beside some."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.option_types import COUNT
from common.console.options import add_options, new_tokens_option, span_option
from common.console.tables import format_table
from edge_agent.text.tasks import TASKS
from evaluation.options import json_option
from evaluation.progress import long_work

if TYPE_CHECKING:
    from evaluation.neuron_runs import Answering

sessions_option = click.option(
    "--sessions", default=16, show_default=True, type=COUNT, help="Sessions, answered at once."
)
common_options = add_options(
    span_option("the middle half"), neuron_options, new_tokens_option(32), json_option
)


def _say(headers: Sequence[str], rows: Sequence[Sequence[object]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([dict(zip(headers, row, strict=True)) for row in rows]))
    else:
        click.echo(format_table(headers, rows))


def _prepare(model: str, neurons: NeuronOptions) -> Path:
    """Complains now, if ever, and sets torch up."""
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model

    neurons.read()
    neurons.check_files()
    directory = find_model(model)
    set_up_torch(1)
    return directory


def _prompts(directory: Path, count: int, answering: Answering, new_tokens: int) -> list[list[int]]:
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.neuron_runs import draw_prompts

    room = answering.context - new_tokens
    return draw_prompts(TextTokenizer(directory), count, max(1, room))


@click.command()
@click.argument("model")
@sessions_option
@click.option(
    "--rounds", default=5, show_default=True, type=COUNT, help="Rounds, of which the median counts."
)
@common_options
def speed(
    model: str,
    sessions: int,
    rounds: int,
    span_text: str | None,
    neurons: NeuronOptions,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Tokens a second of MODEL on predefined prompts: all neurons, and those that are chosen.

    Starts a broker and a worker with one thread for each; tokens are those of all sessions.
    """
    from evaluation.neuron_runs import kinds_of, open_pool, summarize_rounds

    directory, rows, base = _prepare(model, neurons), list[list[object]](), None
    for kind, options in kinds_of(neurons).items():
        with (
            long_work(kind, is_shown=not as_json),
            open_pool(directory, span_text, options) as pool,
        ):
            prompts = _prompts(directory, sessions, pool, max_new_tokens)
            measured = [pool.answer(prompts, max_new_tokens) for _ in range(rounds)]
        first_s, per_s = summarize_rounds(measured)
        base = base or per_s
        rows.append([kind, round(first_s, 3), round(per_s, 1), round(per_s / base, 2)])
    _say(("neurons", "first_token_s", "tokens_per_s", "ratio"), rows, as_json)


@click.command()
@click.argument("model")
@sessions_option
@common_options
def hardware(
    model: str,
    sessions: int,
    span_text: str | None,
    neurons: NeuronOptions,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Memory of a worker of MODEL that answers predefined prompts, and the weights at the edge.

    In MB, with all neurons and with those that are chosen; and what this machine is.
    """
    from evaluation.neuron_runs import kinds_of, open_pool

    directory, rows = _prepare(model, neurons), list[list[object]]()
    for kind, options in kinds_of(neurons).items():
        with (
            long_work(kind, is_shown=not as_json),
            open_pool(directory, span_text, options) as pool,
        ):
            pool.answer(_prompts(directory, sessions, pool, max_new_tokens), max_new_tokens)
            memory = pool.measure_memory()
        rows.append([kind, memory.resident_mb, memory.peak_mb, memory.edge_weights_mb])
    _say(("neurons", "worker_mb", "worker_peak_mb", "edge_weights_mb"), rows, as_json)
    if not as_json:
        click.echo(f"\n{describe_machine()}")


def describe_machine() -> str:
    """Processor, cores, and torch."""
    import torch

    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return f"{(names or ['a CPU'])[0]}, {os.cpu_count()} cores, torch {torch.__version__}"


@click.command()
@click.argument("model")
@common_options
def tasks(
    model: str,
    span_text: str | None,
    neurons: NeuronOptions,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Answers of MODEL to the examples of each task: words as in the answers that would do.

    And how far answers with chosen neurons are those with all, token by token from the first.
    """
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.neuron_runs import kinds_of, open_pool, overlap_of_words, share_alike

    directory = _prepare(model, neurons)
    tokenizer = TextTokenizer(directory)
    answers: dict[str, list[Any]] = {}
    examples = [(name, each) for name, task in TASKS.items() for each in task.examples]
    for kind, options in kinds_of(neurons).items():
        with (
            long_work(kind, is_shown=not as_json),
            open_pool(directory, span_text, options) as pool,
        ):
            prompts = _prompts(directory, len(examples), pool, max_new_tokens)
            answers[kind] = list(pool.answer(prompts, max_new_tokens).texts)
    rows = []
    for kind, texts in answers.items():
        for name in TASKS:
            own = [n for n, (task, _) in enumerate(examples) if task == name]
            words = [overlap_of_words(tokenizer.decode(texts[n]), examples[n][1]) for n in own]
            alike = [share_alike(texts[n], next(iter(answers.values()))[n]) for n in own]
            rows.append(
                [kind, name, round(statistics.mean(words), 3), round(statistics.mean(alike), 3)]
            )
    _say(("neurons", "task", "words", "as_with_all"), rows, as_json)
