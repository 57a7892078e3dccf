"""Neurons by layer, the most active ones first: the file that a profile writes, read and checked.

`{"neurons": [[ids] per layer]}`. Beside them may be `mass`, the mean activation of each of these,
and `about`, in words, what they were measured on; a list is as good without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import numpy as np

from common.errors import SettingsError, why_unreadable

MAX_BYTES = 1 << 30
Ids: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.int64]]"
Neuron = Annotated[int, msgspec.Meta(ge=0, lt=1 << 24)]


class _Content(msgspec.Struct, forbid_unknown_fields=True):
    """The file."""

    neurons: Annotated[list[list[Neuron]], msgspec.Meta(min_length=1, max_length=1024)]
    mass: list[list[float]] = []
    about: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class NeuronLists:
    """For each layer its neurons, the most active ones first."""

    name: str  # of the file
    layers: Sequence[Ids]
    mass: Sequence[Sequence[float]] = ()  # of the same neurons, where it is known
    about: str = ""

    def digest(self) -> str:
        """Differs when the lists do."""
        digest = hashlib.sha256()
        for ids in self.layers:
            digest.update(f"{len(ids)} ".encode() + ids.astype("<i8").tobytes())
        return digest.hexdigest()

    def of_layer(self, layer: int, width: int) -> Ids:
        """The list of a layer that has so many neurons. Raises SettingsError if it has others."""
        if layer >= len(self.layers):
            raise SettingsError(
                f"{self.name} has lists for {len(self.layers)} layers; the model has more"
            )
        ids = self.layers[layer]
        if len(ids) and ids.max() >= width:
            raise SettingsError(
                f"{self.name}: layer {layer} names neuron {ids.max()}; the model's has 0 to "
                f"{width - 1}"
            )
        return ids


def read_lists(path: Path) -> NeuronLists:
    """Raises SettingsError for a file that is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SettingsError(f"{path} has more than {MAX_BYTES >> 20} MB; expected lists")
        content = msgspec.json.decode(path.read_bytes(), type=_Content)
    except (OSError, msgspec.MsgspecError) as error:
        raise SettingsError(
            f'{path} cannot be read as lists of neurons, {{"neurons": [[ids] per layer]}}: '
            f"{why_unreadable(error)}"
        ) from error
    layers = [np.array(ids, dtype=np.int64) for ids in content.neurons]
    for layer, ids in enumerate(layers):
        unique, counts = np.unique(ids, return_counts=True)
        if len(unique) < len(ids):
            twice = unique[counts > 1][0]
            raise SettingsError(f"{path}: layer {layer} names neuron {twice} twice")
    lengths = [len(masses) for masses in content.mass]
    if content.mass and lengths != [len(ids) for ids in layers]:
        raise SettingsError(f"{path} has a mass for other neurons than it lists")
    return NeuronLists(path.name, layers, content.mass, content.about)


def write_lists(path: Path, lists: NeuronLists) -> None:
    """Masses go in with six digits."""
    mass = [[float(f"{value:.6g}") for value in masses] for masses in lists.mass]
    content = _Content([ids.tolist() for ids in lists.layers], mass, lists.about)
    path.write_bytes(msgspec.json.encode(content) + b"\n")
