"""Measure an experiment: perplexity with coarse rows, and whether layers agree on importance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from edge_agent.text.perplexity import PerplexityMeter, sliding_windows
from evaluation.importance.coarse import (
    round_channels,
    round_least_important,
    round_rows,
    round_two_widths,
)
from evaluation.importance.experiment import Experiment, read_channel
from evaluation.importance.metrics import (
    Attention,
    mean,
    rank_correlation,
    score_tokens,
)
from evaluation.importance.observation import Change, WatchedModel
from evaluation.texts import cut_windows

EXACT, CHANNELS = "exact", "channels"
CUT, DRAWN = "cut", "drawn cut"  # all rows behind one layer; each behind one that was drawn for it
HIGH, LOW, SHARE = 5, 2, 0.25  # of the codec intN/M@F
UNIFORM, SIZE = "uniform", "size"  # all rows the same; those with the largest values, as the codec


@dataclass(frozen=True, slots=True)
class Point:
    """One way to round the rows behind one layer. Its fields are the columns of the CSV."""

    layer: int  # -1 of `exact` and `drawn cut`
    metric: str  # `exact`, `channels`, `cut`, or by what the least important tokens were found
    ratio: float  # of the tokens
    bits: int
    by: str  # what one bit of a channel stands for
    perplexity: float
    loss_percent: float


@dataclass(frozen=True, slots=True)
class PromptPoint:
    """Two widths for a prompt's rows: what that does to the tokens that are written on it."""

    layer: int
    metric: str  # who gets the bits; `uniform`: all rows the same
    share: float
    bits_per_value: float  # the mean, without scales
    nats_per_token: float  # of the exact model's greedy tokens
    agreement_percent: float  # of which the coarse model would have written the same


@dataclass(frozen=True, slots=True)
class Findings:
    """What an experiment has shown."""

    points: list[Point]
    correlation: list[list[float]]  # of layers with layers, the mean over windows
    relevance: list[list[float]]  # of heads, by layer
    prompts: list[PromptPoint]


Tick = Callable[[int], object]
Changes = Mapping[int, Change]  # by the layer behind which they are made


def count_passes(experiment: Experiment, tokens: int) -> int:
    """Forward passes over windows that `measure` makes; it calls its `tick` for each."""
    windows = len(list(sliding_windows(tokens, experiment.window, experiment.stride)))
    return windows * (1 + len(_list_ways(experiment)))


def measure(
    model: WatchedModel, ids: Sequence[int], experiment: Experiment, tick: Tick = lambda _: None
) -> Findings:
    """All that an experiment asks for. Raises SettingsError for layers that there are not."""
    experiment.check_layers(model.layers)
    relevance = _measure_relevance(model, ids, experiment)
    ways = _list_ways(experiment)
    meters = [PerplexityMeter() for _ in ways]
    exact = PerplexityMeter()
    correlations = []
    for number, window in enumerate(
        sliding_windows(len(ids), experiment.window, experiment.stride)
    ):
        part = list(ids[window.begin : window.end])
        attention = model.look(part, relevance, experiment.first)
        correlations.append(_correlate(attention))
        exact.add(model.logits(part), part, window.scored)
        tick(1)
        for way, meter in zip(ways, meters, strict=True):
            meter.add(model.logits(part, way.list_changes(attention, number)), part, window.scored)
            tick(1)
    points = [
        way.describe(meter.perplexity, exact.perplexity)
        for way, meter in zip(ways, meters, strict=True)
    ]
    whole = Point(-1, EXACT, 0.0, 32, "", round(exact.perplexity, 5), 0.0)
    return Findings(
        [whole, *points],
        torch.stack(correlations).mean(dim=0).tolist(),
        relevance.tolist(),
        measure_prompts(model, ids, experiment, relevance),
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """To round the rows that leave a layer."""

    layer: int
    metric: str
    ratio: float
    bits: int
    by: str = ""  # of channels

    def list_changes(self, attention: Attention, window: int) -> Changes:
        return {self.layer: self._choose_change(attention, window)}

    def _choose_change(self, attention: Attention, window: int) -> Change:
        if self.metric == CHANNELS:
            return partial(round_channels, bits=self.bits, by=self.by)
        if self.metric == CUT:
            return partial(round_rows, bits=self.bits)
        importance = score_tokens(self.metric, attention, self.layer, seed=window)
        return partial(
            round_least_important, importance=importance, ratio=self.ratio, bits=self.bits
        )

    def describe(self, perplexity: float, exact: float) -> Point:
        loss = round((perplexity / exact - 1) * 100, 3) + 0.0
        return Point(
            self.layer, self.metric, self.ratio, self.bits, self.by, round(perplexity, 5), loss
        )


@dataclass(frozen=True, slots=True)
class _DrawnCut:
    """Each token's row is rounded behind a layer of its own, drawn by lot: a cut for every step."""

    cuts: tuple[int, ...]
    bits: int

    def list_changes(self, attention: Attention, window: int) -> Changes:
        drawn = draw_cuts(self.cuts, attention.layers[0].shape[-1], seed=window)
        return {cut: partial(_round_some, which=drawn == cut, bits=self.bits) for cut in self.cuts}

    def describe(self, perplexity: float, exact: float) -> Point:
        return _Way(-1, DRAWN, 1.0, self.bits).describe(perplexity, exact)


def draw_cuts(cuts: Sequence[int], tokens: int, seed: int) -> Tensor:
    """One of `cuts` for each token, (T,); the same ones with the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(cuts)[torch.randint(len(cuts), (tokens,), generator=generator)]


def _round_some(rows: Tensor, which: Tensor, bits: int) -> Tensor:
    return torch.where(which[:, None], round_rows(rows, bits), rows)


def _list_ways(experiment: Experiment) -> list[_Way | _DrawnCut]:
    drawn = [_DrawnCut(experiment.cuts, bits) for bits in experiment.bits if experiment.cuts]
    return [
        *(
            _Way(layer, metric, ratio, bits)
            for layer, bits, metric, ratio in product(
                experiment.layers, experiment.bits, experiment.metrics, experiment.ratios
            )
        ),
        *(
            _Way(layer, CHANNELS, 1.0, *read_channel(channel))
            for layer, channel in product(experiment.layers, experiment.channels)
        ),
        *(_Way(cut, CUT, 1.0, bits) for cut, bits in product(experiment.cuts, experiment.bits)),
        *drawn,
    ]


def _measure_relevance(model: WatchedModel, ids: Sequence[int], experiment: Experiment) -> Tensor:
    """On the first windows, which follow on each other."""
    texts = cut_windows(ids, experiment.window)
    return model.measure_relevance([t for t in texts if len(t) > 1][: experiment.relevance_texts])


def _correlate(attention: Attention) -> Tensor:
    """Rank correlation of the mean attention that tokens receive, (L, L)."""
    scores = [mean(attention, layer) for layer in range(len(attention.layers))]
    return torch.tensor([[rank_correlation(a, b) for b in scores] for a in scores])


def measure_prompts(
    model: WatchedModel, ids: Sequence[int], experiment: Experiment, relevance: Tensor
) -> list[PromptPoint]:
    """Rows of prompts in two widths, or one, against the tokens that the exact model writes."""
    length = experiment.window // 2
    prompts = [list(ids[at : at + length]) for at in range(0, len(ids) - length, length)]
    prompts = prompts[: experiment.prompts]
    texts = [p + model.continue_greedily(p, experiment.continuation) for p in prompts]
    shares = [(metric, SHARE) for metric in (SIZE, *experiment.metrics)]
    ways = [*shares, *((UNIFORM, bits) for bits in (2, 3, 4))] if prompts else []
    return [
        _measure_prompt_way(model, texts, experiment, relevance, layer, metric, number)
        for layer in experiment.layers
        for metric, number in ways
    ]


def _measure_prompt_way(
    model: WatchedModel, texts: list[list[int]], experiment: Experiment, relevance: Tensor,
    layer: int, metric: str, number: float,
) -> PromptPoint:  # fmt: skip
    """`number`: of `uniform` the bits, else the share of rows that get the higher width."""
    meter, agreed, written = PerplexityMeter(), 0, experiment.continuation
    for index, text in enumerate(texts):
        attention = model.look(text[:-written], relevance, experiment.first)
        rounding = _PromptRounding(metric, number, attention, layer, index)
        logits = model.logits(text, {layer: rounding.change})
        meter.add(logits, text, written)
        drawn = logits[-written - 1 : -1].argmax(dim=1)
        agreed += int((drawn == torch.tensor(text[-written:])).sum())
    is_uniform = metric == UNIFORM
    return PromptPoint(
        layer,
        metric,
        1.0 if is_uniform else number,
        number if is_uniform else number * HIGH + (1 - number) * LOW,
        round(meter.nats / meter.tokens, 5),
        round(100 * agreed / meter.tokens, 2),
    )


@dataclass(frozen=True, slots=True)
class _PromptRounding:
    """Of the rows of a prompt, and not of those of what is written on it."""

    metric: str
    number: float
    attention: Attention  # of the prompt
    layer: int
    seed: int

    def change(self, rows: Tensor) -> Tensor:
        length = self.attention.layers[0].shape[-1]
        return torch.cat([self._round(rows[:length]), rows[length:]])

    def _round(self, rows: Tensor) -> Tensor:
        if self.metric == UNIFORM:
            bits = int(self.number)
            return round_two_widths(rows, torch.zeros(len(rows)), 1.0, bits, bits)
        if self.metric == SIZE:
            importance = rows.abs().amax(dim=1)
        else:
            importance = score_tokens(self.metric, self.attention, self.layer, self.seed)
        return round_two_widths(rows, importance, self.number, HIGH, LOW)
