"""Decode with 40% of the neurons against all of them: tokens a second at batch 1 and 8, and memory.

    python benchmarks/neurons.py [--batch N …] [--rounds N] [--dtype NAME] [--json]

All layers of a model of random weights with wide MLPs, in one process and on one thread, in turns:

- `dense`: all neurons loaded and computed;
- `loaded`: 70% loaded, all of these computed (--method dense);
- `partinfer`: 70% loaded, 40% computed for an answer, a fourth of those the session's own core;
- `coreinfer`: 70% loaded, 40% computed, all of them the session's own core.

Sessions have prompts of their own, so their cores differ. Lists are random: which neurons they name
makes no difference to the time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from common.console.processes import set_up_torch
from common.neurons.lists import NeuronLists, write_lists
from common.neurons.settings import NeuronSettings
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.kv_rows import KvRows
from common.spans.span_model import SpanModel
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span, parse_dtype

HIDDEN, WIDTH, LAYERS = 768, 6144, 8
PROMPT, TOKENS = 32, 12


def make_model(directory: Path) -> Path:
    """Noise, nearly all of it in the MLPs; returns lists of its neurons."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    generator = np.random.default_rng(0)
    path = directory / "lists.json"
    layers = [generator.permutation(WIDTH) for _ in range(LAYERS)]
    write_lists(path, NeuronLists("random", layers))
    return path


def load(directory: Path, settings: NeuronSettings | None, dtype: torch.dtype) -> SpanModel:
    checkpoint = Checkpoint(directory)
    checkpoint.choose(settings)
    model = load_span(checkpoint, Span(0, LAYERS), dtype)
    checkpoint.close()
    return model


class Sessions:
    """Some sessions of one model, each behind its prompt."""

    def __init__(self, model: SpanModel, count: int) -> None:
        self._model = model
        self._caches: list[KvRows] = [model.new_kv() for _ in range(count)]
        generator = torch.Generator().manual_seed(1)
        for kv in self._caches:
            rows = torch.randn(PROMPT, HIDDEN, generator=generator).to(model.dtype)
            model.run(rows, [Segment(kv, 0, PROMPT, ((PROMPT, True),))])
        self._rows = torch.randn(count, HIDDEN, generator=generator).to(model.dtype)
        self.decode()  # cores are gathered with the first token

    def decode(self) -> None:
        """One token of each."""
        self._model.run(self._rows, [Segment(kv, kv.length, 1) for kv in self._caches])

    def time_tokens(self) -> float:
        """Tokens a second, of all together."""
        begun_at = time.perf_counter()
        for _ in range(TOKENS):
            self.decode()
        return len(self._caches) * TOKENS / (time.perf_counter() - begun_at)


def compare(models: dict[str, SpanModel], batch: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each, the median of rounds in which all take turns."""
    sessions = {name: Sessions(model, batch) for name, model in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, each in sessions.items():
            speeds[name].append(each.time_tokens())
    return {name: statistics.median(each) for name, each in speeds.items()}


def measure(directory: Path, batches: Sequence[int], rounds: int, dtype: str) -> dict[str, Any]:
    lists = make_model(directory)
    kinds = {
        "dense": None,
        "loaded": NeuronSettings((lists,), method="dense", start=-1, end=LAYERS),
        "partinfer": NeuronSettings((lists,), start=-1, end=LAYERS),
        "coreinfer": NeuronSettings((lists,), method="coreinfer", start=-1, end=LAYERS),
    }
    models = {name: load(directory, each, parse_dtype(dtype)) for name, each in kinds.items()}
    weights = {
        f"{name}_weights_mb": round(sum(model.bytes_read.values()) / 1e6)
        for name, model in models.items()
    }
    parameters = sum(models["dense"].bytes_read.values()) / parse_dtype(dtype).itemsize
    compared = []
    for batch in batches:
        speeds = compare(models, batch, rounds)
        figures: dict[str, Any] = {"batch": batch}
        figures |= {f"{name}_tokens_per_s": round(speed, 1) for name, speed in speeds.items()}
        for name in ("loaded", "partinfer", "coreinfer"):
            figures[f"{name}_to_dense"] = round(speeds[name] / speeds["dense"], 2)
        figures["partinfer_to_loaded"] = round(speeds["partinfer"] / speeds["loaded"], 2)
        compared.append(figures)
    return {"million_parameters": round(parameters / 1e6), **weights, "compared": compared}


@click.command()
@click.option("--batch", "batches", multiple=True, type=int, default=[1, 2, 4, 8],
              show_default=True, help="Sessions at once.")  # fmt: skip
@click.option("--rounds", default=9, show_default=True)
@click.option("--dtype", default="float32", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(batches: tuple[int, ...], rounds: int, dtype: str, as_json: bool) -> None:
    """Neurons on demand against all of them."""
    set_up_torch(1)
    with tempfile.TemporaryDirectory() as place:
        figures = measure(Path(place), batches, rounds, dtype)
    if as_json:
        click.echo(json.dumps(figures))
        return
    compared = figures.pop("compared")
    for name, value in figures.items():
        click.echo(f"{name.replace('_', ' '):32}{value:>10}")
    for name in compared[0]:
        values = "".join(f"{each[name]!s:>10}" for each in compared)
        click.echo(f"{name.replace('_', ' '):32}{values}")


if __name__ == "__main__":
    main()
