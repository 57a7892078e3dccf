"""`midspan ask`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import click

from common.console.options import (
    dtype_option,
    model_option,
    new_tokens_option,
    span_option,
    threads_option,
)
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.console.tables import format_table
from common.errors import SettingsError
from common.security.keys import read_public
from common.weights.demo_model import find_model
from edge_agent.commands.codec_options import CodecChoice, codec_options
from edge_agent.commands.connection_options import SERVED, Connection, connection_options
from edge_agent.commands.prompts import check_text, read_prompt
from edge_agent.commands.run_options import (
    encrypt_option,
    print_stats,
    report_options,
    timeout_option,
)
from edge_agent.commands.sampling_options import Sampling, sampling_options
from edge_agent.text.sampling import read_defaults


@click.command()
@click.argument("prompt")
@model_option
@span_option(SERVED)
@connection_options
@encrypt_option
@codec_options
@new_tokens_option(200)
@sampling_options
@click.option("--stop", "stops", multiple=True, help="End the text before this string; repeatable.")
@dtype_option
@threads_option
@timeout_option(60.0)
@report_options("text, token_ids, stats")
def ask(
    prompt: str,
    model_name: str | None,
    span_text: str | None,
    connection: Connection,
    pool_key: str | None,
    codecs: CodecChoice,
    max_new_tokens: int,
    sampling: Sampling,
    stops: tuple[str, ...],
    dtype: str,
    threads: int | None,
    timeout_s: float,
    as_json: bool,
    with_stats: bool,
) -> None:
    """Answer PROMPT with the pool's help; - reads the prompt from stdin.

    Text is not sent. Rows of numbers are, and who holds the model's weights can turn those back
    into the prompt.
    """
    client = connection.connect(timeout_s)
    pool_public = read_public(pool_key) if pool_key else None
    prompt = read_prompt(prompt)
    if not prompt.strip():
        raise SettingsError("the prompt is empty; give a text, or - to read one from stdin")
    check_stops(stops)
    directory = find_model(model_name)
    drawing = sampling.read_settings(read_defaults(directory))
    sampling.warn_of_greedy(drawing)
    set_up_torch(threads or os.cpu_count())
    from edge_agent.text.ends import load_ends
    from edge_agent.text.generation import start_generation
    from edge_agent.text.session import Session
    from edge_agent.text.tokenizer import TextTokenizer

    settings = codecs.read_settings(step_deadline_s=timeout_s)
    report = (
        client.status()
    )  # a broker that is not there is better known before the model is loaded
    ends = load_ends(directory, span_text, dtype, report)
    generation = start_generation(
        Session(ends, client, settings, codecs.find_calibration(ends), pool_public),
        TextTokenizer(directory),
        prompt,
        max_new_tokens,
        drawing,
        stops,
    )
    freeze_loaded_objects()
    try:
        for piece in generation.stream():
            if not as_json:
                click.echo(piece, nl=False)
    finally:
        client.close()
        if not as_json:
            click.echo()  # an error that cuts the text off begins a line of its own
            if with_stats and generation.token_ids:
                print_stats(format_stats(generation.stats.to_json()))
    if as_json:
        stats = generation.stats.to_json() | {"finish_reason": generation.finish_reason}
        answer = {"text": generation.text, "token_ids": generation.token_ids, "stats": stats}
        click.echo(json.dumps(answer))


def check_stops(stops: Sequence[str]) -> None:
    """Raises SettingsError for a string that no text could be ended by."""
    for stop in stops:
        if not stop:
            raise SettingsError("--stop is empty; expected a string before which the text ends")
        check_text("--stop", stop)


def format_stats(stats: dict[str, Any]) -> str:
    """The table that --stats prints."""
    stages = stats["ms_per_token"]
    workers = ", ".join(f"{name} {count}" for name, count in stats["tokens_by_worker"].items())
    rows = [
        ("tokens", f"{stats['new_tokens']} new after {stats['prompt_tokens']} of the prompt"),
        ("speed", f"{stats['tokens_per_s']} tokens/s, first token {stats['first_token_ms']} ms"),
        ("bytes per token", f"{stats['bytes_up_per_token']} up, "
                            f"{stats['bytes_down_per_token']} down"),
        ("bytes in all", f"{stats['bytes_up']:,} up, {stats['bytes_down']:,} down"),
        ("ms per token", ", ".join(f"{name} {ms}" for name, ms in stages.items())),
        ("rows by worker", workers),
        ("rows replayed", str(stats["rows_replayed"])),
    ]  # fmt: skip
    return format_table(("what it cost", "per token: after the first, times are medians"), rows)
