"""How benchmarks say what they have measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import click

from common.console.tables import format_table


def tell_rows(rows: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Print rows that have the same columns: as JSON, or as a table."""
    if as_json:
        click.echo(json.dumps(rows))
    else:
        click.echo(format_table(list(rows[0]), [list(row.values()) for row in rows]))
