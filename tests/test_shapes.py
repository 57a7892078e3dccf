"""Models without values are what they are on torch's meta device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from test_span_model import CONFIGS, WINDOWED
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.weights.demo_model import DEMO_IMAGE_MODEL, find_model
from common.weights.model_files import read_json
from common.weights.shapes import build_without_values


def describe(module: nn.Module) -> dict[str, object]:
    tensors = dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    return {
        name: (type(each), each.shape, each.dtype, each.requires_grad)
        for name, each in tensors.items()
    }


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@pytest.mark.parametrize("name", [*CONFIGS, *WINDOWED])
def test_a_language_model_has_the_shapes_that_it_has_on_the_meta_device(name: str) -> None:
    def build() -> nn.Module:
        config = (CONFIGS | WINDOWED)[name]
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        return model

    model = build_without_values(build)
    assert describe(model) == describe(build_on_meta(build))
    assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))


def test_a_unet_has_the_shapes_that_it_has_on_the_meta_device() -> None:
    config = read_json(find_model(DEMO_IMAGE_MODEL) / "unet" / "config.json")

    def build() -> nn.Module:
        unet: nn.Module = UNet2DConditionModel.from_config(config)
        return unet

    assert describe(build_without_values(build)) == describe(build_on_meta(build))


class Mixing(nn.Module):
    """Adds what is empty to what has values."""

    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.empty(2, 3) + torch.arange(3))


def test_a_module_that_mixes_what_is_empty_with_values_is_built_as_well() -> None:
    total = build_without_values(Mixing).total
    assert (total.shape, total.dtype, total.is_meta) == ((2, 3), torch.float32, True)
