"""`midspan status`: what the broker knows, as a table; with --check, what the pool can do."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from common.console.tables import format_table
from common.errors import MidspanError
from deploy.checks import check_services, find_failure, find_store_faults, find_stores_down
from edge_agent.commands.connection_options import Connection, connection_options


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
    type=click.Path(path_type=Path),
    help="Of the image model to check.  [default: the demo model, if that is served]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def status(
    connection: Connection,
    with_check: bool,
    image_model: Path | None,
    as_json: bool,
) -> None:
    """Show workers, sessions and queues."""
    client = connection.connect(timeout_s=10.0)
    try:
        report = client.status()
        checks = check_services(client, report, image_model) if with_check else []
        report = client.status() if with_check else report  # a store's silence shows in use
    finally:
        client.close()
    if with_check:
        report["checks"] = [asdict(check) for check in checks]
    click.echo(json.dumps(report) if as_json else format_report(report))
    failure = find_failure(report, checks) if with_check else ""
    if failure:
        raise MidspanError(f"the check failed: {failure}")


def format_report(report: dict[str, Any]) -> str:
    """The tables that `midspan status` prints."""
    headers = ("worker", "state", "serving", "in flight", "warm sessions", "steps", "store")
    down = find_stores_down(report)
    rows = [
        (
            worker["worker_id"],
            worker["state"],
            ", ".join(f"{s['name']} {s['part']}" for s in worker["services"]),
            worker["in_flight"],
            worker["warm_sessions"],
            worker["steps_done"],
            "down" if worker["worker_id"] in down else "up",
        )
        for worker in report["workers"]
    ]
    queued = sum(queue["queued"] for queue in report["queues"])
    summary = (
        f"{len(rows)} workers, {report['sessions']} sessions, {queued} steps queued, "
        f"{report['steps_in_flight']} in flight, up {report['uptime_s']} s"
    )
    counters = ", ".join(f"{name} {count}" for name, count in report["counters"].items())
    table = format_table(headers, rows) if rows else "no workers"
    faults = find_store_faults(report)
    if faults:
        table += "\n\n" + "\n".join(faults)
    refused = sum(report["refused_connections"].values())
    counters += (
        f", refused_connections {refused}, ended_connections {report['ended_connections']}"
        f", bad_messages {report['bad_messages']}"
    )
    return f"{table}\n\n{summary}\n{counters}{_format_checks(report.get('checks', []))}"


def _format_checks(checks: list[dict[str, Any]]) -> str:
    if not checks:
        return ""
    headers = ("checked", "by worker", "first ms", "later ms", "stored", "result")
    rows = [
        (
            check["service"],
            check["worker_id"],
            check["first_ms"],
            check["later_ms"],
            {True: "yes", False: "no", None: "not known"}[check["stored"]],
            check["failure"] or check["skipped"] or "works",
        )
        for check in checks
    ]
    return f"\n\n{format_table(headers, rows)}"
