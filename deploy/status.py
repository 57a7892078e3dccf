"""`midspan status`: what the broker knows; with --check, what the pool can do."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from common.console.options import IMAGE_MODEL_HELP
from common.errors import MidspanError
from common.weights.demo_model import find_model
from deploy.checks import check_services, find_failure
from deploy.status_report import format_report
from edge_agent.commands.connection_options import Connection, connection_options

if TYPE_CHECKING:
    from edge_agent.engine.client import BrokerClient

WATCH_S = 1.0


@click.command()
@connection_options
@click.option(
    "--check",
    "with_check",
    is_flag=True,
    help="Send steps through the whole path; exit 1 if one fails.",
)
@click.option(
    "--image-model",
    help=f"{IMAGE_MODEL_HELP}  With --check.  [default: the demo model, if that is served]",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, the whole report.")
@click.option("--watch", "is_watched", is_flag=True, help="Show it again every second.")
def status(
    connection: Connection,
    with_check: bool,
    image_model: str | None,
    as_json: bool,
    is_watched: bool,
) -> None:
    """Show workers, sessions and queues."""
    client = connection.connect(timeout_s=10.0)
    broker = ", ".join(connection.brokers)
    try:
        if is_watched:
            watch(client, broker)
            return
        report = client.status()
        checks = (
            check_services(client, report, find_model(image_model) if image_model else None)
            if with_check
            else []
        )
        report = client.status() if with_check else report  # a store's silence shows in use
    finally:
        client.close()
    if with_check:
        report["checks"] = [asdict(check) for check in checks]
    click.echo(json.dumps(report) if as_json else format_report(report, broker))
    failure = find_failure(report, checks) if with_check else ""
    if failure:
        raise MidspanError(f"the check failed: {failure}")


def watch(client: BrokerClient, broker: str) -> None:
    """Show the report again and again, until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            text = format_report(client.status(), broker)
            click.clear()
            click.echo(text)
            time.sleep(WATCH_S)
