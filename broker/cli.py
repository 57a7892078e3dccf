"""`midspan broker`."""

from __future__ import annotations

import logging
import signal

import click

from common.processes import set_up_logging
from common.settings import (
    EDGE_ENDPOINT,
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    MAX_ATTEMPTS,
    MAX_QUEUED_STEPS,
    WORKER_ENDPOINT,
    parse_endpoint,
)

log = logging.getLogger("midspan.broker")


@click.command()
@click.option("--edges", default=EDGE_ENDPOINT, show_default=True, help="Address for edge agents.")
@click.option("--workers", default=WORKER_ENDPOINT, show_default=True, help="Address for workers.")
@click.option(
    "--silence-ms",
    default=round(HEARTBEAT_S * HEARTBEATS_MISSED * 1000),
    show_default=True,
    type=click.IntRange(min=50),
    help="A worker that is silent for this long is taken for dead.",
)
@click.option(
    "--max-queued",
    default=MAX_QUEUED_STEPS,
    show_default=True,
    type=click.IntRange(min=1),
    help="Steps held at once; beyond that edges are told to come back.",
)
@click.option(
    "--max-attempts",
    default=MAX_ATTEMPTS,
    show_default=True,
    type=click.IntRange(min=1),
    help="Workers that may fail a step before it is refused.",
)
@click.option("--verbose", is_flag=True, help="Log more.")
def broker(
    edges: str, workers: str, silence_ms: int, max_queued: int, max_attempts: int, verbose: bool
) -> None:
    """Run the broker: edges send it steps, it hands them to workers.

    It holds no state worth keeping: kill it and start it again at the same addresses, and
    generations go on.
    """
    from broker.server import BrokerServer

    set_up_logging(verbose)
    server = BrokerServer(
        parse_endpoint(edges, "--edges"),
        parse_endpoint(workers, "--workers"),
        silence_s=silence_ms / 1000,
        max_queued_steps=max_queued,
        max_attempts=max_attempts,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    click.echo(f"broker ready: edges {server.edge_endpoint} workers {server.worker_endpoint}")
    server.run()
    log.info("broker stopped")
