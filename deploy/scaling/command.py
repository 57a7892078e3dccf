"""`midspan autoscale`: as many workers as the brokers of a pool say are needed."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import click

from common.console.option_types import FiniteRange, WorkerRange
from common.console.options import workers_option
from common.console.processes import handle_signals
from common.security.keys import load_client_keys
from deploy.scaling.policy import ScalingPolicy, ScalingSettings
from edge_agent.commands.connection_options import Connection, connection_options

DEFAULT = ScalingSettings()
LOOK_S = 1.0
STATUS_LIMIT_S = 10.0


@click.command(context_settings={"allow_interspersed_args": False})
@connection_options
@workers_option(WorkerRange(least=0), "; from 0 on, the broker needs --hold", required=True)
@click.option(
    "--cool-down",
    "cool_down_s",
    default=DEFAULT.cool_down_s,
    show_default=True,
    type=FiniteRange(0, 86_400),
    help="Seconds for which fewer workers must have been enough before one leaves.",
)
@click.option(
    "--idle",
    "idle_s",
    default=DEFAULT.idle_s,
    show_default=True,
    type=FiniteRange(0, 604_800),
    help="Seconds without any work before the last one leaves.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def autoscale(
    connection: Connection,
    worker_range: tuple[int, int],
    cool_down_s: float,
    idle_s: float,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND as often as the pool needs workers.

    \b
    midspan autoscale --workers 0..4 -- midspan worker --model DIRECTORY

    Each run is one worker: SIGTERM drains it, and it must take the id from MIDSPAN_WORKER_ID, as
    `midspan worker` does, or from {id} in COMMAND. Ctrl-C drains all of them.
    """
    from deploy.scaling.autoscaler import Autoscaler
    from deploy.scaling.command_fleet import CommandFleet
    from deploy.scaling.keeper import read_reports, say
    from edge_agent.engine.client import BrokerClient

    settings = ScalingSettings(*worker_range, cool_down_s, idle_s)
    stopped = threading.Event()
    handle_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), lambda *_: stopped.set())
    keys = load_client_keys(connection.key, connection.broker_key)
    with contextlib.ExitStack() as stack:
        # of each broker of its own: every one knows only what goes through it
        clients = [BrokerClient([one], STATUS_LIMIT_S, keys) for one in connection.endpoints()]
        for client in clients:
            stack.callback(client.close)
        fleet = stack.enter_context(CommandFleet(command))
        scaler = Autoscaler(fleet, ScalingPolicy(settings), lambda: read_reports(clients))
        click.echo(f"keeping {settings.least} to {settings.most} workers; Ctrl-C drains them")
        while not stopped.wait(LOOK_S):
            now = time.monotonic()
            say(fleet.look_after(now) + scaler.step(now))
        say(["draining …"])
    say(["stopped"])
