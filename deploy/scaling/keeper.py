"""Look after a pool of this machine: its dead are replaced, and there are as many as needed."""

from __future__ import annotations

import contextlib
import threading
import time

import click

from common.errors import BrokerUnavailable
from deploy.pool import LocalPool
from deploy.scaling.autoscaler import Autoscaler, Report
from deploy.scaling.policy import ScalingPolicy, ScalingSettings
from edge_agent.engine.client import BrokerClient

LOOK_S = 0.5
HOLD_S = 120  # for which steps wait where there may be no worker at all
STATUS_LIMIT_S = 1.0


def hold_options(least: int) -> list[str]:
    """What a broker is told whose pool may shrink to `least` workers."""
    return ["--hold", str(HOLD_S)] if least == 0 else []


def keep(pool: LocalPool, settings: ScalingSettings, is_over: threading.Event) -> None:
    """Until `is_over`; says what it does. Raises ProcessFailed when that does not help."""
    with contextlib.ExitStack() as stack:
        scaler = None
        if settings.most > settings.least:
            client = pool.connect()
            stack.callback(client.close)
            scaler = Autoscaler(pool, ScalingPolicy(settings), lambda: read_reports([client]))
        while not is_over.wait(LOOK_S):
            lines = pool.heal()
            if scaler is not None:
                lines += scaler.step(time.monotonic())
            for line in lines:
                click.echo(line)


def read_reports(clients: list[BrokerClient]) -> list[Report]:
    """Of the brokers that answer."""
    reports = []
    for client in clients:
        with contextlib.suppress(BrokerUnavailable):
            reports.append(client.status(STATUS_LIMIT_S))
    return reports
