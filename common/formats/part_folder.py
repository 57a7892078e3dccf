"""Write parts of a model as files: begin, mid.00000 …, end, and parts.json beside them.

Each tensor of the model is in exactly one file, as it is stored, under its stored name; so a folder
of all parts can be taken apart and put together with cp. What a device needs besides weights (its
tokenizer, generation settings, drafters) goes along where the beginning does, calibrations always.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from common.errors import CheckpointError, SettingsError
from common.formats.part_tensors import PartTensors, find_part_tensors
from common.spans.parts import Parts
from common.weights.checkpoint import Checkpoint
from common.weights.manifest import KIND, MANIFEST, REST, Manifest, StoredTensor, write_manifest

FileKind = Literal["safetensors", "pth"]
CONFIG = "config.json"
COMPANIONS = {".json", ".jinja", ".model", ".tiktoken"}  # by suffix
COMPANION_NAMES = {"merges.txt", "vocab.txt", "tokenizer.bin"}
OF_WEIGHTS = (".index.json", MANIFEST)


@dataclass(frozen=True, slots=True)
class Written:
    """What has been written: the parts, and bytes by file."""

    parts: Parts
    file_bytes: dict[str, int]


def write_parts(
    checkpoint: Checkpoint, parts: Parts, target: Path, kind: FileKind = "safetensors"
) -> Written:
    """Write parts of a model into a folder, which must be new or empty.

    Raises SettingsError for a folder that has something in it, CheckpointError for a model that
    cannot be cut or of which the parts are not there.
    """
    tensors = find_part_tensors(checkpoint)
    homes = tensors.home(checkpoint.tensor_names)
    content: dict[str, list[str]] = {file: [] for file in _choose_files(tensors, parts, homes)}
    for name in checkpoint.tensor_names:
        if homes[name] in content:
            checkpoint.check_is_here(name)
            content[homes[name]].append(name)
    manifest = describe_model(checkpoint, tensors, homes)
    sizes = {}
    with new_folder(target):
        for file, names in content.items():
            path = target / f"{file}.{kind}"
            save_tensors(names, checkpoint.read_stored, path)
            sizes[path.name] = path.stat().st_size
        copy_companions(checkpoint.directory, target, for_device=parts.begins or parts.ends)
        write_manifest(target, manifest)
    return Written(manifest.parts_in(target), sizes)


def _choose_files(tensors: PartTensors, parts: Parts, homes: dict[str, str]) -> list[str]:
    files = tensors.files_for(parts.file_names(), homes)
    has_rest = parts.are_whole(tensors.layers) and REST in homes.values()
    return files + [REST] * has_rest


@contextmanager
def new_folder(target: Path) -> Iterator[None]:
    """A folder to fill in the block; empty again if that fails.

    Raises SettingsError for one that has something in it, or cannot be made.
    """
    try:
        target.mkdir(parents=True, exist_ok=True)
        if any(target.iterdir()):
            raise SettingsError(f"{target} is not empty; expected a new folder")
    except OSError as error:
        raise SettingsError(f"{target} cannot be written: {error.strerror or error}") from error
    try:
        yield
    except BaseException:
        for path in target.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def describe_model(checkpoint: Checkpoint, tensors: PartTensors, homes: dict[str, str]) -> Manifest:
    """All that a part says of the whole."""
    stored = {}
    for name in checkpoint.tensor_names:
        dtype, shape, digest = checkpoint.describe(name)
        stored[name] = StoredTensor(homes[name], dtype, shape, digest)
    return Manifest(KIND, checkpoint.name, tensors.layers, stored)


def save_tensors(names: Sequence[str], read: Callable[[str], Tensor], path: Path) -> None:
    """Write a file of the kind that its suffix says. Raises CheckpointError if it cannot be."""
    own = {name: read(name).contiguous().clone() for name in names}  # which share no memory
    try:
        if path.suffix == ".safetensors":
            save_file(own, path, metadata={"format": "pt"})
            path.chmod(0o666 & ~_read_umask())  # the library leaves them to their owner alone
        else:
            torch.save(own, path)
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def copy_companions(source: Path, target: Path, for_device: bool) -> None:
    """Copy what lies beside the weights; a worker needs nothing that tells of texts.

    Raises CheckpointError for a folder that cannot be copied.
    """
    for path in sorted(source.iterdir()):
        if path.name == CONFIG or (for_device and _is_companion(path)):
            shutil.copyfile(path, target / path.name)
    for name in ("calibration", "drafting") if for_device else ("calibration",):
        if (source / name).is_dir():
            _copy_folder(source / name, target / name)


def _copy_folder(source: Path, target: Path) -> None:
    """Raises CheckpointError."""
    try:
        shutil.copytree(source, target)
    except shutil.Error as error:  # which lists files, and names no errno
        _, path, reason = error.args[0][0]
        raise CheckpointError(f"{path} cannot be written: {reason}") from error


def _is_companion(path: Path) -> bool:
    is_one = path.suffix in COMPANIONS or path.name in COMPANION_NAMES
    return is_one and path.is_file() and not path.name.endswith(OF_WEIGHTS)


def _read_umask() -> int:
    """What new files are not allowed; there is no other way to read it than to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
