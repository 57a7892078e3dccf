"""`midspan status`: what the broker knows, as a table."""

from __future__ import annotations

import json
from typing import Any

import click

from common.settings import EDGE_ENDPOINT, parse_endpoint
from common.tables import format_table


@click.command()
@click.option("--broker", "brokers", multiple=True, default=[EDGE_ENDPOINT], show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def status(brokers: tuple[str, ...], as_json: bool) -> None:
    """Show workers, sessions and queues."""
    from edge_agent.client import BrokerClient

    client = BrokerClient([parse_endpoint(broker, "--broker") for broker in brokers])
    try:
        report = client.status()
    finally:
        client.close()
    click.echo(json.dumps(report) if as_json else format_report(report))


def format_report(report: dict[str, Any]) -> str:
    """The tables that `midspan status` prints."""
    headers = ("worker", "state", "serving", "in flight", "warm sessions", "steps", "store")
    rows = [
        (
            worker["worker_id"],
            worker["state"],
            ", ".join(f"{s['name']} {s['span']}" for s in worker["services"]),
            worker["in_flight"],
            worker["warm_sessions"],
            worker["steps_done"],
            "up" if worker["stats"].get("store_up") else "down",
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
    return f"{table}\n\n{summary}\n{counters}"
