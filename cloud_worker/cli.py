"""`midspan worker`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import click

from common.console.log_lines import set_up_logging
from common.console.option_types import COUNT, THREADS
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.security.keys import load_client_keys, read_pair
from common.settings import HEARTBEAT_S, REDIS_PORT, REDIS_URL, WORKER_ENDPOINT, parse_endpoint

log = logging.getLogger("midspan.worker")


@click.command()
@click.option(
    "--model",
    "model_name",
    help="Language model: a Hugging Face directory.  [default: the demo models, if none is named]",
)
@click.option("--span", "span_text", help="Layers to serve, as a-b.  [default: the middle half]")
@click.option(
    "--image-model",
    help="SDXL pipeline: a directory in diffusers format.",
)
@click.option(
    "--image-part",
    "image_parts",
    multiple=True,
    type=click.Choice(["unet", "inner"]),
    default=["unet", "inner"],
    show_default=True,
    help="What to serve of it; inner alone reads the inner blocks only.",
)
@click.option(
    "--broker",
    "brokers",
    multiple=True,
    default=[WORKER_ENDPOINT],
    show_default=True,
    help="A broker's address for workers; repeat it for several.",
)
@click.option(
    "--redis-url",
    envvar=REDIS_URL,
    show_envvar=True,
    default=f"redis://127.0.0.1:{REDIS_PORT}/0",
    show_default=True,
    help="Where KV is kept. A password is better given in the variable: `ps` shows arguments.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="For calibrated codecs.  [default: the one in the model directory]",
)
@click.option("--dtype", default="float32", show_default=True, help="float32, float16 or bfloat16.")
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, …")
@click.option("--threads", type=THREADS, help="torch threads.  [default: all cores]")
@click.option("--max-batch-rows", default=512, show_default=True, type=COUNT)
@click.option("--max-batch-steps", default=32, show_default=True, type=COUNT)
@click.option("--max-batch-images", default=16, show_default=True, type=COUNT)
@click.option(
    "--capacity", default=64, show_default=True, type=COUNT, help="Steps in flight here at once."
)
@click.option(
    "--cache-mb",
    default=1024,
    show_default=True,
    type=click.IntRange(0, 1 << 24),
    help="Bound of what is kept warm, in all services together.",
)
@click.option(
    "--edge-store-mb",
    default=2048,
    show_default=True,
    type=click.IntRange(1, 1 << 24),
    help="What one edge's sessions may take in Redis; others are recomputed when a worker dies.",
)
@click.option(
    "--heartbeat-ms",
    default=round(HEARTBEAT_S * 1000),
    show_default=True,
    type=click.IntRange(10, 3_600_000),
)
@click.option("--key", type=click.Path(path_type=Path), help="This worker's .key_secret.")
@click.option("--broker-key", help="The broker's public key: its .key file, or the text.")
@click.option(
    "--pool-key",
    type=click.Path(path_type=Path),
    help="The pool's .key_secret: opens the keys of sessions with --encrypt-kv.",
)
@click.option("--id", "worker_id", default="", help="Name in tables and logs.  [default: random]")
@click.option("--verbose", is_flag=True, help="Log more.")
def worker(
    model_name: str | None,
    span_text: str | None,
    image_model: str | None,
    image_parts: tuple[str, ...],
    brokers: tuple[str, ...],
    redis_url: str,
    calibration: Path | None,
    dtype: str,
    device: str,
    threads: int | None,
    max_batch_rows: int,
    max_batch_steps: int,
    max_batch_images: int,
    capacity: int,
    cache_mb: int,
    edge_store_mb: int,
    heartbeat_ms: int,
    key: Path | None,
    broker_key: str | None,
    pool_key: Path | None,
    worker_id: str,
    verbose: bool,
) -> None:
    """Run a worker: it computes the middle of models for any session.

    SIGTERM or Ctrl-C drains it: what it has is finished and committed, then it leaves.
    """
    endpoints = [parse_endpoint(broker, "--broker") for broker in brokers]
    keys = load_client_keys(key, broker_key)
    pool_pair = read_pair(pool_key) if pool_key else None
    set_up_logging(verbose)
    set_up_torch(threads)
    from cloud_worker.loop.worker import Worker, WorkerSettings
    from cloud_worker.serving import ServingSettings, load_services
    from cloud_worker.state.redis_store import RedisKvStore
    from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL, find_model

    if model_name is None and image_model is None:
        model_name, image_model = DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL
    store = RedisKvStore(redis_url, must_answer=False, share_bytes=edge_store_mb << 20)
    settings = ServingSettings(
        dtype, device, max_batch_rows, max_batch_steps, max_batch_images, cache_mb << 20, pool_pair
    )
    makers = load_services(
        find_model(model_name) if model_name is not None else None,
        span_text,
        calibration,
        find_model(image_model) if image_model is not None else None,
        image_parts,
        store,
        settings,
    )
    server = Worker(
        store,
        lambda outbox: [make(outbox) for make in makers],
        WorkerSettings(endpoints, capacity, heartbeat_ms / 1000, keys),
        worker_id,
        on_ready=lambda broker: click.echo(
            f"worker {server.worker_id} ready: {server.serving} at {broker}"
        ),
    )
    freeze_loaded_objects()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.request_drain())
    server.run()
    log.info("worker %s left", server.worker_id)
