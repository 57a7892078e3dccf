"""`midspan ask`."""

from __future__ import annotations

import itertools
import json

import click

from common.console.options import (
    answer_tokens_option,
    tokenizer_option,
)
from common.console.waiting import waiting
from common.errors import BrokerUnavailable
from edge_agent.commands.cost_tables import format_cut_off, format_stats
from edge_agent.commands.means_options import means_options
from edge_agent.commands.own_answer import OwnAnswer
from edge_agent.commands.question import Means, Question
from edge_agent.commands.run_options import (
    print_stats,
    report_options,
    system_option,
)
from edge_agent.commands.sampling_options import Sampling, sampling_options
from edge_agent.commands.served_answer import NotServed, ServedAnswer
from edge_agent.commands.task_options import TaskChoice, task_options
from edge_agent.server.announcement import list_running
from edge_agent.text.sampling import read_defaults

WAITING = "waiting for the first token"


@click.command()
@click.argument("prompt", required=False)
@task_options
@means_options
@answer_tokens_option(200, "--steps")
@sampling_options
@click.option("--stop", "stops", multiple=True, help="End the text before this string; repeatable.")
@system_option
@tokenizer_option("instead of the model's own", "-z")
@click.option(
    "--no-serve",
    is_flag=True,
    help="Load the model here, though a `midspan serve` of yours runs with it.",
)
@report_options("text, token_ids, stats")
def ask(
    prompt: str | None,
    task_choice: TaskChoice,
    means: Means,
    max_new_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...],
    system: str,
    no_serve: bool,
    as_json: bool,
    with_stats: bool,
) -> None:
    """Answer PROMPT with the pool's help; - reads the prompt from stdin.

    With --task PROMPT is a text to ask about, to summarize or to translate, or --example is one.
    With --system the prompt is what a user says, in the model's chat template. -n, -p, -t, -y and
    -z are what they are for llama2.c's run.

    Text is not sent. Rows of numbers are, and who holds the model's weights can turn those back
    into the prompt. Where a `midspan serve` of yours runs that would write the same, it is asked
    and no model is loaded.
    """
    drawing = sampling.read_settings(read_defaults(means.directory))
    question = Question(task_choice.read_prompt(prompt), max_new_tokens, drawing, stops, system)
    question.check()
    sampling.warn_of_greedy(drawing)
    answer: OwnAnswer | ServedAnswer | None = None
    refusals: list[str] = []
    if not no_serve and question.can_be_served():
        with waiting(WAITING, is_shown=not as_json):
            answer = ask_serves(question, means, refusals)
    try:
        answer = answer or load_own(question, means, as_json)
    except BrokerUnavailable as error:  # theirs may be another one, which is there
        raise BrokerUnavailable("; ".join([str(error), *refusals])) from error
    try:
        tell(answer, as_json)
    finally:
        answer.close()
        if not as_json:
            click.echo()  # an error that cuts the text off begins a line of its own
            if with_stats and answer.token_ids:
                print_stats(describe_cost(answer))
    if as_json:
        said = {"text": answer.text, "token_ids": answer.token_ids, "stats": answer.stats}
        click.echo(json.dumps(said))


def ask_serves(question: Question, means: Means, refusals: list[str]) -> ServedAnswer | None:
    """The answer of a running serve that would write what we would; None if there is none.

    Why each did not goes into `refusals`.
    """
    for announcement in list_running():
        if not means.fit(announcement):
            refusals.append(f"the serve at {announcement.url} has other options than these")
            continue
        try:
            return ServedAnswer(announcement, question)
        except NotServed as error:
            refusals.append(f"the serve at {announcement.url} does not answer, either: {error}")
    return None


def load_own(question: Question, means: Means, as_json: bool) -> OwnAnswer:
    """The answer of an engine in this process."""
    with waiting(f"loading {means.directory.resolve().name}", is_shown=not as_json):
        return OwnAnswer(question, means)


def tell(answer: OwnAnswer | ServedAnswer, as_json: bool) -> None:
    """Write the text as it comes; with JSON only read it."""
    pieces = answer.stream()
    with waiting(WAITING, is_shown=not as_json):
        first = next(pieces, "")
    for piece in itertools.chain([first], pieces):
        if not as_json:
            click.echo(piece, nl=False)


def describe_cost(answer: OwnAnswer | ServedAnswer) -> str:
    """The table that --stats prints; of a serve's answer that was cut off, what is known of it."""
    if answer.stats is None:
        assert isinstance(answer, ServedAnswer)
        return format_cut_off(answer.costs, answer.url)
    return format_stats(answer.stats)
