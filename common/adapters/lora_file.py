"""Read a LoRA's file or folder, and put its tensors together by the module that they change.

Trainers name them in several ways: lora_A and lora_B, lora_down and lora_up, an alpha in a tensor
of its own. A name that is none of these is refused: what is passed over silently makes another
model than was trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError
from common.weights.model_files import check_plain_file, check_plain_files, read_json
from common.weights.torch_file import TorchFile

CONFIG = "adapter_config.json"
# the names of weights in a folder, best first
FILES = (
    "adapter_model.safetensors", "pytorch_lora_weights.safetensors", "adapter_model.bin",
    "pytorch_lora_weights.bin",
)  # fmt: skip
METADATA = "lora_adapter_metadata"  # diffusers', in the header of a safetensors file
DOWN = re.compile(
    r"(?P<module>.+?)(\.lora_A(\.default)?|\.lora_down|\.lora_linear_layer\.down|[._]lora\.down)"
    r"\.weight"
)
UP = re.compile(
    r"(?P<module>.+?)(\.lora_B(\.default)?|\.lora_up|\.lora_linear_layer\.up|[._]lora\.up)\.weight"
)
ALPHA = re.compile(r"(?P<module>.+)\.alpha")
EMBEDDING = re.compile(r"(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.default)?")
DORA = ("lora_magnitude_vector", "dora_scale")


@dataclass(slots=True)
class Pair:
    """What a file has for one module."""

    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    is_embedding: bool = False


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA as it is stored: pairs by module, tensors trained as a whole, and how to scale."""

    path: Path
    pairs: Mapping[str, Pair]
    whole: Mapping[str, Tensor]  # by the tensor's name
    config: Mapping[str, Any] = field(default_factory=dict)  # adapter_config.json
    metadata: Mapping[str, Any] = field(default_factory=dict)  # of the weights' header


def read_lora(path: Path) -> LoraFile:
    """A file, or a folder with one. Raises CheckpointError, naming what is not understood."""
    config = {}
    if path.is_dir():
        check_plain_files(path)
        if (path / CONFIG).exists():
            config = read_json(path / CONFIG)
    tensors, metadata = _read_tensors(_find_file(path))
    pairs, whole = _sort(path, tensors)
    return LoraFile(path, pairs, whole, config, metadata)


def _find_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    known = [path / name for name in FILES if (path / name).exists()]
    found = known or sorted(path.glob("*.safetensors"))
    if len(found) != 1 and not known:
        raise CheckpointError(
            f"{path} has {len(found)} files of weights; expected one, as {FILES[0]}"
        )
    return found[0]


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    check_plain_file(path)
    if path.suffix != ".safetensors":
        file = TorchFile(path)
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, {}
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = (opened.metadata() or {}).get(METADATA, "{}")
            names = list(opened.keys())
            return {name: opened.get_tensor(name) for name in names}, _parse(metadata)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _parse(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _sort(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    pairs: dict[str, Pair] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if any(word in name for word in DORA):
            raise CheckpointError(f"{path} is a DoRA ({name}), which cannot be merged here")
        if not _add_to_pair(pairs, name, tensor):
            if "lora" in name.rpartition(".")[0] or "." not in name:
                raise CheckpointError(f"{path} has a tensor {name}, which nothing here understands")
            whole[name] = tensor
    _check_pairs(path, pairs)
    return pairs, whole


def _add_to_pair(pairs: dict[str, Pair], name: str, tensor: Tensor) -> bool:
    if match := DOWN.fullmatch(name):
        pairs.setdefault(match["module"], Pair()).down = tensor
    elif match := UP.fullmatch(name):
        pairs.setdefault(match["module"], Pair()).up = tensor
    elif (match := ALPHA.fullmatch(name)) and tensor.numel() == 1:
        pairs.setdefault(match["module"], Pair()).alpha = float(tensor)
    elif match := EMBEDDING.fullmatch(name):
        pair = pairs.setdefault(match["module"], Pair())
        pair.is_embedding = True
        setattr(pair, "down" if match["side"] == "A" else "up", tensor)
    else:
        return False
    return True


def _check_pairs(path: Path, pairs: Mapping[str, Pair]) -> None:
    for module, pair in pairs.items():
        if pair.down is None or pair.up is None:
            raise CheckpointError(f"{path} has only one of the two factors of {module}")
        rank, tail = pair.down.shape[0], tuple(pair.up.shape[1:])
        if tail[:1] != (rank,) or any(size != 1 for size in tail[1:]) or rank < 1:
            raise CheckpointError(
                f"{path}: the factors of {module} are {list(pair.down.shape)} and "
                f"{list(pair.up.shape)}, which do not fit"
            )
