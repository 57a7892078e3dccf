"""Options that the measuring commands share."""

from __future__ import annotations

from pathlib import Path

import click

from common.console.option_types import MAX_COUNT, FiniteRange
from common.console.options import Decorator

AT_LEAST_TWO = click.IntRange(2, MAX_COUNT)  # one token predicts nothing


def tokens_option(default: int | None, more: str = "") -> Decorator:
    """--tokens; `more` is the end of its help."""
    return click.option(
        "--tokens",
        default=default,
        show_default=default is not None,
        type=AT_LEAST_TWO,
        help=f"Tokens, of the text at most.{more}",
    )


def window_option(default: int | None, more: str = "") -> Decorator:
    """--window; `more` is the end of its help."""
    return click.option(
        "--window",
        default=default,
        show_default=default is not None,
        type=AT_LEAST_TWO,
        help=f"Tokens of one forward pass.{more}",
    )


text_option = click.option(
    "--text", type=click.Path(path_type=Path), required=True, help="Text to read."
)
codecs_option = click.option(
    "--codec", "codecs", multiple=True, help="Boundary codec; repeat it for several."
)
documents_option = click.option(
    "--documents", is_flag=True, help="Blank lines in the text separate documents."
)
csv_option = click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path), help="Write a CSV file."
)
plot_option = click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Write a PNG."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, not a table.")
mbit_option = click.option(
    "--mbit",
    type=FiniteRange(min=0, min_open=True),
    help="Say what a link of so many Mbit/s would take.",
)
rtt_option = click.option(
    "--rtt-ms",
    default=0.0,
    show_default=True,
    type=FiniteRange(min=0),
    help="Its round trip, with --mbit.",
)
