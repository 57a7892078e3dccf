"""Options of `midspan worker` that belong together: what it serves, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from common.adapters.choice import check_used, check_weights
from common.console.option_types import COUNT
from common.console.options import (
    group_options,
    image_lora_option,
    image_model_option,
    image_part_option,
    image_weights_option,
    lora_option,
    span_option,
)


@dataclass(frozen=True, slots=True)
class Models:
    """What to serve: the demo models, if none is named."""

    model_name: str | None
    span_text: str | None
    image_model: str | None
    image_parts: tuple[str, ...]
    loras: tuple[str, ...]
    image_loras: tuple[str, ...]
    image_weights: Path | None

    def find_text_model(self) -> Path | None:
        """Raises CheckpointError."""
        from common.weights.demo_model import DEMO_TEXT_MODEL

        return self._find(self.model_name, DEMO_TEXT_MODEL)

    def find_image_model(self) -> Path | None:
        """Raises CheckpointError."""
        from common.weights.demo_model import DEMO_IMAGE_MODEL

        return self._find(self.image_model, DEMO_IMAGE_MODEL)

    def check_loras(self) -> None:
        """Raises SettingsError for those that would change nothing."""
        if self.model_name is not None or self.image_model is not None:
            check_used(self.loras, self.model_name, "--lora", "--model")
            check_used(self.image_loras, self.image_model, "--image-lora", "--image-model")
        check_weights(self.image_weights, self.image_model)

    def _find(self, name: str | None, demo: str) -> Path | None:
        from common.weights.demo_model import find_model

        if self.model_name is None and self.image_model is None:
            name = demo
        return find_model(name) if name is not None else None


model_options = group_options(
    "models",
    Models,
    click.option(
        "--model",
        "model_name",
        help="Language model: a Hugging Face directory.  [default: both demo models]",
    ),
    span_option("the middle half"),
    image_model_option,
    image_part_option(
        "image_parts",
        multiple=True,
        default=["unet", "inner"],
        more="; repeat it for both, inner alone reads the inner blocks only.",
    ),
    lora_option,
    image_lora_option,
    image_weights_option,
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a worker takes on at once, and what it keeps."""

    max_batch_rows: int
    max_batch_steps: int
    max_batch_images: int
    capacity: int  # steps
    cache_mb: int
    edge_store_mb: int
    stream_layers: int | None


bound_options = group_options(
    "bounds",
    Bounds,
    click.option(
        "--max-batch-rows", default=512, show_default=True, type=COUNT, help="Rows of a batch."
    ),
    click.option(
        "--max-batch-steps", default=32, show_default=True, type=COUNT, help="Steps of a batch."
    ),
    click.option(
        "--max-batch-images", default=16, show_default=True, type=COUNT, help="Images of a batch."
    ),
    click.option(
        "--capacity",
        default=64,
        show_default=True,
        type=COUNT,
        help="Steps in flight here at once.",
    ),
    click.option(
        "--cache-mb",
        default=1024,
        show_default=True,
        type=click.IntRange(0, 1 << 24),
        help="Bound of what is kept warm, in all services together.",
    ),
    click.option(
        "--edge-store-mb",
        default=2048,
        show_default=True,
        type=click.IntRange(1, 1 << 24),
        help="What one edge's sessions may take in Redis; others are recomputed when a worker "
        "dies.",
    ),
    click.option(
        "--stream-layers",
        type=click.IntRange(2),
        metavar="K",
        help="Keep K layers of the language model in memory, and read the others from its files "
        "when their turn comes: for a span larger than memory.",
    ),
)
