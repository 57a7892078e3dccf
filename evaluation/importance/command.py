"""`midspan eval importance`: how important tokens are, and what coarse rows cost."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.console.outputs import check_directory
from common.console.plots import require_matplotlib, save_figure
from common.console.tables import format_table
from common.console.waiting import waiting
from evaluation.options import json_option
from evaluation.progress import counted_work

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluation.importance.sweep import Findings

PICTURES = ("sweep", "correlation", "relevance")


@click.command("importance")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="What to write: a directory of findings.json, points.csv, prompts.csv and plots.",
)
@click.option("--no-plots", is_flag=True, help="Write no PNG.")
@json_option
def importance_command(experiment: Path, output: Path, no_plots: bool, as_json: bool) -> None:
    """Measure what EXPERIMENT, a TOML file, asks for, with the whole model in this process.

    Tokens are ranked by the attention that they receive; the rows of the least important ones, or
    all channels, get few bits behind a layer, and perplexity says what that costs.
    """
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.importance.experiment import read_experiment
    from evaluation.importance.observation import WatchedModel
    from evaluation.importance.sweep import count_passes, measure
    from evaluation.texts import FEWEST_TOKENS, read_tokens

    asked = read_experiment(experiment)
    check_directory(output)
    if not no_plots:
        require_matplotlib()
    set_up_torch(threads=1)
    directory = find_model(asked.model)
    with waiting(f"loading {directory.resolve().name}", is_shown=not as_json):
        model = WatchedModel(directory)
    ids = read_tokens(
        asked.text, TextTokenizer(directory), asked.documents, asked.tokens,
        least=max(asked.window, FEWEST_TOKENS), named="the experiment's text",
    )  # fmt: skip
    passes = count_passes(asked, len(ids))
    with counted_work(passes, "measuring", is_shown=not as_json) as bar:
        findings = measure(model, ids, asked, bar.update)
    write(findings, output, with_plots=not no_plots)
    report(findings, as_json)


def write(findings: Findings, output: Path, with_plots: bool) -> None:
    """What was found, as JSON, as CSV and as pictures."""
    (output / "findings.json").write_text(json.dumps(asdict(findings), indent=1) + "\n")
    for name, rows in (("points", findings.points), ("prompts", findings.prompts)):
        if rows:
            with (output / f"{name}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([list(asdict(rows[0])), *_values(rows)])
    if with_plots:
        from evaluation.importance import pictures

        for name in PICTURES if pictures.list_sweep(findings) else PICTURES[1:]:
            save_figure(getattr(pictures, f"draw_{name}")(findings), output / f"{name}.png")


def report(findings: Findings, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(findings)))
        return
    for rows in (findings.points, findings.prompts):
        if rows:
            click.echo(format_table(list(asdict(rows[0])), _values(rows)))
            click.echo()


def _values(rows: Sequence[Any]) -> list[tuple[Any, ...]]:
    return [tuple(asdict(row).values()) for row in rows]
