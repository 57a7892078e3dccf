"""Load models and make the services of a worker from them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cloud_worker.image.executor import ImageExecutor
from cloud_worker.image.service import ImageService
from cloud_worker.loop.batcher import Batcher
from cloud_worker.loop.outbox import Outbox
from cloud_worker.loop.stage_service import StageService
from cloud_worker.state.stage_cache import CacheBudget
from cloud_worker.state.store import KvStore
from cloud_worker.text.executor import TextExecutor
from cloud_worker.text.service import TextService
from common.adapters.choice import LoraChoice
from common.adapters.peft import adapt_text_model
from common.codecs.calibration import open_calibration
from common.errors import SettingsError
from common.neurons.settings import NeuronSettings
from common.protocol.messages import Service
from common.security.keys import KeyPair
from common.spans.cut import parse_span
from common.spans.parts import name_span
from common.spans.twin_check import check_twin
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import context_length, read_config
from common.weights.loading import check_device, load_span, parse_dtype

log = logging.getLogger("midspan.worker")

ServiceMaker = Callable[[Outbox], StageService[Any]]


@dataclass(frozen=True, slots=True)
class ServingSettings:
    """How models are loaded, and what bounds their batches and caches."""

    dtype: str = "float32"
    device: str = "cpu"
    max_batch_rows: int = 512
    max_batch_steps: int = 32
    max_batch_images: int = 16
    cache_bytes: int = 1 << 30  # of all services of a worker together
    pool_key: KeyPair | None = None  # opens the keys of sessions that are encrypted at rest
    resident_layers: int | None = None  # of a language model, in memory at once; None: all
    loras: Sequence[LoraChoice] = ()
    image_loras: Sequence[LoraChoice] = ()
    image_weights: Path | None = None  # a file instead of those in the model's directory
    neurons: NeuronSettings | None = None  # of a language model: which are loaded; None: all
    in_8_bits: bool = False  # weights of a language model's linear layers

    @property
    def text_precision(self) -> str:
        """Sessions stay where they are computed alike."""
        return f"{self.dtype}+int8" if self.in_8_bits else self.dtype


def load_services(
    text_model: Path | None,
    span_text: str | None,
    calibration: Path | None,
    image_model: Path | None,
    image_parts: Sequence[str],
    store: KvStore,
    settings: ServingSettings,
) -> list[ServiceMaker]:
    """Load what a worker serves; its services have one bound on what they keep warm.

    Raises CheckpointError or SettingsError.
    """
    if text_model is None and settings.in_8_bits:
        raise SettingsError("--weights int8 is for language models, and none is served here")
    if text_model is None and settings.resident_layers is not None:
        raise SettingsError("--stream-layers is for language models, and none is served here")
    parts = list(dict.fromkeys(image_parts)) if image_model is not None else []
    budget = CacheBudget(settings.cache_bytes)
    makers = []
    if text_model is not None:
        makers.append(
            load_text_service(text_model, span_text, calibration, store, settings, budget)
        )
    if image_model is not None:
        makers += load_image_services(image_model, parts, store, settings, budget)
    return makers


def load_text_service(
    directory: Path,
    span_text: str | None,
    calibration: Path | None,
    store: KvStore,
    settings: ServingSettings,
    budget: CacheBudget,
) -> ServiceMaker:
    """Load a span of a language model. Raises CheckpointError or SettingsError."""
    checkpoint = Checkpoint(directory)
    adapt_text_model(checkpoint, settings.loras)
    checkpoint.choose(settings.neurons)
    config = read_config(checkpoint)
    if span_text is None and checkpoint.parts is not None:
        span_text = name_span(checkpoint.parts.only_span(config.num_hidden_layers))
    span = parse_span(span_text, config.num_hidden_layers)
    dtype, device = parse_dtype(settings.dtype), check_device(settings.device)
    packs = check_twin(config)
    model = load_span(
        checkpoint, span, dtype, device, "tail" if span.with_end else "middle",
        packs=packs, resident=settings.resident_layers, in_8_bits=settings.in_8_bits,
    )  # fmt: skip
    service = Service(
        checkpoint.fingerprint(), checkpoint.name, str(span), model.hidden, settings.text_precision
    )
    known = open_calibration(
        calibration, checkpoint.directory, service.model, (span.first, span.last)
    )
    checkpoint.close()
    megabytes = sum(model.bytes_read.values()) / 1e6
    log.info(
        "loaded %s span %s: %d tensors, %.1f MB%s",
        service.name, span, len(model.bytes_read), megabytes,
        f"; {len(model.stream)} of {len(span)} layers take turns" if model.stream else "",
    )  # fmt: skip
    if model.neurons is not None:
        log.info(
            "%.1f MB of neurons in %d layers were left out",
            model.neurons.bytes_left_out / 1e6, len(model.neurons.layers),
        )  # fmt: skip
    executor = TextExecutor(model, context_length(config), known)
    return lambda outbox: TextService(
        executor,
        service,
        store,
        outbox,
        batcher=Batcher(settings.max_batch_rows, settings.max_batch_steps, executor.count_rows),
        budget=budget,
        pool_key=settings.pool_key,
    )


def load_image_services(
    directory: Path,
    parts: Sequence[str],
    store: KvStore,
    settings: ServingSettings,
    budget: CacheBudget,
) -> list[ServiceMaker]:
    """Load parts of an SDXL UNet; `inner` alone reads the inner blocks only.

    Raises CheckpointError or SettingsError.
    """
    from common.diffusion.lora import ImageLora
    from common.diffusion.schedulers import read_scheduler_config
    from common.diffusion.shapes import INNER, WHOLE
    from common.diffusion.unet import load_unet, open_unet

    loras = [ImageLora(choice) for choice in settings.image_loras]
    checkpoint = open_unet(directory, loras, settings.image_weights)
    parts = pick_image_parts(checkpoint.config_json, parts)
    widest = WHOLE if WHOLE in parts else INNER
    model = load_unet(
        checkpoint, widest, parse_dtype(settings.dtype), check_device(settings.device)
    )
    fingerprint, name = checkpoint.fingerprint(), checkpoint.name
    checkpoint.close()
    scheduler_config = read_scheduler_config(directory)
    count = sum(parameter.numel() for parameter in model.unet.parameters())
    log.info("loaded %s %s: %.1f M parameters", name, " and ".join(parts), count / 1e6)

    def make(part: str) -> ServiceMaker:
        return lambda outbox: ImageService(
            ImageExecutor(model, part),
            Service(fingerprint, name, part, 0, settings.dtype),
            scheduler_config,
            store,
            outbox,
            max_batch_images=settings.max_batch_images,
            budget=budget,
            pool_key=settings.pool_key,
        )

    return [make(part) for part in parts]


def pick_image_parts(config: dict[str, Any], wanted: Sequence[str]) -> list[str]:
    """Those of the wanted parts that a UNet has: all need not be cut to be computed as a whole."""
    from common.diffusion.shapes import INNER, WHOLE, why_uncut

    reason = why_uncut(config)
    if INNER in wanted and WHOLE in wanted and reason:
        log.warning("%s: it cannot be cut, so only %s is served", reason, WHOLE)
        return [WHOLE]
    return list(wanted)
