"""`midspan check`: what it says of a model is what loading it finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from random_models import save_random_model
from test_span_model import CONFIGS, WINDOWED

from common.codecs.codec import make_codec
from common.spans.cut import Cut
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span
from common.weights.needs import PartNeeds, measure_needs
from deploy.cli import midspan

FAMILIES = CONFIGS | WINDOWED


def check(*arguments: str) -> Result:
    return CliRunner().invoke(midspan, ["check", *arguments])


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "opt-projected", "gpt2", "bloom", "mixtral", "deepseek-v3"]
)
def test_parts_need_what_loading_them_takes(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_random_model(FAMILIES[name], tmp_path))
    cut = Cut(2, 4)
    needs = measure_needs(checkpoint, torch.float32).cut(cut)
    parts = [
        load_span(checkpoint, cut.head(), part="head"),
        load_span(checkpoint, cut.middle),
        load_span(checkpoint, cut.tail(6), part="tail"),
    ]
    assert [needs.head, needs.middle, needs.tail] == [
        PartNeeds(part.span, sum(part.bytes_read.values()), part.layout.row_bytes) for part in parts
    ]
    assert needs.boundary == parts[0].hidden


def test_a_model_is_described_in_words(demo_directory: Path) -> None:
    done = check(str(demo_directory), "--span", "2-6")
    assert done.exit_code == 0
    assert "(llama, 8 layers) can be cut" in done.output
    assert "middle  2-6     3.0 MB   2.0 KB" in done.output
    assert "A text has at most 512 tokens." in done.output


def test_the_same_as_json(demo_directory: Path) -> None:
    facts = json.loads(check(str(demo_directory), "--cut", "1:7", "--json").output)
    row = make_codec("int8", "up").encode(torch.ones(1, 128))
    assert (facts["span"], facts["row_bytes"]) == ("1-7", len(row))


def test_half_the_precision_needs_half_the_memory(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_random_model(CONFIGS["llama"], tmp_path))
    whole = measure_needs(checkpoint, torch.float32).cut(Cut(2, 4))
    half = measure_needs(checkpoint, torch.bfloat16).cut(Cut(2, 4))
    assert (half.middle.weight_bytes * 2, (half.middle.kv_bytes or 0) * 2) == (
        whole.middle.weight_bytes,
        whole.middle.kv_bytes,
    )


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)

    def fail(*_: object) -> None:
        raise AssertionError("a tensor was read")

    checkpoint = Checkpoint(directory)
    monkeypatch.setattr(Checkpoint, "_get", fail)
    measure_needs(checkpoint, torch.float32).cut(Cut(2, 4))


def test_logits_come_down_where_there_is_no_tail() -> None:
    assert "one of an answer as many up and has its logits" in check("--span", "6:").output
    assert "one of an answer as many up and down" in check("--span", "2:6").output


def test_a_model_that_cannot_be_cut_is_refused_in_one_line(tmp_path: Path) -> None:
    directory = save_random_model(CONFIGS["llama"], tmp_path)
    values = json.loads((directory / "config.json").read_text())
    for change, words in [
        ({"num_hidden_layers": 7}, "has no tensor model.layers.6."),
        ({"intermediate_size": 65}, "its config.json needs (65, 32)"),
        ({"layer_types": ["indexed_attention"] * 6}, "with indexed_attention layers cannot be cut"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantized weights (quant_method 'gptq')",
        ),
    ]:
        (directory / "config.json").write_text(json.dumps(values | change))
        done = check(str(directory))
        assert done.exit_code == 1
        assert done.output.startswith("Error: ")
        assert words in done.output
        assert len(done.output.splitlines()) == 1


def test_a_span_beyond_the_model_and_a_model_that_is_not_there_are_named() -> None:
    assert "the model has 8 layers" in check("--span", "2-9").output
    assert "model 'nowhere' is not a directory" in check("./nowhere").output
