"""`midspan up`: a pool on this machine until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.adapters.choice import check_used, check_weights, parse_choices
from common.console.neuron_options import NeuronOptions, neuron_options
from common.console.option_types import THREADS, WorkerRange
from common.console.options import (
    calibration_option,
    dtype_option,
    endpoint_options,
    group_options,
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

if TYPE_CHECKING:
    from deploy.pool import PoolSettings


@dataclass(frozen=True, slots=True)
class PoolChoice:
    """What the options said."""

    worker_range: tuple[int, int]
    model: str | None
    image_model: str | None
    loras: tuple[str, ...]
    neurons: NeuronOptions
    image_weights: Path | None
    image_loras: tuple[str, ...]
    span_text: str | None
    calibration: Path | None
    dtype: str
    weights: str | None
    threads: int | None
    redis_url: str | None
    keys: Path | None
    insecure: bool
    spin_us: int
    edge_endpoint: str
    worker_endpoint: str

    def find_models(self) -> tuple[str | None, str | None]:
        """Of language and of images: both demo models if none is named."""
        if self.model is None and self.image_model is None:
            return DEMO_TEXT_MODEL, DEMO_IMAGE_MODEL
        return self.model, self.image_model

    def check(self) -> None:
        """Raises SettingsError."""
        model, image_model = self.find_models()
        check_weights(self.image_weights, image_model)
        check_used(self.loras, model, "--lora", "--model")
        self.neurons.check_used(model)
        self.neurons.read()
        self.neurons.check_files()
        check_used(self.image_loras, image_model, "--image-lora", "--image-model")
        parse_choices((*self.loras, *self.image_loras))

    def read_settings(self) -> PoolSettings:
        """Raises SettingsError for an address that is none."""
        from deploy.embedded_redis import choose_port
        from deploy.pool import PoolSettings
        from deploy.scaling.keeper import hold_options

        least, most = self.worker_range
        model, image_model = self.find_models()
        has_port = self.redis_url is None and self.keys is None
        spinning = ["--spin-us", str(self.spin_us)] if self.spin_us else []
        return PoolSettings(
            workers=least,
            model=model,
            image_model=image_model,
            span=self.span_text,
            dtype=self.dtype,
            threads=self.threads or max(1, (os.cpu_count() or 1) // most),
            redis_url=self.redis_url,
            # keys are for those who do not trust everybody here: then Redis has no port, either
            redis_port=choose_port(REDIS_PORT) if has_port else None,
            keys=self.keys.expanduser() if self.keys else None,
            broker_options=[*["--insecure"] * self.insecure, *hold_options(least), *spinning],
            calibration=self.calibration,
            loras=self.loras,
            neuron_options=self.neurons.to_words(),
            image_loras=self.image_loras,
            image_weights=self.image_weights,
            worker_options=[*(["--weights", self.weights] if self.weights else []), *spinning],
            edge_endpoint=parse_endpoint(self.edge_endpoint, "--edge-endpoint"),
            worker_endpoint=parse_endpoint(self.worker_endpoint, "--worker-endpoint"),
        )


@click.command()
@group_options(
    "choice",
    PoolChoice,
    workers_option(WorkerRange(least=0), default="2", show_default=True),
    click.option(
        "--model",
        help="Language model: a Hugging Face directory.  [default: both demo models]",
    ),
    image_model_option,
    lora_option,
    neuron_options,
    image_weights_option,
    image_lora_option,
    span_option("the middle half"),
    calibration_option,
    dtype_option,
    weights_option,
    click.option(
        "--threads", type=THREADS, help="torch threads, of each worker.  [default: cores / N]"
    ),
    click.option(
        "--redis-url",
        envvar=REDIS_URL,
        show_envvar=True,
        help="Redis that keeps KV: a server of yours, or some nodes of a cluster.  "
        "[default: an embedded one]",
    ),
    click.option(
        "--keys",
        type=click.Path(path_type=Path),
        help="Directory of keys (midspan keys): admit only those that are authorized there; what "
        "is missing is made.",
    ),
    insecure_option,
    spin_option,
    endpoint_options(),
)
def up(choice: PoolChoice) -> None:
    """Start Redis, a broker and N workers here; Ctrl-C drains and stops them.

    What dies in between is started again.
    """
    from deploy.hints import describe_pool, hide_password
    from deploy.pool import LocalPool
    from deploy.scaling.keeper import keep
    from deploy.scaling.policy import ScalingSettings

    stopped, started = threading.Event(), threading.Event()

    def end(*_: object) -> None:
        is_first = not stopped.is_set()
        stopped.set()
        if is_first and not started.is_set():
            raise KeyboardInterrupt  # large models take minutes

    handle_signals((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), end)
    choice.check()
    settings = choice.read_settings()
    least, most = choice.worker_range
    store = hide_password(settings.redis_url) if settings.redis_url else "an embedded Redis"
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
