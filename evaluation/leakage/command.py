"""`midspan eval leakage`: what whoever runs the pool recovers of prompts and answers."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console.option_types import COUNT
from common.console.options import calibration_option, new_tokens_option, span_option
from common.console.outputs import check_writable
from common.console.tables import format_table
from common.errors import SettingsError
from evaluation.options import (
    codecs_option,
    csv_option,
    documents_option,
    json_option,
    text_option,
    tokens_option,
    window_option,
)
from evaluation.progress import counted_work

if TYPE_CHECKING:
    from evaluation.leakage.images import ImageLeak
    from evaluation.leakage.table import Campaign, Leak
    from evaluation.leakage.texts import Division

DEFAULT_CODECS = ("fp32", "int8", "int4")
ATTACK_NAMES = (
    "exact-search", "nearest-embedding", "linear-map", "network", "known-plaintext", "downlink",
    "drafted-rows",
)  # fmt: skip


@click.command("leakage")
@click.argument("model")
@text_option
@codecs_option
@span_option("the middle half; repeat it for several", multiple=True)
@calibration_option
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    type=click.Choice(ATTACK_NAMES),
    help="Attack; repeat it for several.  [default: all]",
)
@tokens_option(512, " The attacker has the rest of it.")
@window_option(64, " So long is a prompt at most.")
@new_tokens_option(16)
@click.option(
    "--pairs",
    default=10_000,
    show_default=True,
    type=COUNT,
    help="Rows that the attacker trains on: the rest of the text, then random tokens.",
)
@documents_option
@csv_option
@json_option
def leakage_command(
    model: str,
    text: Path,
    codecs: tuple[str, ...],
    span_text: tuple[str, ...],
    calibration: Path | None,
    attacks: tuple[str, ...],
    tokens: int,
    window: int,
    max_new_tokens: int,
    pairs: int,
    documents: bool,
    csv_path: Path | None,
    as_json: bool,
) -> None:
    """What the pool's operator recovers of sessions with MODEL, by attack, cut and codec.

    Prompts are taken from the text and answered greedily; attacked are the rows that cross the cut,
    as a worker has them. Of an image model each line of the text is a prompt, all attacks on both
    parts are made, and a pool is started. The strongest attack is the headline.
    """
    from common.codecs.spec import parse_codec
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from evaluation.leakage.table import Campaign
    from evaluation.leakage.texts import Division

    names = codecs or DEFAULT_CODECS
    check_writable(csv_path)
    directory = find_model(model)
    if (directory / "model_index.json").exists():
        texts_only = {
            "--span": span_text, "--attack": attacks, "--calibration": calibration,
            "--documents": documents,
        }  # fmt: skip
        refuse_for_images([name for name, value in texts_only.items() if value])
        report(attack_pictures(directory, text, names), csv_path, as_json)
        return
    for name in names:
        for direction in name.split(","):
            parse_codec(direction)
    set_up_torch(threads=1)
    leaks = attack_cuts(
        directory,
        span_text or (None,),
        (text, documents, Division(window, tokens, pairs)),
        Campaign(attacks or ATTACK_NAMES, names, calibration, max_new_tokens),
        is_shown=not as_json,
    )
    report(leaks, csv_path, as_json)


def attack_cuts(
    directory: Path,
    spans: Sequence[str | None],
    source: tuple[Path, bool, Division],
    campaign: Campaign,
    is_shown: bool = True,
) -> list[Leak]:
    """All of a campaign at each cut. `source`: the text's file, its documents, whose is what."""
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.leakage.split_model import SplitModel
    from evaluation.leakage.table import attack_model
    from evaluation.leakage.texts import divide_text

    path, documents, division = source
    tokenizer = TextTokenizer(directory)
    leaks: list[Leak] = []
    with counted_work(len(spans) * len(campaign.codecs), "attacking", is_shown=is_shown) as bar:
        for span in spans:
            split = SplitModel(directory, span)
            texts = divide_text(path, tokenizer, documents, division, split.ends.vocabulary)
            for found in attack_model(split, texts, campaign, tokenizer):
                leaks += found
                bar.update(1)
    return leaks


def refuse_for_images(options: Sequence[str]) -> None:
    """Raises SettingsError if there are any."""
    if options:
        raise SettingsError(f"{options[0]} is for language models; this is one of images")


def attack_pictures(directory: Path, text: Path, codecs: Sequence[str]) -> list[ImageLeak]:
    """Each line of the text is a prompt. Raises SettingsError."""
    from common.console.processes import set_up_torch
    from common.diffusion.tensors import check_image_codec
    from evaluation.texts import read_lines

    for name in codecs:
        check_image_codec(name)
    if importlib.util.find_spec("skimage") is None:
        raise SettingsError("this needs skimage: pip install 'midspan[eval]'")
    prompts = read_lines(text)
    set_up_torch(threads=1, images=True)
    from evaluation.leakage.images import attack_images

    return [leak for found in attack_images(directory, prompts, codecs) for leak in found]


def report(leaks: Sequence[Leak | ImageLeak], csv_path: Path | None, as_json: bool) -> None:
    """Print the table and its headline, and say so if the evaluator itself must be doubted."""
    headline = max(leaks, key=lambda leak: leak.recovered_percent)
    headers = [field.name for field in fields(headline)]
    rows = [tuple(asdict(leak).values()) for leak in leaks]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows([headers, *rows])
    if as_json:
        attacks = [asdict(leak) for leak in leaks]
        click.echo(json.dumps({"headline_percent": headline.recovered_percent, "attacks": attacks}))
    else:
        click.echo(format_table(headers, rows))
        click.echo(
            f"headline: {headline.recovered_percent}% ({headline.attack}, cut {headline.cut}, "
            f"{headline.codec})"
        )
    for leak in leaks:
        if (leak.attack, leak.codec) == ("exact-search", "fp32") and leak.recovered_percent < 100:
            click.echo(
                f"exact search found {leak.recovered_percent}% at cut {leak.cut} of what was sent "
                "as fp32; expected 100: some tokens have the same embedding, or this is broken",
                err=True,
            )
