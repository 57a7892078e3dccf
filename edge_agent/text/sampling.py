"""How tokens are to be drawn: what may be asked for, and what a checkpoint has by default.

Nothing here needs torch: a command checks what was typed before it loads anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TypeVar

from common.errors import CheckpointError, SettingsError
from common.weights.model_files import read_json

Number = TypeVar("Number", int, float)
# beyond these, logits of float32 become infinite or all the same
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
MAX_PENALTY = 1e4
BAN = -100.0  # a bias that keeps a token out, whatever its logit is


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to choose tokens; temperature 0 is greedy. Raises SettingsError for bad values."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0  # of the likeliest token's probability; 0: all
    typical_p: float = 1.0  # of the tokens that surprise about as much as is to be expected; 1: all
    repetition_penalty: float = 1.0  # divides the logits of all tokens in the text, as CTRL's
    presence_penalty: float = 0.0  # taken from the logits of tokens that were generated
    frequency_penalty: float = 0.0  # likewise, as often as they were
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id to what is added
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature and not MIN_TEMPERATURE <= self.temperature <= MAX_TEMPERATURE:
            raise SettingsError(
                f"temperature is {self.temperature}; expected 0, which is greedy, or "
                f"{MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
            )
        if self.top_k < 0:
            raise SettingsError(f"top-k is {self.top_k}; expected 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top-p is {self.top_p}; expected more than 0, at most 1")
        if not 0 <= self.min_p <= 1:
            raise SettingsError(f"min-p is {self.min_p}; expected 0 (all) to 1")
        if not 0 < self.typical_p <= 1:
            raise SettingsError(f"typical-p is {self.typical_p}; expected more than 0, at most 1")
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise SettingsError(
                f"repetition penalty is {self.repetition_penalty}; expected more than 0, "
                f"{1 / MAX_PENALTY:g} to {MAX_PENALTY:g}"
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not -MAX_PENALTY <= (value := getattr(self, name)) <= MAX_PENALTY:
                words = name.replace("_", " ")
                raise SettingsError(
                    f"{words} is {value}; expected {-MAX_PENALTY:g} to {MAX_PENALTY:g}"
                )
        for token_id, bias in self.logit_bias.items():
            if token_id < 0 or not BAN <= bias <= -BAN:
                raise SettingsError(
                    f"logit bias of token {token_id} is {bias}; expected {BAN:g} to {-BAN:g} for "
                    "the number of a token"
                )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"the seed is {self.seed}; expected 64 bits")


def either(asked: Number | None, default: Number) -> Number:
    """What was asked for, or else the default."""
    return default if asked is None else asked


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What generation_config.json says; temperature is None where it says none.

    `draws` is its `do_sample`. transformers takes the likeliest token unless that is true.
    """

    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    draws: bool | None = None

    @property
    def command_temperature(self) -> float:
        """Where a command says none, as transformers has it."""
        return either(self.temperature, 1.0) if self.draws else 0.0

    @property
    def openai_temperature(self) -> float:
        """Where a request says none: OpenAI's 1, unless the checkpoint has another, or none."""
        return 0.0 if self.draws is False else either(self.temperature, 1.0)


def read_defaults(directory: Path) -> SamplingDefaults:
    """Of generation_config.json, if there is one. Raises CheckpointError for what is no number."""
    path = directory / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    names = [field.name for field in fields(SamplingDefaults) if field.name != "draws"]
    given = {name: config[name] for name in names if config.get(name) is not None}
    if any(type(value) not in (int, float) for value in given.values()):
        raise CheckpointError(f"{path} has {given}; expected numbers")
    draws = config.get("do_sample")
    if draws is not None and not isinstance(draws, bool):
        raise CheckpointError(f"{path} has do_sample {draws!r}; expected true or false")
    defaults = SamplingDefaults(**given, draws=draws)
    try:
        SamplingSettings(
            defaults.openai_temperature, defaults.top_k, defaults.top_p, defaults.min_p,
            defaults.typical_p, defaults.repetition_penalty,
        )  # fmt: skip
    except SettingsError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return defaults
