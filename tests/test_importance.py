"""Importance of tokens: each metric and each rounding against its formula, and the command."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from random_models import save_random_model
from test_span_model import CONFIGS
from transformers import GPTNeoXConfig, Qwen2Config

from common.errors import SettingsError
from evaluation.command import evaluate
from evaluation.importance.coarse import (
    round_channels,
    round_least_important,
    round_two_widths,
)
from evaluation.importance.experiment import Experiment, read_experiment
from evaluation.importance.metrics import METRICS, Attention, rank_correlation, score_tokens
from evaluation.importance.observation import WatchedModel
from evaluation.importance.sweep import CHANNELS, EXACT, draw_cuts, measure

LAYERS, HEADS, TOKENS = 3, 2, 5
NARROW: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "llama": CONFIGS["llama"],
    "pythia": GPTNeoXConfig(**NARROW),
    "qwen2": Qwen2Config(**NARROW, num_key_value_heads=2),
}
IDS = [3, 17, 5, 60, 41, 8, 22, 90, 11, 7, 33, 52]


@pytest.fixture(scope="module")
def attention() -> Attention:
    generator = torch.Generator().manual_seed(3)
    paid = torch.rand(LAYERS, HEADS, TOKENS, TOKENS, generator=generator).tril()
    paid /= paid.sum(dim=-1, keepdim=True)
    return Attention(list(paid), torch.rand(LAYERS, HEADS, generator=generator), first=2)


def expected(metric: str, attention: Attention, layer: int, token: int) -> float:
    """By sums, one number at a time."""
    paid = [each.double().numpy() for each in attention.layers]
    cells = HEADS * TOKENS
    received = [sum(p[h, i, token] for h in range(HEADS) for i in range(TOKENS)) for p in paid]
    if metric == "mean":
        return float(received[layer] / cells)
    if metric == "relevant":
        weight = attention.relevance[layer].double().numpy()
        mine = [sum(paid[layer][h, i, token] for i in range(TOKENS)) for h in range(HEADS)]
        return float(sum(w * m for w, m in zip(weight, mine, strict=True)) / sum(weight) / TOKENS)
    if metric == "last_row":
        return float(sum(paid[layer][h, TOKENS - 1, token] for h in range(HEADS)) / HEADS)
    if metric == "maximum":
        return max(float(paid[layer][h, i, token]) for h in range(HEADS) for i in range(TOKENS))
    layers = layer + 1 if metric == "up_to" else attention.first
    return float(sum(received[:layers]) / layers / cells)


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_is_its_formula(metric: str, attention: Attention) -> None:
    for layer in range(LAYERS):
        got = score_tokens(metric, attention, layer)
        want = [expected(metric, attention, layer, token) for token in range(TOKENS)]
        assert got.tolist() == pytest.approx(want, rel=1e-5)


def test_random_importance_depends_on_its_seed_alone(attention: Attention) -> None:
    first, again, other = (score_tokens("random", attention, 0, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_heads_without_relevance_count_alike(attention: Attention) -> None:
    none = Attention(attention.layers, torch.zeros(LAYERS, HEADS), 1)
    assert torch.allclose(score_tokens("relevant", none, 1), score_tokens("mean", none, 1))


def test_an_unknown_metric_is_named(attention: Attention) -> None:
    with pytest.raises(SettingsError, match="no metric 'loudness'; expected one of mean, "):
        score_tokens("loudness", attention, 0)


def test_rank_correlation_is_that_of_squared_differences_of_ranks() -> None:
    a, b = torch.tensor([0.1, 0.9, 0.4, 0.7]), torch.tensor([5.0, 20.0, 30.0, 6.0])
    ranks = [(1, 1), (4, 3), (2, 4), (3, 2)]  # by hand
    count = len(ranks)
    want = 1 - 6 * sum((x - y) ** 2 for x, y in ranks) / (count * (count**2 - 1))
    assert rank_correlation(a, b) == pytest.approx(want)
    assert rank_correlation(a, a) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)


def test_the_least_important_rows_share_one_scale_and_the_others_are_exact() -> None:
    rows = torch.tensor([[0.3, -0.2], [14.0, 3.0], [0.06, 0.5], [-7.0, 2.4]])
    importance = torch.tensor([0.1, 0.9, 0.3, 0.2])
    got = round_least_important(rows, importance, 0.8)  # int(0.8 * 4) = 3 rows, scale 7 / 7
    assert got.tolist() == [[0.0, 0.0], [14.0, 3.0], [0.0, 0.0], [-7.0, 2.0]]
    assert torch.equal(round_least_important(rows, importance, 0.2), rows)
    assert rows[0, 0] == torch.tensor(0.3), "the rows themselves are left alone"


@pytest.mark.parametrize(
    ("bits", "by", "want"),
    [
        (8, "maximum", lambda x, c: round(x / (max(c) / 127)) * max(c) / 127),
        (4, "maximum", lambda x, c: round(x / (max(c) / 7)) * max(c) / 7),
        (1, "mean", lambda x, c: math.copysign(sum(c) / len(c), x)),
        (1, "maximum", lambda x, c: math.copysign(max(c), x)),
    ],
    ids=["8", "4", "1 mean", "1 maximum"],
)
def test_channels_have_a_scale_each(bits: int, by: str, want: Any) -> None:
    rows = torch.tensor([[0.31, -5.0], [-1.2, 2.2], [0.7, 40.0]])
    got = round_channels(rows, bits, by)
    for column in range(2):
        sizes = [abs(float(x)) for x in rows[:, column]]
        expected = [want(float(x), sizes) for x in rows[:, column]]
        assert got[:, column].tolist() == pytest.approx(expected, rel=1e-5)


def test_silent_channels_and_rows_stay_zero() -> None:
    nothing = torch.zeros(3, 2)
    assert torch.equal(round_channels(nothing, 4), nothing)
    assert torch.equal(round_least_important(nothing, torch.arange(3.0), 1.0), nothing)


def test_the_most_important_rows_have_more_bits() -> None:
    rows = torch.tensor([[1.0, 0.4], [1.0, 0.4], [1.0, 0.4]])
    got = round_two_widths(rows, torch.tensor([0.0, 2.0, 1.0]), 0.5, 5, 2)  # ceil(1.5) rows
    assert got[0].tolist() == [1.0, 0.0]
    assert got[1].tolist() == pytest.approx([1.0, 6 / 15])
    assert got[2].tolist() == pytest.approx([1.0, 6 / 15])


@pytest.mark.parametrize("name", SHAPES)
def test_what_a_model_pays_is_seen_and_its_rows_can_be_changed(name: str, tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES[name], tmp_path))
    seen = model.look(IDS)
    assert len(seen.layers) == model.layers
    for paid in seen.layers:
        assert paid.shape == (model.heads, len(IDS), len(IDS))
        assert torch.allclose(paid.sum(dim=-1), torch.ones(()), atol=1e-5)
    exact = model.logits(IDS)
    assert torch.equal(model.logits(IDS, {1: lambda rows: rows}), exact)
    assert not torch.equal(model.logits(IDS, {1: lambda rows: rows * 2}), exact)
    assert torch.equal(model.logits(IDS), exact), "a change is gone after its pass"


def test_the_relevance_of_a_head_is_gradient_times_attention(tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES["llama"], tmp_path))
    want = torch.zeros(model.layers, model.heads)
    for ids in (IDS, IDS[:7]):
        seen = model.model(torch.tensor([ids]), output_attentions=True, use_cache=False)
        for paid in seen.attentions:
            paid.retain_grad()
        chances = seen.logits[0, :-1].log_softmax(dim=-1)
        (-chances[range(len(ids) - 1), ids[1:]].mean()).backward()
        for layer, paid in enumerate(seen.attentions):
            want[layer] += (paid.detach()[0] * paid.grad[0]).abs().sum(dim=(1, 2))
    relevance = model.measure_relevance([IDS, IDS[:7]])
    assert torch.allclose(relevance, want / want.sum(dim=1, keepdim=True), atol=1e-5)


def test_a_head_that_nothing_reads_has_no_relevance(tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES["llama"], tmp_path))
    width = model.model.config.hidden_size // model.heads
    with torch.no_grad():
        model.model.model.layers[1].self_attn.o_proj.weight[:, :width] = 0
    relevance = model.measure_relevance([IDS])
    assert relevance[1, 0] == 0
    assert (relevance[0] > 0).all()


def test_a_sweep_finds_what_rounding_by_hand_costs(tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES["pythia"], tmp_path))
    asked = Experiment(
        "pythia", Path(), window=8, stride=4, layers=(1,), metrics=("mean",), ratios=(0.5,),
        channels=("4",), prompts=1, continuation=3,
    )  # fmt: skip
    found = measure(model, IDS, asked)
    nats = {EXACT: 0.0, "mean": 0.0, CHANNELS: 0.0}
    for begin, scored in ((0, 7), (4, 4)):
        ids = IDS[begin : begin + 8]
        importance = model.look(ids).layers[1].mean(dim=(0, 1))
        for way, change in (
            (EXACT, lambda rows: rows),
            ("mean", lambda rows, of=importance: round_least_important(rows, of, 0.5)),
            (CHANNELS, lambda rows: round_channels(rows, 4)),
        ):
            chances = model.logits(ids, {1: change}).log_softmax(dim=-1)
            nats[way] -= sum(float(chances[i - 1, ids[i]]) for i in range(8 - scored, 8))
    for point in found.points:
        assert point.perplexity == pytest.approx(math.exp(nats[point.metric] / 11), rel=1e-4)
    assert np.diag(found.correlation) == pytest.approx([1] * model.layers)
    assert {p.metric for p in found.prompts} == {"size", "mean", "uniform"}
    assert found.prompts[0].bits_per_value == pytest.approx(0.25 * 5 + 0.75 * 2)


def test_a_drawn_cut_rounds_each_row_behind_a_layer_of_its_own(tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES["llama"], tmp_path))
    asked = Experiment(
        "llama", Path(), window=12, stride=12, layers=(), channels=(), bits=(3,), cuts=(0, 2)
    )  # fmt: skip
    found = {(p.metric, p.layer): p.perplexity for p in measure(model, IDS, asked).points}
    drawn = draw_cuts((0, 2), len(IDS), seed=0).tolist()
    assert set(drawn) == {0, 2}
    chosen = {("cut", 0): [0] * 12, ("cut", 2): [2] * 12, ("drawn cut", -1): drawn}
    for way, layers in chosen.items():
        assert found[way] == pytest.approx(perplexity_of_rounding(model, layers), rel=1e-4)


def perplexity_of_rounding(model: WatchedModel, layers: list[int]) -> float:
    """Of IDS, each token's row in three bits with a scale of its own behind its layer."""

    def round_mine(layer: int) -> Any:
        def change(rows: torch.Tensor) -> torch.Tensor:
            for token, row in enumerate(rows):
                if layers[token] == layer:
                    step = row.abs().max() / 3
                    rows[token] = (row / step).round() * step
            return rows

        return change

    changes = {layer: round_mine(layer) for layer in set(layers)}
    chances = model.logits(IDS, changes).log_softmax(dim=-1)
    nats = [-float(chances[i - 1, IDS[i]]) for i in range(1, len(IDS))]
    return math.exp(sum(nats) / len(nats))


def test_the_command_measures_writes_and_draws(tmp_path: Path) -> None:
    experiment = write(tmp_path, SOUND)
    done = CliRunner().invoke(evaluate, ["importance", str(experiment), "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader((tmp_path / "points.csv").open()))
    assert [row["metric"] for row in rows] == ["exact", "last_row", "random", "channels"]
    said = json.loads((tmp_path / "findings.json").read_text())
    assert len(said["correlation"]) == 8
    for name in ("sweep", "correlation", "relevance"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "last_row" in done.output


SOUND = """
model = "stories-llama"
text = "story.txt"
window = 32
stride = 32
layers = [2]
metrics = ["last_row", "random"]
ratios = [0.5]
channels = ["1 mean"]
"""


def write(directory: Path, words: str) -> Path:
    (directory / "story.txt").write_text("Once upon a time there was a little fox. " * 6)
    path = directory / "experiment.toml"
    path.write_text(words)
    return path


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("colour = 3", "says colour; expected model, text, "),
        ("window = '12'", "window is '12'; expected int"),
        ("layers = 3", "layers is 3; expected a list of int"),
        ("layers = [true]", r"layers is \[True\]; expected a list of int"),
        ("metrics = ['loud']", "metrics names 'loud'; expected some of mean, "),
        ("ratios = [1.5]", "ratios has 1.5; expected shares between 0 and 1"),
        ("channels = ['9']", "channels has '9'; expected bits from 1 to 8"),
        ("cuts = 2", "cuts is 2; expected a list of int"),
        ("stride = 0", "stride is 0; expected at least 1"),
        ("stride = 600", "stride is 600; expected at most window, 512"),
        ("bits = [1]", "bits has 1; expected 2 to 8"),
        ("= 3", "cannot be read: "),
    ],
)
def test_an_experiment_that_says_what_it_should_not_is_named(
    tmp_path: Path, line: str, words: str
) -> None:
    path = write(tmp_path, f'model = "m"\ntext = "t"\n{line}\n')
    with pytest.raises(SettingsError, match=words):
        read_experiment(path)


def test_layers_that_the_model_does_not_have_are_named(tmp_path: Path) -> None:
    model = WatchedModel(save_random_model(SHAPES["pythia"], tmp_path))
    asked = Experiment("pythia", Path(), window=8, stride=8, layers=(3,))
    with pytest.raises(SettingsError, match="layers has 3; expected 0 to 2"):
        measure(model, IDS, asked)


def test_experiments_of_the_repository_can_be_read() -> None:
    folder = Path(__file__).resolve().parents[1] / "experiments"
    experiments = [read_experiment(path) for path in folder.glob("importance-*.toml")]
    assert len(experiments) >= 1
    assert all(experiment.text.name for experiment in experiments)
