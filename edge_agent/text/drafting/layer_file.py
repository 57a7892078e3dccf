"""The file of a trained layer: weights in half precision, and for which cut of which model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from common.errors import CheckpointError
from common.weights.model_files import check_plain_file
from edge_agent.text.drafting.files import replace_file
from edge_agent.text.drafting.layer_model import LayerModel, LayerShape
from edge_agent.text.ends import ModelEnds

FORMAT = "midspan-drafter/1"
MOST = 1 << 17  # of any number of a shape


def save_layer(layer: LayerModel, path: Path, model: str, span: str) -> None:
    """`model` is a fingerprint, `span` what the pool computes, as `a-b`."""
    tensors = {name: tensor.half().contiguous() for name, tensor in layer.state_dict().items()}
    shape = {name: str(getattr(layer.shape, name)) for name in LayerShape.__slots__}
    replace_file(path, save(tensors, {"format": FORMAT, "model": model, "span": span, **shape}))


def load_layer(path: Path, ends: ModelEnds) -> LayerModel:
    """Read what `save_layer` wrote, in single precision.

    Raises CheckpointError if it is missing, broken, or for another model or cut.
    """
    check_plain_file(path)
    try:
        with safe_open(path, "torch") as file:
            shape = _read_shape(file.metadata() or {}, ends)
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        return _make_layer(shape, tensors)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{path} holds no usable drafter: {error}") from error


def _read_shape(about: Mapping[str, str], ends: ModelEnds) -> LayerShape:
    """Raises ValueError."""
    expected = {
        "format": FORMAT, "model": ends.fingerprint, "span": str(ends.cut.middle),
        "hidden": str(ends.hidden),
    }  # fmt: skip
    for name, value in expected.items():
        if about.get(name) != value:
            raise ValueError(f"its {name} is {about.get(name, 'not named')}; expected {value}")
    numbers = {name: int(about.get(name, "0")) for name in LayerShape.__slots__}
    if not all(0 < number <= MOST for number in numbers.values()) or numbers["head_size"] % 2:
        raise ValueError(f"its shape is {numbers}")
    return LayerShape(**numbers)


def _make_layer(shape: LayerShape, tensors: dict[str, Tensor]) -> LayerModel:
    """Raises ValueError, RuntimeError for tensors that are not a layer's."""
    with torch.device("meta"):
        layer = LayerModel(shape)
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise ValueError("its weights are not all finite")
    layer.load_state_dict(tensors, assign=True)
    return layer.requires_grad_(False).eval()
