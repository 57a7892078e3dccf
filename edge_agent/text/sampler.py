"""Pick the next token from logits, with transformers' own logits processors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.errors import NonFiniteError, SettingsError
from edge_agent.text.ends import Scores

# beyond these, logits of float32 become infinite or all the same
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
MAX_PENALTY = 1e4


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to choose tokens; temperature 0 is greedy. Raises SettingsError for bad values."""

    temperature: float = 0.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    repetition_penalty: float = 1.0
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
        if not 1 / MAX_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            raise SettingsError(
                f"repetition penalty is {self.repetition_penalty}; expected more than 0, "
                f"{1 / MAX_PENALTY:g} to {MAX_PENALTY:g}"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise SettingsError(f"the seed is {self.seed}; expected 64 bits")


class Sampler:
    """Chooses one token after another; with a seed always the same ones."""

    def __init__(self, settings: SamplingSettings) -> None:
        self._greedy = settings.temperature == 0
        self._generator = torch.Generator()
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)
        else:
            self._generator.seed()
        self._processors = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self._greedy:
            if settings.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))

    def choose(self, scores: Scores, token_ids: list[int]) -> int:
        """The next token after `token_ids`. Raises NonFiniteError."""
        if self._greedy and not self._processors and scores.are_finite:
            return scores.best
        return self.pick(scores.logits, token_ids)

    def pick(self, logits: Tensor, token_ids: list[int]) -> int:
        """The next token after `token_ids`, given logits (vocabulary,). Raises NonFiniteError."""
        if not torch.isfinite(logits).all():
            raise NonFiniteError("the model's logits hold NaN or infinity; is the dtype too small?")
        if self._processors:
            logits = self._processors(torch.tensor([token_ids]), logits[None].clone())[0]
        if self._greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
