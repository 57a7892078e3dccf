"""What `midspan eval layers` says of a model's layers, against formulas of its own."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from random_models import save_random_model
from test_span_model import CONFIGS
from transformers import AutoModelForCausalLM

from evaluation.command import evaluate
from evaluation.importance.observation import WatchedModel
from evaluation.layers import LayerMeasurement

TEXTS = ([3, 17, 5, 60, 41, 8], [22, 90, 11])


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_layers_are_compared_with_the_next_and_the_last(name: str, tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS[name], tmp_path)
    measurement = LayerMeasurement(WatchedModel(directory), directory)
    for ids in TEXTS:
        measurement.add(ids)
    got = measurement.describe()
    whole = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    base, head = whole.base_model, whole.get_output_embeddings()
    norm = base.norm if hasattr(base, "norm") else base.final_layer_norm
    kept: list[torch.Tensor] = []
    for layer in base.layers:
        layer.register_forward_hook(
            lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
    want = torch.zeros(len(base.layers), 5, dtype=torch.float64)
    for ids in TEXTS:
        kept.clear()
        with torch.no_grad():
            final = whole(torch.tensor([ids])).logits[0]
            rows = [each.view(len(ids), -1) for each in kept]
            for i, here in enumerate(rows):
                lens = head(norm(here))
                for t, row in enumerate(here):
                    after, last = rows[min(i + 1, len(rows) - 1)][t], rows[-1][t]
                    before = rows[max(i - 1, 0)][t]
                    p, q = (x[t].double().softmax(0).tolist() for x in (final, lens))
                    want[i] += torch.tensor([
                        float(row @ after / row.norm() / after.norm()),
                        float(row @ last / row.norm() / last.norm()),
                        float((row - before).norm() / before.norm()),
                        sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)),
                        100.0 * (p.index(max(p)) == q.index(max(q))),
                    ], dtype=torch.float64)  # fmt: skip
    want /= sum(map(len, TEXTS))
    for fact, wanted in zip(got, want.tolist(), strict=True):
        said = [fact.cosine_to_next, fact.cosine_to_last, fact.change, fact.nats_to_final]
        assert said == pytest.approx(wanted[:4], abs=2e-5)
        assert fact.agreement_percent == pytest.approx(wanted[4], abs=0.01)
    assert got[-1].nats_to_final == pytest.approx(0, abs=1e-5)


def test_the_command_prints_writes_and_draws(tmp_path: Path) -> None:
    text, table, plot = (tmp_path / name for name in ("text.txt", "layers.csv", "layers.png"))
    text.write_text("Once upon a time there was a little fox. " * 8)
    arguments = ["layers", "stories-llama", "--text", str(text), "--window", "24", "--json"]
    done = CliRunner().invoke(evaluate, [*arguments, "--csv", str(table), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    assert [fact["layer"] for fact in facts] == list(range(8))
    assert facts[-1]["agreement_percent"] == 100
    assert len(list(csv.reader(table.open()))) == 9
    assert plot.read_bytes().startswith(b"\x89PNG")
