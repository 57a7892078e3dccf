"""`midspan eval layers`: how rows change along the layers, and how early they know the next token.

Of each layer's rows the final norm and the LM head make a distribution, as if no layer came behind
(the "logit lens"); its distance to the model's own says how much the layers behind still change.

Letters: L layers, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from common.console.outputs import check_writable
from common.console.plots import require_matplotlib, save_figure
from common.console.tables import format_table
from evaluation.options import (
    csv_option,
    documents_option,
    json_option,
    plot_option,
    text_option,
    tokens_option,
    window_option,
)
from evaluation.progress import counted_work

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from evaluation.importance.observation import WatchedModel


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """Of the rows that leave a layer, the mean over tokens. Its fields are the columns."""

    layer: int
    cosine_to_next: float  # to the rows that leave the next layer; 1 at the last
    cosine_to_last: float
    change: float  # |what the layer adds| / |what came into it|; of the first layer 0
    nats_to_final: float  # Kullback-Leibler, of the final distribution from this layer's
    agreement_percent: float  # of tokens whose likeliest next one is the final one already


@click.command("layers")
@click.argument("model")
@text_option
@window_option(256)
@tokens_option(4096)
@documents_option
@csv_option
@plot_option
@json_option
def layers_command(
    model: str,
    text: Path,
    window: int,
    tokens: int,
    documents: bool,
    csv_path: Path | None,
    plot_path: Path | None,
    as_json: bool,
) -> None:
    """Similarity of MODEL's rows along its layers, and how far each layer is from the answer.

    Where layers change little, a cut costs the same bytes but a coarse codec more or less harm;
    where a layer agrees with the last one, whoever sees its rows knows the next token.
    """
    from common.console.processes import set_up_torch
    from common.weights.demo_model import find_model
    from edge_agent.text.tokenizer import TextTokenizer
    from evaluation.importance.observation import WatchedModel
    from evaluation.texts import FEWEST_TOKENS, cut_windows, read_tokens

    check_writable(csv_path, plot_path)
    if plot_path is not None:
        require_matplotlib()
    set_up_torch(threads=1)
    directory = find_model(model)
    ids = read_tokens(text, TextTokenizer(directory), documents, tokens, least=FEWEST_TOKENS)
    parts = [part for part in cut_windows(ids, window) if len(part) > 1]
    with counted_work(len(parts), "measuring", is_shown=not as_json) as bar:
        measurement = LayerMeasurement(WatchedModel(directory), directory)
        for part in parts:
            measurement.add(part)
            bar.update(1)
    facts = measurement.describe()
    rows = [tuple(asdict(each).values()) for each in facts]
    headers = [field.name for field in fields(LayerFacts)]
    if csv_path is not None:
        with csv_path.open("w", newline="") as file:
            csv.writer(file).writerows([headers, *rows])
    if plot_path is not None:
        save_figure(draw_layers(facts), plot_path)
    click.echo(json.dumps([asdict(f) for f in facts]) if as_json else format_table(headers, rows))


class LayerMeasurement:
    """Adds up texts."""

    def __init__(self, model: WatchedModel, directory: Path) -> None:
        from common.spans.cut import Span
        from common.weights.checkpoint import Checkpoint
        from common.weights.loading import load_span

        self._model = model
        checkpoint = Checkpoint(directory)
        # no layer, the final norm and the LM head
        self._lens = load_span(checkpoint, Span(model.layers, model.layers), part="tail")
        checkpoint.close()
        self._sums: list[list[float]] = [[0.0] * 5 for _ in range(model.layers)]
        self._tokens = 0

    def add(self, ids: Sequence[int]) -> None:
        """One text of at least one token, in one pass."""
        rows = self._model.rows_after(ids)
        final = self._read_lens(rows[-1])
        for layer, sums in enumerate(self._sums):
            for place, value in enumerate(self._compare(rows, layer, final)):
                sums[place] += float(value.double().sum())
        self._tokens += len(ids)

    def describe(self) -> list[LayerFacts]:
        facts = []
        for layer, sums in enumerate(self._sums):
            means = [round(value / self._tokens, 5) for value in sums]
            to_next, to_last, change, nats, agreement = means
            facts.append(
                LayerFacts(layer, to_next, to_last, change, nats, round(100 * agreement, 3))
            )
        return facts

    def _compare(self, rows: Sequence[Tensor], layer: int, final: Tensor) -> list[Tensor]:
        """A value for each token, (T,), of each of the facts."""
        import torch

        here, last = rows[layer], len(rows) - 1
        before = rows[layer - 1] if layer else here
        lens = self._read_lens(here)
        return [
            torch.cosine_similarity(here, rows[min(layer + 1, last)], dim=1),
            torch.cosine_similarity(here, rows[last], dim=1),
            (here - before).norm(dim=1) / before.norm(dim=1),
            (final.exp() * (final - lens)).sum(dim=1),
            (lens.argmax(dim=1) == final.argmax(dim=1)).float(),
        ]

    def _read_lens(self, rows: Tensor) -> Tensor:
        """Logarithms of the chances that rows (T, D) give to the next token, (T, V)."""
        from common.spans.attention import Segment

        segment = Segment(self._lens.new_kv(), 0, len(rows))
        return self._lens.logits(rows, segment, last=len(rows)).float().log_softmax(dim=1)


def draw_layers(facts: Sequence[LayerFacts]) -> Figure:
    """Similarity on the left, distance to the answer on the right."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    layers = [fact.layer for fact in facts]
    to_next = [fact.cosine_to_next for fact in facts[:-1]]  # behind the last there is none
    left.plot(layers[:-1], to_next, ".-", label="cosine to the next layer's")
    left.plot(layers, [f.cosine_to_last for f in facts], ".-", label="cosine to the last layer's")
    left.plot(layers[1:], [f.change for f in facts][1:], ".-", label="size of the change")
    left.legend(fontsize=8)
    right.plot(layers, [f.nats_to_final for f in facts], ".-", color="tab:red")
    right.set_ylabel("nats from the final distribution", color="tab:red")
    beside = right.twinx()
    beside.plot(layers, [f.agreement_percent for f in facts], ".-", color="tab:blue")
    beside.set_ylabel("likeliest token is the final one, %", color="tab:blue")
    for panel in (left, right):
        panel.set_xlabel("rows that leave layer")
        panel.grid(alpha=0.3)
    figure.tight_layout()
    return figure
