"""parts.json: what a whole model has, in a folder that holds parts of it.

For each tensor of the model its file, type, shape and digest. So a folder with two layers knows
the fingerprint of the whole, and can say of its own tensors that they are those.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from common.errors import CheckpointError
from common.spans.parts import Parts, parts_of_files
from common.weights.model_files import check_plain_file, read_json

MANIFEST = "parts.json"
KIND = "midspan-parts/1"
REST = "rest"  # of tensors that no part of the language model needs
SUFFIXES = (".safetensors", ".pth")
FILE_NAME = re.compile(r"begin|end|rest|mid\.\d{5}")
Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of the whole model."""

    file: str  # without its suffix
    dtype: str  # as safetensors calls it: F16
    shape: tuple[Size, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The whole model. `name` is what it is called, wherever its parts lie."""

    kind: str
    name: str
    layers: Annotated[int, msgspec.Meta(ge=1, le=99_999)]
    tensors: dict[str, StoredTensor]

    def parts_in(self, directory: Path) -> Parts:
        """The parts whose files are in a folder."""
        names = {tensor.file for tensor in self.tensors.values()} | {"begin", "end"}
        return parts_of_files({n for n in names if find_file(directory, n)}, self.layers)


def find_file(directory: Path, name: str) -> str | None:
    """The file of that name, whichever its suffix; None if it is not in the folder."""
    return next((name + s for s in SUFFIXES if (directory / (name + s)).exists()), None)


def read_manifest(directory: Path) -> Manifest | None:
    """Raises CheckpointError for a broken one; None where the folder is none of parts."""
    path = directory / MANIFEST
    check_plain_file(path)
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("kind") != KIND:
        raise CheckpointError(f"{path} is of kind {content.get('kind')!r}; expected {KIND!r}")
    try:
        manifest = msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} cannot be used: {error}") from error
    for tensor in manifest.tensors.values():
        if FILE_NAME.fullmatch(tensor.file) is None:
            raise CheckpointError(
                f"{path} names a file {tensor.file!r}; expected begin, mid.00000, end or rest"
            )
    return manifest


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Written last: a folder that has one is complete."""
    data = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
    (directory / MANIFEST).write_bytes(data + b"\n")
