"""`midspan status`: what the broker knows, as a table; with --check, what the pool can do."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from common.errors import MidspanError, ProtocolError
from common.messages import Opening, Part, Step, StepReply
from common.tables import format_table
from edge_agent.connection_options import connect, connection_options

if TYPE_CHECKING:
    from edge_agent.client import BrokerClient

CHECK_STEPS = 5
CHECK_CODEC = "int8"


@click.command()
@connection_options
@click.option(
    "--check",
    "with_check",
    is_flag=True,
    help="Send steps through the whole path; exit 1 if one fails.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON.")
def status(
    brokers: tuple[str, ...],
    key: Path | None,
    broker_key: str | None,
    with_check: bool,
    as_json: bool,
) -> None:
    """Show workers, sessions and queues."""
    client = connect(brokers, key, broker_key, timeout_s=10.0)
    try:
        report = client.status()
        checks = check_services(client, report) if with_check else []
    finally:
        client.close()
    if with_check:
        report["checks"] = [asdict(check) for check in checks]
    click.echo(json.dumps(report) if as_json else format_report(report))
    if with_check and not checks:
        raise MidspanError("the check failed: no worker is ready that serves text, which it tests")
    failed = [check for check in checks if check.failure]
    if failed:
        raise MidspanError(f"the check failed: {failed[0].service}: {failed[0].failure}")


@dataclass(slots=True)
class ServiceCheck:
    """What became of the steps that --check sent for one service."""

    service: str
    worker_id: str = ""
    first_ms: float = 0.0
    later_ms: float = 0.0
    stored: bool = False
    failure: str = ""


def check_services(client: BrokerClient, report: dict[str, Any]) -> list[ServiceCheck]:
    """Send a few steps of one row to every service that a ready worker offers."""
    offered = {
        (service["model"], service["part"]): service
        for worker in report["workers"]
        if worker["state"] == "ready"
        for service in worker["services"]
    }
    return [_check_service(client, service) for service in offered.values() if service["hidden"]]


def _check_service(client: BrokerClient, service: dict[str, Any]) -> ServiceCheck:
    import torch

    from common.codecs.codec import make_codec

    check = ServiceCheck(f"{service['name']} {service['part']}")
    hidden = service["hidden"]
    opening = Opening(service["model"], service["part"], hidden, [CHECK_CODEC], "")
    session_id = secrets.token_bytes(16)
    up, down = make_codec(CHECK_CODEC, "up"), make_codec(CHECK_CODEC, "down")
    try:
        for index in range(CHECK_STEPS):
            body = up.encode(torch.randn(1, hidden))
            step = Step(session_id, 0, 0, index, index, [Part(0, 1, len(body))], 1, 0, 10_000)
            asked_at = time.monotonic()
            answer, rows = client.ask(
                step, body, opening, is_known=index > 0, wait_for_worker=False
            )
            check.later_ms = round((time.monotonic() - asked_at) * 1e3, 2)
            if index == 0:
                check.first_ms = check.later_ms
            if not isinstance(answer, StepReply):
                raise ProtocolError(f"worker {answer.worker_id} lost the session's rows")
            down.decode(rows, 1, hidden)
            check.worker_id, check.stored = answer.worker_id, answer.committed > 0
    except MidspanError as error:
        check.failure = str(error)
    finally:
        client.end_session(session_id)
    return check


def format_report(report: dict[str, Any]) -> str:
    """The tables that `midspan status` prints."""
    headers = ("worker", "state", "serving", "in flight", "warm sessions", "steps", "store")
    rows = [
        (
            worker["worker_id"],
            worker["state"],
            ", ".join(f"{s['name']} {s['part']}" for s in worker["services"]),
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
    refused = sum(report["refused_connections"].values())
    counters += f", refused_connections {refused}, bad_messages {report['bad_messages']}"
    return f"{table}\n\n{summary}\n{counters}{_format_checks(report.get('checks', []))}"


def _format_checks(checks: list[dict[str, Any]]) -> str:
    if not checks:
        return ""
    headers = ("checked", "by worker", "first ms", "later ms", "KV stored", "result")
    rows = [
        (
            check["service"],
            check["worker_id"],
            check["first_ms"],
            check["later_ms"],
            "yes" if check["stored"] else "no",
            check["failure"] or "works",
        )
        for check in checks
    ]
    return f"\n\n{format_table(headers, rows)}"
