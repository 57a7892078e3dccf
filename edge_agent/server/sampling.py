"""How tokens are drawn: what a request says, else the checkpoint, else OpenAI's defaults."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from common.errors import CheckpointError, SettingsError
from common.weights.model_files import read_json
from edge_agent.server.schema import Sampled
from edge_agent.text.sampler import MIN_TEMPERATURE, SamplingSettings

LEAST_TOP_P = 1e-6  # 0 is the likeliest token alone
SEEDS = 1 << 64
Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Where a request says nothing. OpenAI's, unless the checkpoint has its own."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def settings(self, request: Sampled, choice: int) -> SamplingSettings:
        """For one choice of a request. Raises SettingsError."""
        temperature = _either(request.temperature, self.temperature)
        return SamplingSettings(
            temperature=temperature if temperature >= MIN_TEMPERATURE else 0.0,
            top_k=_either(request.top_k, self.top_k),
            top_p=max(LEAST_TOP_P, _either(request.top_p, self.top_p)),
            repetition_penalty=_either(request.repetition_penalty, self.repetition_penalty),
            presence_penalty=request.presence_penalty or 0.0,
            frequency_penalty=request.frequency_penalty or 0.0,
            logit_bias=request.logit_bias or {},
            seed=None if request.seed is None else (request.seed + choice) % SEEDS,
        )


def _either(asked: Number | None, default: Number) -> Number:
    return default if asked is None else asked


def read_defaults(directory: Path) -> SamplingDefaults:
    """Of generation_config.json, if there is one. Raises CheckpointError for what is no number."""
    path = directory / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    names = [field.name for field in fields(SamplingDefaults)]
    given = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("do_sample") is False:
        given["temperature"] = 0.0
    if any(type(value) not in (int, float) for value in given.values()):
        raise CheckpointError(f"{path} has {given}; expected numbers")
    defaults = SamplingDefaults(**given)
    try:
        defaults.settings(Sampled(), 0)
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults
