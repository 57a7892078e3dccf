"""`midspan broker`."""

from __future__ import annotations

import errno
import logging
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.demand import DEFAULT_GOALS, Goals
from common.console.listeners import name_listener
from common.console.option_types import COUNT
from common.console.options import (
    Logs,
    endpoint_options,
    insecure_option,
    log_options,
    metrics_option,
    open_page,
    spin_option,
)
from common.errors import SettingsError
from common.security.keys import is_public
from common.settings import (
    HEARTBEAT_S,
    HEARTBEATS_MISSED,
    MAX_ATTEMPTS,
    MAX_BROKER_MB,
    MAX_DEADLINE_S,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
    parse_endpoint,
)

if TYPE_CHECKING:
    from broker.server import BrokerServer

log = logging.getLogger("midspan.broker")


@click.command()
@endpoint_options(old_worker_endpoint=["--workers"])
@click.option(
    "--silence-ms",
    default=round(HEARTBEAT_S * HEARTBEATS_MISSED * 1000),
    show_default=True,
    type=click.IntRange(50, 3_600_000),
    help="A worker that is silent for this long is taken for dead.",
)
@click.option(
    "--max-queued",
    default=MAX_QUEUED_STEPS,
    show_default=True,
    type=COUNT,
    help="Steps held at once; beyond that edges are told to come back.",
)
@click.option(
    "--max-attempts",
    default=MAX_ATTEMPTS,
    show_default=True,
    type=COUNT,
    help="Workers that may fail a step before it is refused.",
)
@click.option(
    "--max-sessions",
    default=MAX_SESSIONS_PER_EDGE,
    show_default=True,
    type=COUNT,
    help="Sessions at once, of one edge.",
)
@click.option(
    "--max-memory-mb",
    default=MAX_BROKER_MB,
    show_default=True,
    type=click.IntRange(min=64),
    help="Of this process; beyond that edges are told to come back.",
)
@click.option(
    "--hold",
    "hold_s",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, MAX_DEADLINE_S),
    help="Seconds for which steps wait for a worker that serves them, when there is none: for "
    "pools that grow from zero. What is misspelt waits, too.",
)
@click.option(
    "--target-occupancy",
    default=DEFAULT_GOALS.occupancy,
    show_default=True,
    type=click.FloatRange(0.05, 1.0),
    help="Part of the time in which a worker should have something to do; for `autoscale`.",
)
@click.option(
    "--target-steps",
    default=DEFAULT_GOALS.steps,
    show_default=True,
    type=COUNT,
    help="At once, for which one worker is enough: about half of a batch; for `autoscale`.",
)
@click.option(
    "--target-wait-ms",
    default=round(DEFAULT_GOALS.wait_s * 1000),
    show_default=True,
    type=click.IntRange(1, 3_600_000),
    help="For which steps may wait before more workers are wanted; for `autoscale`.",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="Directory of keys (midspan keys): admit only those that are authorized there.",
)
@insecure_option
@spin_option
@metrics_option
@log_options
def broker(
    edge_endpoint: str,
    worker_endpoint: str,
    silence_ms: int,
    max_queued: int,
    max_attempts: int,
    max_sessions: int,
    max_memory_mb: int,
    hold_s: float,
    target_occupancy: float,
    target_steps: int,
    target_wait_ms: int,
    keys: Path | None,
    insecure: bool,
    spin_us: int,
    metrics: str | None,
    logs: Logs,
) -> None:
    """Run the broker: edges send it steps, it hands them to workers.

    It holds no state worth keeping: kill it and start it again at the same addresses, and
    generations go on.
    """
    logs.set_up()
    for option, endpoint in (
        ("--edge-endpoint", edge_endpoint), ("--worker-endpoint", worker_endpoint),
    ):  # fmt: skip
        parse_endpoint(endpoint, option)  # what is no address is not a public one, either
        if is_public(endpoint) and keys is None and not insecure:
            raise SettingsError(
                f"{option} {endpoint} can be reached from other machines, and without --keys "
                "anyone there could use the pool or pose as a worker; make keys with "
                "`midspan keys new broker`, or say --insecure"
            )
    server = bind_server(
        edge_endpoint,
        worker_endpoint,
        silence_s=silence_ms / 1000,
        max_queued_steps=max_queued,
        max_attempts=max_attempts,
        max_sessions_per_edge=max_sessions,
        hold_s=hold_s,
        goals=Goals(target_occupancy, target_wait_ms / 1000, target_steps),
        keys=keys.expanduser() if keys else None,
        max_memory_mb=max_memory_mb,
        metrics=open_page(metrics),
        spin_s=spin_us / 1e6,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    click.echo(f"broker ready: edges {server.edge_endpoint} workers {server.worker_endpoint}")
    server.run()
    log.info("broker stopped")


def bind_server(edges: str, workers: str, **settings: Any) -> BrokerServer:
    """A broker at these addresses. Raises SettingsError, which names who holds one of them."""
    from broker.server import BrokerServer

    try:
        return BrokerServer(edges, workers, **settings)
    except SettingsError as error:
        taken = [e for e in (edges, workers) if f" {e} " in str(error)]
        if not taken or os.strerror(errno.EADDRINUSE) not in str(error):
            raise
        holder = name_listener(taken[0])
        raise SettingsError(
            f"{error} It is in use by {holder}" if holder else str(error)
        ) from error
