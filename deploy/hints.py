"""What `midspan up` says: the commands that meet the pool it has started, ready to be typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from common.security.keys import BROKER
from common.settings import EDGE_ENDPOINT, REDIS_PORT, REDIS_URL, WORKER_ENDPOINT
from common.weights.demo_model import DEMO_IMAGE_MODEL, DEMO_TEXT_MODEL
from deploy.pool import LocalPool, PoolSettings

TEXT = "Once upon a time"
PICTURE = "a red house on a green hill under a blue sky"
DEFAULT_REDIS = f"redis://127.0.0.1:{REDIS_PORT}/0"


def describe_pool(pool: LocalPool) -> list[str]:
    """Lines that say where everything is, and what to type to use it and to add to it."""
    settings = pool.settings
    lines = [
        f"ready: edges at {pool.edge_endpoint}, workers at {pool.worker_endpoint}",
        f"Redis at {hide_password(pool.public_redis_url)}, logs in {pool.directory}",
    ]
    if settings.model is not None:
        lines.append(f"try: {suggest_ask(settings, pool.edge_endpoint)}")
    if settings.image_model is not None:
        lines.append(f"try: {suggest_image(settings, pool.edge_endpoint)}")
    lines.append(
        f"one more worker: {suggest_worker(settings, pool.worker_endpoint, pool.public_redis_url)}"
    )
    return lines


def suggest_ask(settings: PoolSettings, edge_endpoint: str) -> str:
    """The command that asks this pool for a text."""
    options = _unless_default("--model", settings.model, DEMO_TEXT_MODEL)
    options += _lora_options("--lora", settings.loras)
    options += settings.neuron_options
    if settings.span is not None:
        options += ["--span", settings.span]
    if settings.calibration is not None:
        options += ["--calibration", str(settings.calibration), "--codec", "compact"]
    options += _edge_options(settings, edge_endpoint)
    return shlex.join(["midspan", "ask", TEXT, *options, "--stats"])


def suggest_image(settings: PoolSettings, edge_endpoint: str) -> str:
    """The command that asks this pool for a picture."""
    options = _unless_default("--image-model", settings.image_model, DEMO_IMAGE_MODEL)
    options += _lora_options("--image-lora", settings.image_loras)
    options += _unless_default("--image-weights", settings.image_weights, None)
    options += _edge_options(settings, edge_endpoint)
    return shlex.join(["midspan", "image", PICTURE, *options, "--stats"])


def suggest_worker(settings: PoolSettings, worker_endpoint: str, redis_url: str) -> str:
    """The command that adds a worker, which need not say what is the default."""
    options: list[str] = []
    if (settings.model, settings.image_model) != (DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL):
        options += _unless_default("--model", settings.model, None)
        options += _unless_default("--image-model", settings.image_model, None)
    options += _lora_options("--lora", settings.loras)
    options += settings.neuron_options
    options += _lora_options("--image-lora", settings.image_loras)
    options += _unless_default("--image-weights", settings.image_weights, None)
    options += _unless_default("--span", settings.span, None)
    options += _unless_default("--calibration", settings.calibration, None)
    options += _unless_default("--dtype", settings.dtype, "float32")
    options += settings.worker_options
    options += _unless_default("--broker", reachable(worker_endpoint), WORKER_ENDPOINT)
    if settings.keys is not None:
        options += _key_options(settings.keys, "local-worker")
    if "@" in redis_url:
        return f"{REDIS_URL}=… {shlex.join(['midspan', 'worker', *options])}"
    options += _unless_default("--redis-url", redis_url, DEFAULT_REDIS)
    return shlex.join(["midspan", "worker", *options])


def _lora_options(option: str, loras: Sequence[str]) -> list[str]:
    return [word for lora in loras for word in (option, lora)]


def _edge_options(settings: PoolSettings, edge_endpoint: str) -> list[str]:
    options = _unless_default("--broker", reachable(edge_endpoint), EDGE_ENDPOINT)
    if settings.keys is not None:
        options += _key_options(settings.keys, "local-edge")
    return options


def _key_options(keys: Path, name: str) -> list[str]:
    return ["--key", str(keys / f"{name}.key_secret"), "--broker-key", str(keys / f"{BROKER}.key")]


def _unless_default(option: str, value: object, default: object) -> list[str]:
    return [] if value is None or value == default else [option, str(value)]


def reachable(endpoint: str) -> str:
    """An address to connect to on this machine, for one that may be bound to all interfaces."""
    for anywhere in ("tcp://*:", "tcp://0.0.0.0:"):
        if endpoint.startswith(anywhere):
            return f"tcp://127.0.0.1:{endpoint.removeprefix(anywhere)}"
    return endpoint


def hide_password(url: str) -> str:
    """A URL without user and password."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"
