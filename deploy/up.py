"""`midspan up`: a pool on this machine until Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import click

from common.console.option_types import THREADS
from common.console.options import (
    calibration_option,
    dtype_option,
    image_model_option,
    insecure_option,
)
from common.settings import EDGE_ENDPOINT, REDIS_PORT, REDIS_URL, WORKER_ENDPOINT, parse_endpoint
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL


@click.command()
@click.option("--workers", default=2, show_default=True, type=click.IntRange(1, 1000))
@click.option("--model", help="Hugging Face directory.  [default: both demo models]")
@image_model_option
@click.option("--span", help="Layers the workers serve, as a-b.  [default: the middle half]")
@calibration_option
@dtype_option
@click.option("--threads", type=THREADS, help="Of each worker.  [default: cores / N]")
@click.option(
    "--redis-url",
    envvar=REDIS_URL,
    show_envvar=True,
    help="A server of yours.  [default: an embedded one]",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="Admit only authorized keys (midspan keys); what is missing in there is made.",
)
@insecure_option
@click.option("--edges", default=EDGE_ENDPOINT, show_default=True)
@click.option("--worker-endpoint", default=WORKER_ENDPOINT, show_default=True)
def up(
    workers: int,
    model: str | None,
    image_model: str | None,
    span: str | None,
    calibration: Path | None,
    dtype: str,
    threads: int | None,
    redis_url: str | None,
    keys: Path | None,
    insecure: bool,
    edges: str,
    worker_endpoint: str,
) -> None:
    """Start Redis, a broker and N workers here; Ctrl-C drains and stops them.

    What dies in between is started again.
    """
    from deploy.embedded_redis import choose_port
    from deploy.hints import describe_pool, hide_password
    from deploy.pool import LocalPool, PoolSettings

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, lambda *_: stopped.set())
    if model is None and image_model is None:
        model, image_model = DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL
    settings = PoolSettings(
        workers=workers,
        model=model,
        image_model=image_model,
        span=span,
        dtype=dtype,
        threads=threads or max(1, (os.cpu_count() or 1) // workers),
        redis_url=redis_url,
        # keys are for those who do not trust everybody here: then Redis has no port, either
        redis_port=choose_port(REDIS_PORT) if redis_url is None and keys is None else None,
        keys=keys.expanduser() if keys else None,
        broker_options=["--insecure"] if insecure else [],
        calibration=calibration,
        edge_endpoint=parse_endpoint(edges, "--edges"),
        worker_endpoint=parse_endpoint(worker_endpoint, "--worker-endpoint"),
    )
    store = hide_password(redis_url) if redis_url else "an embedded Redis"
    click.echo(f"starting a broker and {workers} worker{'s' * (workers > 1)}, with {store} …")
    with LocalPool(settings) as pool:
        for line in describe_pool(pool):
            click.echo(line)
        click.echo("Ctrl-C stops")
        while not stopped.wait(0.5):
            for line in pool.heal():
                click.echo(line)
        click.echo("draining …")
    click.echo("stopped")
