"""Write a model, or parts of it, as files of one format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from common.errors import SettingsError
from common.formats.part_folder import (
    Written,
    copy_companions,
    new_folder,
    save_tensors,
    write_parts,
)
from common.spans.parts import Parts, full
from common.weights.checkpoint import Checkpoint
from common.weights.configuration import read_config

MAX_SHARD_BYTES = 4 << 30
INDEX = "model.safetensors.index.json"


def export(checkpoint: Checkpoint, parts: Parts, format_: str, target: Path) -> Written:
    """Write into a new folder: files of parts, or with `safetensors` a Hugging Face directory.

    Raises SettingsError, and CheckpointError for a model that cannot be cut or is not all here.
    """
    if format_ != "safetensors":
        return write_parts(checkpoint, parts, target, "pth" if format_ == "pth" else "safetensors")
    if not parts.are_whole(read_config(checkpoint).num_hidden_layers):
        raise SettingsError(f"the format safetensors is the whole model; {parts} is not")
    return write_directory(checkpoint, target)


def write_directory(checkpoint: Checkpoint, target: Path) -> Written:
    """Write a Hugging Face directory: one file of weights, or several with an index."""
    for name in checkpoint.tensor_names:
        checkpoint.check_is_here(name)
    shapes = {name: checkpoint.shape(name) for name in checkpoint.tensor_names}
    with new_folder(target):
        sizes = write_weights(target, shapes, checkpoint.read_stored)
        copy_companions(checkpoint.directory, target, for_device=True)
    return Written(full(read_config(checkpoint).num_hidden_layers), sizes)


def write_weights(
    target: Path, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]
) -> dict[str, int]:
    """Write tensors, which are read one file at a time. Returns bytes by file."""
    shards = list(_shard(shapes))
    total = len(shards)
    files = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    if total == 1:
        files = ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        save_tensors(names, read, target / file)
    if total > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {name: file for file, names in pairs for name in names}
        (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {file: (target / file).stat().st_size for file in files}


def _shard(shapes: Mapping[str, Sequence[int]]) -> Iterator[list[str]]:
    """Names of tensors, in groups of at most MAX_SHARD_BYTES as they would be in float32."""
    group: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = 4 * math.prod(shape)
        if group and size + more > MAX_SHARD_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group
