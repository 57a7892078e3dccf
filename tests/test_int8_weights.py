"""Weights in 8 bits: what is rounded, what a worker of them answers, and who may take over."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forks import run_midspan
from pools import GREEDY, PROMPTS
from torch import nn

from common.errors import CheckpointError, SettingsError
from common.spans.attention import Segment
from common.spans.cut import Span
from common.spans.span_model import SpanModel
from common.weights.checkpoint import HUGE_PAGE, Checkpoint
from common.weights.int8 import FEW_ROWS, Int8Linear, pack_linears
from common.weights.loading import load_span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(3)
    layer = nn.Linear(64, 48)
    with torch.no_grad():
        layer.weight[5] = 0.0
        layer.weight[6] *= 1000.0
    return layer


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_weights_rounded_row_by_row(
    linear: nn.Linear, rows: int, dtype: torch.dtype
) -> None:
    packed = Int8Linear(linear.to(dtype))
    values = torch.randn(2, rows, 64, dtype=dtype)
    weight = linear.weight.detach().float()
    step = (weight.abs().amax(1, keepdim=True) / 127).bfloat16().float()
    rounded = torch.where(step > 0, (weight / step).round().clamp(-127, 127) * step, 0.0)
    assert ((rounded - weight).abs() <= step * 1.01).all()
    wanted = values.bfloat16().float() @ rounded.nan_to_num().T + linear.bias.detach().float()
    got = packed(values)
    assert got.dtype == dtype
    assert got.shape == (2, rows, 48)
    size = wanted.abs().amax((0, 1)).clamp_min(1.0)
    assert ((got.float() - wanted).abs() / size).max() < 0.02


def test_weights_take_one_byte_each(linear: nn.Linear) -> None:
    assert Int8Linear(linear).weight.element_size() == 1


def test_weights_that_are_not_finite_are_refused(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        Int8Linear(linear)


def test_linear_layers_are_replaced_and_others_are_not() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 2)))
    assert pack_linears(block) == 2
    assert [type(m).__name__ for m in block] == ["Int8Linear", "LayerNorm", "Sequential"]


def test_a_span_in_8_bits_is_near_the_span(demo_directory: Path) -> None:
    rows = torch.randn(20, 128) * 3
    outputs, held = [], []
    for in_8_bits in (False, True):
        checkpoint = Checkpoint(demo_directory)
        span = load_span(checkpoint, Span(2, 6), in_8_bits=in_8_bits)
        held.append(count_held(span))
        kv = span.new_kv()
        outputs.append(span.run(rows, [Segment(kv, 0, 20)]))
        checkpoint.close()
    relative = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert 1e-5 < relative < 0.02
    # what the layers were read into is not kept
    assert held[1] - HUGE_PAGE < 0.27 * (held[0] - HUGE_PAGE)


def count_held(span: SpanModel) -> int:
    """Bytes of all memory that the span's tensors keep, also where they are views of more."""
    tensors = [*span._decoder.parameters()]
    for module in span._decoder.modules():
        if isinstance(module, Int8Linear):
            tensors += [module.weight, module.scale]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def test_a_pool_in_8_bits_answers_and_says_its_precision(demo_ends: ModelEnds) -> None:
    prompt = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
    settings = PoolSettings(workers=1, model="stories-llama", worker_options=["--weights", "int8"])
    with LocalPool(settings) as pool:
        client = pool.connect()
        session = Session(demo_ends, client)
        assert len(list(session.generate(prompt, 20, GREEDY))) == 20
        (worker,) = client.status()["workers"]
        assert worker["services"][0]["precision"] == "float32+int8"
        client.close()


def test_what_cannot_be_combined_is_named(demo_directory: Path) -> None:
    checkpoint = Checkpoint(demo_directory)
    with pytest.raises(SettingsError, match="--weights int8 cannot be combined"):
        load_span(checkpoint, Span(2, 6), resident=1, in_8_bits=True)
    checkpoint.close()
    done = run_midspan("worker", "--image-model", "landscapes-sdxl", "--weights", "int8")
    assert done.returncode == 1
    assert "--weights int8 is for language models" in done.stderr
