"""Options that the measuring commands share."""

from __future__ import annotations

from pathlib import Path

import click

codecs_option = click.option("--codec", "codecs", multiple=True, help="Repeat for several.")
documents_option = click.option(
    "--documents", is_flag=True, help="Blank lines in the text separate documents."
)
csv_option = click.option(
    "--csv", "csv_path", type=click.Path(path_type=Path), help="Write a CSV file."
)
plot_option = click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Write a PNG."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
