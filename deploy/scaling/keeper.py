"""Look after a pool of this machine: its dead are replaced, and there are as many as needed."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator

import click

from common.errors import BrokerUnavailable, MidspanError
from deploy.pool import LocalPool, PoolSettings
from deploy.scaling.autoscaler import Autoscaler, Report
from deploy.scaling.policy import ScalingPolicy, ScalingSettings
from edge_agent.engine.client import BrokerClient

log = logging.getLogger("midspan.pool")
LOOK_S = 0.5
HOLD_S = 120  # for which steps wait where there may be no worker at all
STATUS_LIMIT_S = 1.0


def hold_options(least: int) -> list[str]:
    """What a broker is told whose pool may shrink to `least` workers."""
    return ["--hold", str(HOLD_S)] if least == 0 else []


def keep(pool: LocalPool, settings: ScalingSettings, is_over: threading.Event) -> None:
    """Until `is_over`; says what it does. Raises ProcessFailed when that does not help."""
    with open_scaler(pool, settings) as scaler:
        while not is_over.wait(LOOK_S):
            lines = pool.heal()
            if scaler is not None:
                lines += scaler.step(time.monotonic())
            say(lines)


@contextlib.contextmanager
def open_scaler(pool: LocalPool, settings: ScalingSettings) -> Iterator[Autoscaler | None]:
    """What has a pool grow and shrink, with a connection of its own; None where it may not."""
    if settings.most == settings.least:
        yield None
        return
    with contextlib.closing(pool.connect()) as client:
        yield Autoscaler(pool, ScalingPolicy(settings), lambda: read_reports([client]))


def say(lines: list[str]) -> None:
    """Whoever read this may have gone: that is no reason to let a pool down."""
    with contextlib.suppress(OSError):
        for line in lines:
            click.echo(line)


@contextlib.contextmanager
def kept_pool(settings: PoolSettings, scaling: ScalingSettings) -> Iterator[LocalPool]:
    """A pool that is looked after by a thread. When that does not help, this process is ended."""
    several = "s" * (settings.workers > 1)
    click.echo(f"starting a broker and {settings.workers} worker{several} …")
    with LocalPool(settings) as pool:
        is_over = threading.Event()
        keeping = threading.Thread(target=_keep_or_end, args=(pool, scaling, is_over), name="keep")
        keeping.start()
        try:
            yield pool
        finally:
            is_over.set()
            keeping.join()


def _keep_or_end(pool: LocalPool, scaling: ScalingSettings, is_over: threading.Event) -> None:
    try:
        keep(pool, scaling, is_over)
    except Exception as error:
        if not isinstance(error, MidspanError):
            log.exception("the pool cannot be looked after")
        with contextlib.suppress(OSError):
            click.echo(f"Error: {error}", err=True)
        os.kill(os.getpid(), signal.SIGTERM)


def read_reports(clients: list[BrokerClient]) -> list[Report]:
    """Of the brokers that answer."""
    reports = []
    for client in clients:
        with contextlib.suppress(BrokerUnavailable):
            reports.append(client.status(STATUS_LIMIT_S))
    return reports
