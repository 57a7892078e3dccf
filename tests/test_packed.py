"""Weights that are published as codes and scales are read as the numbers they stand for."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from random_models import save_random_model
from safetensors.torch import load_file, save_file
from test_layer_stream import equal, run
from test_span_model import CONFIGS, WINDOWED
from torch import Tensor

from common.errors import CheckpointError
from common.formats.part_folder import write_parts
from common.spans.cut import Span
from common.spans.parts import Parts
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config
from common.weights.loading import load_span
from common.weights.packed import FP4, Fp8, Mxfp4

BLOCK = 24  # no divisor of the weights' sizes
NOISE = torch.Generator().manual_seed(4)


def write(directory: Path, model: Path, tensors: dict[str, Tensor], said: object) -> Path:
    """A checkpoint of these tensors, with the configuration of another and what it says of them."""
    config = json.loads((model / "config.json").read_text())
    if said is not None:
        config["quantization_config"] = said
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def in_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales by block, and the numbers they stand for, block after block."""
    grid = [math.ceil(size / BLOCK) for size in weight.shape]
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    scales, numbers = torch.empty(grid), torch.empty_like(weight)
    for row in range(grid[0]):
        for column in range(grid[1]):
            place = (
                slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK)
            )  # fmt: skip
            scales[row, column] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
            numbers[place] = codes[place].float() * scales[row, column]
    return codes, scales, numbers


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mixtral whose experts are stored one by one in blocks, and the same as plain numbers."""
    place = tmp_path_factory.mktemp("fp8")
    model = save_random_model(CONFIGS["mixtral"], place / "model")
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        packed[name] = plain[name] = tensor
        if "layers" in name and tensor.dim() == 2:
            packed[name], packed[f"{name}_scale_inv"], plain[name] = in_fp8(tensor)
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    return write(place / "packed", model, packed, said), write(place / "plain", model, plain, None)


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A gpt-oss with random codes for its experts, and the same as the library unpacks them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    place = tmp_path_factory.mktemp("mxfp4")
    model = save_random_model(WINDOWED["gpt-oss-sinks"], place / "model")
    packed: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        packed[name] = plain[name] = tensor
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, out = tensor.shape
            blocks = torch.randint(0, 256, (experts, out, inner // 32, 16), generator=NOISE).byte()
            scales = torch.randint(118, 124, (experts, out, inner // 32), generator=NOISE).byte()
            del packed[name]
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales).float()
    said = {"quant_method": "mxfp4"}
    return write(place / "packed", model, packed, said), write(place / "plain", model, plain, None)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
@pytest.mark.parametrize("resident", [None, 2])
def test_a_model_of_codes_computes_what_its_numbers_compute(
    kind: str, resident: int | None, request: pytest.FixtureRequest
) -> None:
    packed, plain = (Checkpoint(path) for path in request.getfixturevalue(kind))
    assert equal(
        run(load_span(packed, Span(1, 5), resident=resident)), run(load_span(plain, Span(1, 5)))
    )
    assert packed.fingerprint() != plain.fingerprint()


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_folder_of_its_parts_has_codes_and_scales(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    packed = Checkpoint(request.getfixturevalue(kind)[0])
    write_parts(packed, Parts(False, (Span(1, 5),), False), tmp_path / "part")
    folder = Checkpoint(tmp_path / "part")
    assert folder.fingerprint() == packed.fingerprint()
    assert equal(run(load_span(folder, Span(1, 5))), run(load_span(packed, Span(1, 5))))


def test_four_bits_mean_what_their_fields_say() -> None:
    for code, value in enumerate(FP4):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
        assert value == (-size if sign else size)


def test_one_scale_may_be_for_all_of_a_weight() -> None:
    codes = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    tensors = {"w": codes, "w_scale_inv": torch.tensor(3.0)}
    assert Fp8("w", None).unpack(tensors.__getitem__).tolist() == [[3.0, 6.0]]


@pytest.mark.parametrize(
    ("packed", "tensors", "words"),
    [
        (
            Fp8("w", (2, 2)),
            {"w": torch.ones(3, 3).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 2)},
            r"w_scale_inv has shape \(1, 2\); its blocks of \(2, 2\) need \(2, 2\)",
        ),
        (
            Mxfp4("w"),
            {"w_blocks": torch.zeros(1, 2, 1, 16).byte(), "w_scales": torch.zeros(1, 2, 2).byte()},
            r"w_scales has shape \(1, 2, 2\)",
        ),
    ],
)
def test_scales_of_another_shape_are_named(
    packed: Fp8 | Mxfp4, tensors: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(CheckpointError, match=words):
        packed.unpack(tensors.__getitem__)


def test_codes_without_scales_and_blocks_that_are_none_are_refused(
    fp8: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors = load_file(fp8[0] / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("_scale_inv"))
    said = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    without = {name: tensor for name, tensor in tensors.items() if name != lost}
    checkpoint = Checkpoint(write(tmp_path / "lost", fp8[1], without, said))
    with pytest.raises(CheckpointError, match="is stored as float8_e4m3fn; expected float32"):
        load_span(checkpoint, Span(0, 6))
    with pytest.raises(CheckpointError, match="gives weight_block_size as 128; expected two"):
        Checkpoint(write(tmp_path / "odd", fp8[1], tensors, said | {"weight_block_size": 128}))
    config = read_config(Checkpoint(fp8[0]))
    assert not hasattr(config, "quantization_config")
