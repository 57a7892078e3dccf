"""`midspan worker`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cloud_worker.options import Bounds, Models, bound_options, model_options
from cloud_worker.start_times import StartTimes
from common.adapters.choice import parse_choices
from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.options import (
    INT8,
    Logs,
    broker_option,
    calibration_option,
    device_option,
    dtype_option,
    key_options,
    log_options,
    metrics_option,
    open_page,
    spin_option,
    threads_option,
    weights_option,
)
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.security.keys import load_client_keys, read_pair
from common.settings import HEARTBEAT_S, REDIS_PORT, REDIS_URL, WORKER_ENDPOINT, parse_endpoint

if TYPE_CHECKING:
    from cloud_worker.loop.worker import Worker

log = logging.getLogger("midspan.worker")


@click.command()
@model_options
@broker_option(WORKER_ENDPOINT)
@click.option(
    "--redis-url",
    envvar=REDIS_URL,
    show_envvar=True,
    default=f"redis://127.0.0.1:{REDIS_PORT}/0",
    show_default=True,
    help="Redis that keeps KV; of a cluster some nodes: redis://A:6379,B:6379. A password is "
    "better given in the variable: `ps` shows arguments.",
)
@neuron_options
@calibration_option
@dtype_option
@weights_option
@device_option
@threads_option
@bound_options
@click.option(
    "--heartbeat-ms",
    default=round(HEARTBEAT_S * 1000),
    show_default=True,
    type=click.IntRange(10, 3_600_000),
    help="Between two signs of life to the broker.",
)
@spin_option
@key_options
@click.option(
    "--pool-key",
    "pool_secret",
    type=click.Path(path_type=Path),
    help="The pool's .key_secret: opens the keys of sessions with --encrypt-kv.",
)
@click.option("--id", "worker_id", default="", help="Name in tables and logs.  [default: random]")
@metrics_option
@log_options
def worker(
    models: Models,
    brokers: tuple[str, ...],
    redis_url: str,
    neurons: NeuronOptions,
    calibration: Path | None,
    dtype: str,
    weights: str | None,
    device: str,
    threads: int | None,
    bounds: Bounds,
    heartbeat_ms: int,
    spin_us: int,
    key: Path | None,
    broker_key: str | None,
    pool_secret: Path | None,
    worker_id: str,
    metrics: str | None,
    logs: Logs,
) -> None:
    """Run a worker: it computes the middle of models for any session.

    SIGTERM or Ctrl-C drains it: what it has is finished and committed, then it leaves.
    """
    times = StartTimes()
    endpoints = [parse_endpoint(broker, "--broker") for broker in brokers]
    keys = load_client_keys(key, broker_key)
    pool_pair = read_pair(pool_secret) if pool_secret else None
    logs.set_up()
    page = open_page(metrics)
    text_model, image_model = models.find_text_model(), models.find_image_model()
    models.check_loras()
    neurons.check_used(text_model)
    neurons.check_files()
    chosen = neurons.read()
    loras, image_loras = parse_choices(models.loras), parse_choices(models.image_loras)
    set_up_torch(threads, images=image_model is not None)
    from cloud_worker.loop.worker import Worker, WorkerSettings
    from cloud_worker.serving import ServingSettings, load_services
    from cloud_worker.state.redis_store import RedisKvStore

    times.mark("libraries")
    store = RedisKvStore(redis_url, must_answer=False, share_bytes=bounds.edge_store_mb << 20)
    settings = ServingSettings(
        dtype,
        device,
        bounds.max_batch_rows,
        bounds.max_batch_steps,
        bounds.max_batch_images,
        bounds.cache_mb << 20,
        pool_pair,
        bounds.stream_layers,
        loras,
        image_loras,
        models.image_weights,
        chosen,
        weights == INT8,
    )
    makers = load_services(
        text_model,
        models.span_text,
        calibration,
        image_model,
        models.image_parts,
        store,
        settings,
    )
    server = Worker(
        store,
        lambda outbox: [make(outbox) for make in makers],
        WorkerSettings(endpoints, bounds.capacity, heartbeat_ms / 1000, keys, spin_us / 1e6),
        worker_id,
        on_ready=lambda broker: say_ready(server, broker, times),
        metrics=page,
    )
    freeze_loaded_objects()
    times.mark("models")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.request_drain())
    server.run()
    log.info("worker %s left", server.worker_id)


def say_ready(server: Worker, broker: str, times: StartTimes) -> None:
    """A broker has taken its announcement."""
    click.echo(f"worker {server.worker_id} ready: {server.serving} at {broker}")
    times.mark("proof and announcement")
    log.info("started in %s", times)
