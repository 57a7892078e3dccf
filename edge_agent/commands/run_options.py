"""Options of the commands that have the pool compute something: how long it may take, and more."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from common.console.options import Decorator, add_options

encrypt_option = click.option(
    "--encrypt-kv",
    "pool_key",
    metavar="POOL_KEY",
    help="Have what is stored encrypted for workers with this pool key (a .key file, or the text).",
)
exact_option = click.option(
    "--exact",
    is_flag=True,
    help="Have no bit of a logit depend on drafts, on other sessions, or on workers that die; on "
    "one kind of machine, and slower.",
)
system_option = click.option("-y", "--system", default="", help="The system prompt.")
template_option = click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="Jinja file, for a tokenizer without one or instead of its own.",
)


stats_option = click.option(
    "--stats", "with_stats", is_flag=True, help="Print what it cost, to stderr."
)


def timeout_option(default_s: float) -> Decorator:
    """--timeout, as `timeout_s`."""
    return click.option(
        "--timeout", "timeout_s", default=default_s, show_default=True, help="Seconds for a step."
    )


def report_options(fields: str) -> Decorator:
    """--json and --stats, as `as_json` and `with_stats`."""
    return add_options(
        click.option("--json", "as_json", is_flag=True, help=f"Print JSON, one object: {fields}."),
        stats_option,
    )


def print_stats(table: str) -> None:
    """Write what --stats asks for to stderr; on a terminal, apart from what stands above it."""
    click.echo(f"\n{table}" if sys.stderr.isatty() else table, err=True)
