"""Which LoRA, and how much of it: what a command line says, before anything is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.console.inputs import check_file
from common.errors import SettingsError

MAX_SCALE = 1000


@dataclass(frozen=True, slots=True)
class LoraChoice:
    """A file or folder, and what its changes are multiplied with."""

    path: Path
    scale: float = 1.0

    def to_words(self) -> list[str]:
        """The option that says this."""
        return ["--lora", f"{self.path}@{self.scale:g}" if self.scale != 1 else str(self.path)]


def parse_choices(texts: Iterable[str]) -> tuple[LoraChoice, ...]:
    """Raises SettingsError."""
    return tuple(parse_choice(text) for text in texts)


def check_used(loras: Iterable[str], model: object, option: str, needed: str) -> None:
    """Raises SettingsError for LoRAs of a model that is not there."""
    if list(loras) and model is None:
        raise SettingsError(f"{option} changes a model that is not served here; name it: {needed}")


def check_weights(weights: Path | None, model: object) -> None:
    """Raises SettingsError for a file of weights that is not there, or without a configuration."""
    if weights is None:
        return
    if model is None:
        raise SettingsError(
            "--image-weights has weights only; give --image-model, a directory in diffusers format "
            "with configurations and tokenizers"
        )
    check_file(weights, "--image-weights")


def parse_choice(text: str) -> LoraChoice:
    """`PATH` or `PATH@SCALE`. Raises SettingsError."""
    path, at, number = text.rpartition("@")
    if not at or Path(text).expanduser().exists():
        return LoraChoice(_check_exists(text))
    try:
        scale = float(number)
    except ValueError:
        return LoraChoice(_check_exists(text))
    if not math.isfinite(scale) or abs(scale) > MAX_SCALE:
        raise SettingsError(f"the LoRA {text!r} has scale {number}; at most {MAX_SCALE}")
    return LoraChoice(_check_exists(path), scale)


def _check_exists(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.exists():
        raise SettingsError(f"the LoRA {text!r} does not exist; expected PATH or PATH@SCALE")
    return path
