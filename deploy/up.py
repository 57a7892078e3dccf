"""`midspan up`: a pool on this machine until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import click

from common.adapters.choice import check_used, check_weights, parse_choices
from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.option_types import THREADS, WorkerRange
from common.console.options import (
    calibration_option,
    dtype_option,
    endpoint_options,
    image_lora_option,
    image_model_option,
    image_weights_option,
    insecure_option,
    lora_option,
    span_option,
    spin_option,
    weights_option,
    workers_option,
)
from common.console.processes import handle_signals
from common.settings import REDIS_PORT, REDIS_URL, parse_endpoint
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL


@click.command()
@workers_option(WorkerRange(least=0), default="2", show_default=True)
@click.option(
    "--model",
    help="Language model: a Hugging Face directory.  [default: both demo models]",
)
@image_model_option
@lora_option
@neuron_options
@image_weights_option
@image_lora_option
@span_option("the middle half")
@calibration_option
@dtype_option
@weights_option
@click.option(
    "--threads", type=THREADS, help="torch threads, of each worker.  [default: cores / N]"
)
@click.option(
    "--redis-url",
    envvar=REDIS_URL,
    show_envvar=True,
    help="Redis that keeps KV: a server of yours, or some nodes of a cluster.  "
    "[default: an embedded one]",
)
@click.option(
    "--keys",
    type=click.Path(path_type=Path),
    help="Directory of keys (midspan keys): admit only those that are authorized there; what is "
    "missing is made.",
)
@insecure_option
@spin_option
@endpoint_options()
def up(
    worker_range: tuple[int, int],
    model: str | None,
    image_model: str | None,
    loras: tuple[str, ...],
    neurons: NeuronOptions,
    image_weights: Path | None,
    image_loras: tuple[str, ...],
    span_text: str | None,
    calibration: Path | None,
    dtype: str,
    weights: str | None,
    threads: int | None,
    redis_url: str | None,
    keys: Path | None,
    insecure: bool,
    spin_us: int,
    edge_endpoint: str,
    worker_endpoint: str,
) -> None:
    """Start Redis, a broker and N workers here; Ctrl-C drains and stops them.

    What dies in between is started again.
    """
    from deploy.embedded_redis import choose_port
    from deploy.hints import describe_pool, hide_password
    from deploy.pool import LocalPool, PoolSettings
    from deploy.scaling.keeper import hold_options, keep
    from deploy.scaling.policy import ScalingSettings

    least, most = worker_range
    stopped, started = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        is_first = not stopped.is_set()
        stopped.set()
        if is_first and not started.is_set():
            raise KeyboardInterrupt  # large models take minutes

    handle_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), end)
    if model is None and image_model is None:
        model, image_model = DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL
    check_weights(image_weights, image_model)
    check_used(loras, model, "--lora", "--model")
    neurons.check_used(model)
    neurons.read()
    neurons.check_files()
    check_used(image_loras, image_model, "--image-lora", "--image-model")
    parse_choices((*loras, *image_loras))  # complains now, if ever
    spinning = ["--spin-us", str(spin_us)] if spin_us else []
    settings = PoolSettings(
        workers=least,
        model=model,
        image_model=image_model,
        span=span_text,
        dtype=dtype,
        threads=threads or max(1, (os.cpu_count() or 1) // most),
        redis_url=redis_url,
        # keys are for those who do not trust everybody here: then Redis has no port, either
        redis_port=choose_port(REDIS_PORT) if redis_url is None and keys is None else None,
        keys=keys.expanduser() if keys else None,
        broker_options=[*(["--insecure"] if insecure else []), *hold_options(least), *spinning],
        calibration=calibration,
        loras=loras,
        neuron_options=neurons.to_words(),
        image_loras=image_loras,
        image_weights=image_weights,
        worker_options=[*(["--weights", weights] if weights else []), *spinning],
        edge_endpoint=parse_endpoint(edge_endpoint, "--edge-endpoint"),
        worker_endpoint=parse_endpoint(worker_endpoint, "--worker-endpoint"),
    )
    store = hide_password(redis_url) if redis_url else "an embedded Redis"
    workers = f"{least} to {most}" if most > least else str(least)
    click.echo(f"starting a broker and {workers} worker{'s' * (most > 1)}, with {store} …")
    with contextlib.suppress(KeyboardInterrupt), LocalPool(settings) as pool:
        started.set()
        for line in describe_pool(pool):
            click.echo(line)
        click.echo("Ctrl-C stops")
        keep(pool, ScalingSettings(least, most), stopped)
        click.echo("draining …")
    click.echo("stopped")
