"""What leaving neurons out costs: perplexity, and a task, against the share that is computed.

Each text is a prompt and what follows it, which is computed as an answer is, though its tokens are
given: so a text is one pass, and the figures are those of the very code that writes answers. The
task is to go on as the text does: by the likeliest tokens, for a few of them, without an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from common.errors import SettingsError
from common.neurons.settings import COREINFER, DENSE, PARTINFER, RANDOM, NeuronSettings
from common.spans.attention import Segment
from common.spans.cut import Span
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span

SWEPT = (PARTINFER, COREINFER, RANDOM)
SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
TASK_TOKENS = 4  # to be written as the text has them


@dataclass(frozen=True, slots=True)
class Quality:
    """One choice of neurons. Its fields are the columns of table and CSV."""

    method: str
    loaded: float
    sparsity: float
    perplexity: float
    exact: float  # part of the prompts that are gone on with as the text does


class WholeModel:
    """All of a model in this process, with some of its neurons."""

    def __init__(self, directory: Path, settings: NeuronSettings | None) -> None:
        """Raises CheckpointError, SettingsError."""
        checkpoint = Checkpoint(directory)
        checkpoint.choose(settings)
        layers = read_config(checkpoint).num_hidden_layers
        middle = max(1, layers // 2)
        self._head = load_span(checkpoint, Span(0, middle), part="head")
        self._tail = load_span(checkpoint, Span(middle, layers), part="tail")
        checkpoint.close()

    def score(self, ids: Sequence[int], prompt: int) -> tuple[Tensor, Tensor]:
        """Of the tokens behind a prompt: log-probabilities, and whether each is the likeliest."""
        given, rest = ids[:-1], len(ids) - 1 - prompt
        marks = ((prompt, True), (rest, False)) if rest else ((prompt, True),)
        caches = [part.new_kv() for part in (self._head, self._tail)]
        segments = [Segment(kv, 0, len(given), marks) for kv in caches]
        rows = self._head.embed_and_run(torch.tensor(given), segments[:1])
        logits = self._tail.logits(rows, segments[1], last=rest + 1).float()
        wanted = torch.tensor(ids[prompt:])
        logprobs = torch.log_softmax(logits, -1).gather(1, wanted[:, None])[:, 0]
        return logprobs, logits.argmax(-1) == wanted


def measure_quality(
    directory: Path, settings: NeuronSettings | None, texts: Sequence[Sequence[int]], prompt: int
) -> tuple[float, float]:
    """Perplexity of what follows the prompts, and the part that is gone on with as it should.

    As long as each likeliest token is the text's, that text is what would have been written.
    """
    model = WholeModel(directory, settings)
    scores = [model.score(ids, prompt) for ids in texts]
    loss = -float(torch.cat([logprobs for logprobs, _ in scores]).mean())
    exact = sum(bool(right[:TASK_TOKENS].all()) for _, right in scores)
    return math.exp(loss), exact / len(texts)


def cut_texts(texts: Sequence[Sequence[int]], prompt: int, length: int) -> list[Sequence[int]]:
    """Those that are longer than a prompt, cut to a length. Raises SettingsError for none."""
    long = [ids[:length] for ids in texts if len(ids) >= prompt + TASK_TOKENS]
    if not long:
        raise SettingsError(
            f"no text has {TASK_TOKENS} tokens behind a prompt of {prompt}; give longer ones, or "
            "fewer --first-tokens"
        )
    return long


def sweep(
    directory: Path,
    settings: NeuronSettings,
    texts: Sequence[Sequence[int]],
    prompt: int,
    sparsities: Sequence[float] = SPARSITIES,
) -> Iterator[Quality]:
    """The whole model, all that is loaded, then each method with each share."""
    yield Quality("whole", 1, 1, *measure_quality(directory, None, texts, prompt))
    loaded = settings.loaded
    dense = replace(settings, method=DENSE)
    yield Quality(DENSE, loaded, loaded, *measure_quality(directory, dense, texts, prompt))
    for method in SWEPT:
        for sparsity in sparsities:
            if sparsity < loaded:
                chosen = replace(settings, method=method, sparsity=sparsity)
                figures = measure_quality(directory, chosen, texts, prompt)
                yield Quality(method, loaded, sparsity, *figures)


def draw_quality(measured: Sequence[Quality], path: Path) -> None:
    """Write a PNG: perplexity and the task against the share that is computed."""
    from evaluation.neuron_picture import open_pyplot

    plt = open_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    for method in SWEPT:
        points = [each for each in measured if each.method == method]
        shares = [each.sparsity for each in points]
        left.plot(shares, [each.perplexity for each in points], "o-", label=method)
        right.plot(shares, [each.exact for each in points], "o-", label=method)
    for each, style in zip(measured[:2], ("-", "--"), strict=True):
        words = "all neurons" if each.method == "whole" else f"all of the {each.loaded:.0%} loaded"
        left.axhline(each.perplexity, color="gray", linestyle=style, label=words)
        right.axhline(each.exact, color="gray", linestyle=style, label=words)
    left.set_yscale("log")
    left.set_ylabel("perplexity of the answer")
    right.set_ylabel(f"next {TASK_TOKENS} tokens written as in the text")
    for axes in (left, right):
        axes.set_xlabel("neurons computed for a token, as a part of the layer")
        axes.grid(alpha=0.3)
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
