"""`midspan ask`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from common.console.option_types import SEED, THREADS
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.console.tables import format_table
from common.errors import SettingsError
from common.security.keys import read_public
from common.weights.demo_model import find_model
from edge_agent.commands.codec_options import codec_options, find_calibration, read_codec_options
from edge_agent.commands.connection_options import connect, connection_options
from edge_agent.commands.prompts import check_text, read_prompt


@click.command()
@click.argument("prompt")
@click.option("--model", "model_name", help="Hugging Face directory.  [default: the demo model]")
@click.option("--cut", help="Where the middle begins and ends, as A:B.  [default: middle half]")
@connection_options
@click.option(
    "--encrypt-kv",
    "pool_key",
    metavar="POOL_KEY",
    help="Have the KV encrypted at rest for workers with this pool key (a .key file, or the text).",
)
@codec_options
@click.option("-n", "--max-new-tokens", default=200, show_default=True)
@click.option("-t", "--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="0 is all.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--repetition-penalty", default=1.0, show_default=True)
@click.option("--seed", type=SEED, help="Makes sampling repeatable.")
@click.option("--stop", "stops", multiple=True, help="End the text before this string; repeatable.")
@click.option("--dtype", default="float32", show_default=True, help="Of head and tail.")
@click.option("--threads", type=THREADS, help="torch threads.  [default: all cores]")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds for a step.")
@click.option("--json", "as_json", is_flag=True, help="Print one object: text, token_ids, stats.")
@click.option("--stats", "with_stats", is_flag=True, help="Print what it cost, to stderr.")
def ask(
    prompt: str,
    model_name: str | None,
    cut: str | None,
    brokers: tuple[str, ...],
    key: Path | None,
    broker_key: str | None,
    pool_key: str | None,
    codec: str,
    codec_prefill: str | None,
    codec_decode: str | None,
    calibration: Path | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int | None,
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
    client = connect(brokers, key, broker_key, timeout_s)
    pool_public = read_public(pool_key) if pool_key else None
    prompt = read_prompt(prompt)
    if not prompt.strip():
        raise SettingsError("the prompt is empty; give a text, or - to read one from stdin")
    check_stops(stops)
    drawing = {"--top-k": top_k != 0, "--top-p": top_p != 1, "--seed": seed is not None}
    warn_of_greedy(temperature, drawing)
    directory = find_model(model_name)
    set_up_torch(threads or os.cpu_count())
    from edge_agent.text.ends import load_ends
    from edge_agent.text.generation import start_generation
    from edge_agent.text.sampler import SamplingSettings
    from edge_agent.text.session import Session
    from edge_agent.text.tokenizer import TextTokenizer

    sampling = SamplingSettings(temperature, top_k, top_p, repetition_penalty, seed)
    settings = read_codec_options(codec, codec_prefill, codec_decode, step_deadline_s=timeout_s)
    client.status()  # a broker that is not there is better known before the model is loaded
    ends = load_ends(directory, cut, dtype)
    generation = start_generation(
        Session(ends, client, settings, find_calibration(ends, calibration), pool_public),
        TextTokenizer(directory),
        prompt,
        max_new_tokens,
        sampling,
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
    stats = generation.stats.to_json() | {"finish_reason": generation.finish_reason}
    if as_json:
        answer = {"text": generation.text, "token_ids": generation.token_ids, "stats": stats}
        click.echo(json.dumps(answer))
        return
    if with_stats:
        click.echo(f"\n{format_stats(stats)}", err=True)


def check_stops(stops: Sequence[str]) -> None:
    """Raises SettingsError for a string that no text could be ended by."""
    for stop in stops:
        if not stop:
            raise SettingsError("--stop is empty; expected a string before which the text ends")
        check_text("--stop", stop)


def warn_of_greedy(temperature: float, given: Mapping[str, bool]) -> None:
    """Say which options do nothing, because no token is drawn."""
    idle = [option for option, is_given in given.items() if is_given]
    if temperature == 0 and idle:
        click.echo(
            f"warning: {' and '.join(idle)} {'does' if len(idle) == 1 else 'do'} nothing at "
            "temperature 0, which always takes the likeliest token; give -t 0.7, say",
            err=True,
        )


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
