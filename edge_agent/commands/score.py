"""`midspan score`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from common.console.tables import format_table
from common.errors import SettingsError
from edge_agent.commands.means_options import means_options
from edge_agent.commands.own_engine import open_engine
from edge_agent.commands.prompts import check_text, read_prompt
from edge_agent.commands.question import Means

if TYPE_CHECKING:
    from edge_agent.engine.engine import Engine
    from edge_agent.text.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Scored:
    """A continuation of a prompt, and how likely it is there."""

    option: str
    logprob: float  # nats, of all its tokens
    tokens: int

    @property
    def per_token(self) -> float:
        return self.logprob / self.tokens


@click.command()
@click.argument("prompt")
@click.option(
    "--option",
    "options",
    multiple=True,
    required=True,
    help="A continuation, with the space that it begins with; repeatable.",
)
@means_options
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON, one object: options, best, nats_ahead."
)
def score(
    prompt: str,
    options: tuple[str, ...],
    means: Means,
    as_json: bool,
) -> None:
    """Say which continuation of PROMPT is likeliest, and by how much; - reads it from stdin.

    The likelihood is that of all tokens of a continuation, so that longer ones are less likely; the
    table has the mean of a token beside it.
    """
    prompt = read_prompt(prompt)
    check_options(options)
    with open_engine(means) as own:
        scored = score_options(own.engine, own.tokenizer, prompt, options)
    click.echo(
        json.dumps(to_json(scored), ensure_ascii=False) if as_json else format_scores(scored)
    )


def check_options(options: Sequence[str]) -> None:
    """Raises SettingsError for a continuation that is none."""
    for option in options:
        check_text("--option", option)
        if not option:
            raise SettingsError("--option is empty; expected a continuation of the prompt")
        if options.count(option) > 1:
            raise SettingsError(f"--option {option!r} is given twice")


def score_options(
    engine: Engine, tokenizer: TextTokenizer, prompt: str, options: Sequence[str]
) -> list[Scored]:
    """All options at once, as given. Raises SettingsError for one that adds no token."""
    start = len(tokenizer.encode(prompt))
    texts = [tokenizer.encode(prompt + option) for option in options]
    for option, ids in zip(options, texts, strict=True):
        if len(ids) <= start:
            raise SettingsError(f"--option {option!r} adds no token to the prompt")
    streams = [engine.submit(ids, 0, top_logprobs=0, score_prompt=True) for ids in texts]
    scored = []
    for option, ids, stream in zip(options, texts, streams, strict=True):
        list(stream)  # until it is over
        own = [each.logprob for each in stream.prompt_logprobs[start - 1 :]]  # none of the first
        scored.append(Scored(option, math.fsum(own), len(ids) - start))
    return scored


def to_json(scored: Sequence[Scored]) -> dict[str, Any]:
    """What --json prints."""
    best = max(scored, key=lambda one: one.logprob)
    return {
        "options": [
            {"option": one.option, "logprob": one.logprob, "tokens": one.tokens} for one in scored
        ],
        "best": best.option,
        "nats_ahead": count_ahead(scored),
    }


def count_ahead(scored: Sequence[Scored]) -> float | None:
    """How much likelier the likeliest is than the next, in nats; None if there is no other."""
    logprobs = sorted((one.logprob for one in scored), reverse=True)
    return logprobs[0] - logprobs[1] if len(logprobs) > 1 else None


def format_scores(scored: Sequence[Scored]) -> str:
    """The likeliest first; and by how much."""
    ranked = sorted(scored, key=lambda one: -one.logprob)
    rows = [
        (one.option.strip() or repr(one.option), f"{one.logprob:.3f}", f"{one.per_token:.3f}",
         f"{one.tokens}")
        for one in ranked
    ]  # fmt: skip
    table = format_table(("continuation", "nats", "a token", "tokens"), rows)
    ahead = count_ahead(scored)
    if ahead is None:
        return table
    factor = f"{math.exp(ahead):,.3g}" if ahead < 300 else "e300 and more"
    return f"{table}\n\n{rows[0][0]!r} is {factor} times likelier than {rows[1][0]!r}"
