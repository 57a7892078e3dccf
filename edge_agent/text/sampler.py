"""Pick the next token from logits, with transformers' own logits processors.

A library by itself: `write` and `score` want a function from token ids to logits, whatever that
computes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from common.codecs.codec import LEFT_OUT
from common.errors import NonFiniteError, SettingsError
from edge_agent.text.sampling import BAN, SamplingSettings

if TYPE_CHECKING:
    from edge_agent.text.ends import Scores

Forward: TypeAlias = Callable[[Tensor], Tensor]  # ids (B, T) to logits (B, T, vocabulary)


class Sampler:
    """Chooses one token after another; with a seed always the same ones.

    The text begins with `prompt_tokens` that it has not chosen.
    """

    def __init__(self, settings: SamplingSettings, prompt_tokens: int = 0) -> None:
        self._greedy = settings.temperature == 0
        self._generator = torch.Generator()
        if settings.seed is not None:
            self._generator.manual_seed(settings.seed)
        else:
            self._generator.seed()
        self._processors = LogitsProcessorList()
        if settings.logit_bias:
            self._processors.append(LogitBias(settings.logit_bias))
        if settings.presence_penalty or settings.frequency_penalty:
            self._processors.append(
                UsePenalty(settings.presence_penalty, settings.frequency_penalty, prompt_tokens)
            )
        if settings.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        if not self._greedy:
            if settings.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(settings.temperature))
            if settings.top_k:
                self._processors.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self._processors.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p:
                self._processors.append(MinPLogitsWarper(settings.min_p))
            if settings.typical_p < 1:
                self._processors.append(TypicalLogitsWarper(settings.typical_p))

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
            logits = self._processors(torch.tensor([token_ids]), logits[None].float().clone())[0]
            if not LEFT_OUT < logits.max() < torch.inf:
                raise SettingsError(
                    "temperature, bias and penalties leave no token with a probability"
                )
        if self._greedy:
            return int(logits.argmax())
        probabilities = torch.softmax(logits, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


class LogitBias(LogitsProcessor):  # type: ignore[misc]
    """Adds a number to the logits of some tokens; BAN keeps one out."""

    def __init__(self, bias: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(bias))
        values = [-torch.inf if value <= BAN else float(value) for value in bias.values()]
        self._values = torch.tensor(values)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (1, vocabulary) with the bias. Raises SettingsError for an id beyond those."""
        if int(self._ids.max()) >= scores.shape[1]:
            raise SettingsError(
                f"logit bias names token {int(self._ids.max())}; the model has {scores.shape[1]}"
            )
        return scores.index_add(1, self._ids, self._values[None])


class UsePenalty(LogitsProcessor):  # type: ignore[misc]
    """OpenAI's presence and frequency penalties: of the tokens after the prompt."""

    def __init__(self, presence: float, frequency: float, prompt_tokens: int) -> None:
        self._presence = presence
        self._frequency = frequency
        self._prompt_tokens = prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """`scores` (1, vocabulary) after `input_ids` (1, T)."""
        ids, counts = torch.unique(input_ids[0, self._prompt_tokens :], return_counts=True)
        return scores.index_add(1, ids, -(self._presence + self._frequency * counts.float())[None])


def write(
    forward: Forward,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    settings: SamplingSettings | None = None,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """The tokens that follow on a prompt, one of `eos_ids` at most, as the last.

    `forward` is given all tokens so far each time. Raises NonFiniteError, SettingsError for a bias
    of a token that there is not.
    """
    sampler, token_ids = Sampler(settings or SamplingSettings(), len(prompt_ids)), list(prompt_ids)
    for _ in range(max_new_tokens):
        token = sampler.pick(forward(torch.tensor([token_ids]))[0, -1], token_ids)
        token_ids.append(token)
        yield token
        if token in eos_ids:
            return


def score(
    forward: Forward, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[float]:
    """The log-probability of each continuation of a prompt, in nats; all of them in one batch.

    Shorter ones are filled up behind, where a causal model does not look. Raises SettingsError for
    an empty prompt.
    """
    if not prompt_ids:
        raise SettingsError("the prompt has no tokens; a score needs one at least")
    longest = max((len(each) for each in continuations), default=0)
    if longest == 0:
        return [0.0] * len(continuations)
    filled = [[*prompt_ids, *each, *[0] * (longest - len(each))] for each in continuations]
    first = len(prompt_ids) - 1  # whose logits are of the first token after the prompt
    logits = forward(torch.tensor(filled))[:, first : first + longest].float()
    wanted = torch.tensor([ids[first + 1 :] for ids in filled])
    logprobs = torch.log_softmax(logits, dim=-1).gather(2, wanted[..., None])[..., 0]
    return [
        float(row[: len(each)].sum()) for row, each in zip(logprobs, continuations, strict=True)
    ]
