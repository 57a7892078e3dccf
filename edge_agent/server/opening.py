"""Everything that an endpoint needs, put together: model ends, one engine, pictures, figures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.adapters.choice import LoraChoice
from common.codecs.calibration import Calibration
from common.codecs.codec import make_codec
from common.codecs.spec import AUTO
from common.security.keys import ClientKeys
from edge_agent.engine.client import BrokerClient
from edge_agent.engine.engine import MAX_SESSIONS, MAX_WAITING, Engine
from edge_agent.server.app import Services
from edge_agent.server.images import ImageService
from edge_agent.server.metrics import Metrics
from edge_agent.server.pool_view import PoolView
from edge_agent.server.text_service import TextService
from edge_agent.text.drafting.drafter import DrafterSource
from edge_agent.text.ends import ModelEnds
from edge_agent.text.sampling import read_defaults
from edge_agent.text.session_settings import SessionSettings, settle
from edge_agent.text.tokenizer import TextTokenizer

KEEP = 16  # conversations between turns


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one endpoint: answers at once, answers that wait, conversations between turns."""

    max_sessions: int = MAX_SESSIONS
    max_waiting: int = MAX_WAITING
    keep: int = KEEP


@dataclass(frozen=True, slots=True)
class PoolAccess:
    """Where the brokers are, and what shows them who asks."""

    brokers: Sequence[str]
    keys: ClientKeys | None = None
    timeout_s: float = 60.0
    pool_key: bytes | None = None

    def connect(self) -> BrokerClient:
        return BrokerClient(self.brokers, self.timeout_s, self.keys)


def open_services(
    ends: ModelEnds,
    pool: PoolAccess,
    session: SessionSettings,
    *,
    bounds: Bounds | None = None,
    calibration: Calibration | None = None,
    choose_cut: Callable[[], ModelEnds] | None = None,
    drafters: DrafterSource | None = None,
    template: str | None = None,
    image_model: Path | None = None,
    image_loras: Sequence[LoraChoice] = (),
    image_weights: Path | None = None,
    api_keys: Sequence[str] = (),
) -> Services:
    """What `make_app` is given; `close` it. Raises CheckpointError and SettingsError."""
    bounds = bounds or Bounds()
    metrics = Metrics()
    tokenizer = TextTokenizer(ends.directory)
    defaults = read_defaults(ends.directory)
    engine = Engine(
        ends, pool.brokers, session, keys=pool.keys, timeout_s=pool.timeout_s,
        calibration=calibration, pool_key=pool.pool_key,
        max_sessions=bounds.max_sessions, max_waiting=bounds.max_waiting, choose_cut=choose_cut,
        drafters=drafters,
    )  # fmt: skip
    text = TextService(
        ends, tokenizer, engine, defaults, metrics,
        template=template, keep=bounds.keep,
        most_answers=bounds.max_sessions + bounds.max_waiting,
    )  # fmt: skip
    images = None
    if image_model is not None:
        images = ImageService(
            image_model,
            pool.connect,
            metrics,
            timeout_s=pool.timeout_s,
            pool_key=pool.pool_key,
            loras=image_loras,
            weights=image_weights,
        )
        metrics.watch("midspan_image_jobs", "Requests, the running one too.", lambda: images.jobs)
    for index, state in enumerate(("running", "waiting")):
        metrics.watch(
            f"midspan_answers_{state}",
            f"Answers that are {state}.",
            functools.partial(_count_answers, engine, index),
        )
    metrics.watch("midspan_kept_conversations", "Between turns or in one.", text.kept.__len__)
    description = describe_model(ends, session, calibration) | {
        "image_model": images.name if images is not None else None,
        "has_chat_template": template is not None or tokenizer.has_chat_template,
    }
    return Services(text, images, PoolView(pool.connect), metrics, description, api_keys)


def _count_answers(engine: Engine, index: int) -> int:
    return engine.count_answers()[index]


def describe_model(
    ends: ModelEnds, session: SessionSettings, calibration: Calibration | None
) -> dict[str, Any]:
    """What a page shows of the model and of what is sent."""
    session = settle(session, ends)
    widths = {"up": ends.hidden, "down": ends.reply_width}
    codecs = session.codec_by_step
    return {
        "model": ends.name,
        "fingerprint": ends.fingerprint,
        "cut": str(ends.cut),
        "layers": ends.layers,
        "hidden": ends.hidden,
        "context": ends.context,
        "vocabulary": ends.vocabulary,
        "codecs": codecs,
        "bits": {
            way: count_bits(
                name, way.rpartition("_")[2], widths[way.rpartition("_")[2]], calibration
            )
            for way, name in codecs.items()
        },
    }


def count_bits(
    name: str, direction: str, hidden: int, calibration: Calibration | None
) -> float | None:
    """Bits per value of one row on the wire; None where that depends on rows or the link."""
    if name == AUTO:
        return None
    codec = make_codec(name, direction, calibration)
    if codec.spec.kind == "fisher" or codec.spec.zstd:
        return None
    row = torch.zeros(1, hidden)
    body = codec.encode(row, row if codec.needs_uplink else None)
    return round(8 * len(body) / hidden, 3)
