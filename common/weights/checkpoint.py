"""Read a Hugging Face model directory: its configuration, its tensors by name, its fingerprint.

One file, several with an index, or a folder of parts, which may lack some of the model's files
(common/weights/manifest.py). Tensors are read by name from safetensors, so a span costs the
memory and the disk reads of that span alone. Older .bin and .pth files are read with torch's loader
for weights only, which runs no code of theirs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import CheckpointError
from common.neurons.choice import NeuronChoice, choose_neurons
from common.spans.parts import Parts
from common.weights.manifest import MANIFEST, SUFFIXES, find_file, read_manifest
from common.weights.model_files import check_place, check_plain_file, read_json, read_model_config
from common.weights.packed import find_packed
from common.weights.safetensors_places import Place, PlaceReader, read_places
from common.weights.torch_file import TorchFile

if TYPE_CHECKING:
    from common.adapters.adapter import Adapter
    from common.neurons.settings import NeuronSettings

# what a configuration says about files and tools rather than about the model
VOLATILE_KEYS = {
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures",
    "_diffusers_version",
}  # fmt: skip
PLAIN_TYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
SAMPLE_VALUES = 64  # per tensor, in the fingerprint
ALIGNMENT = 64  # bytes, a vector register
HUGE_PAGE = 2 << 20


class Checkpoint:
    """An open model directory. Raises CheckpointError when it is not one.

    `stem` is what the names of its weight files begin with, `config_key` is in its configuration
    if it is of the kind expected.
    """

    def __init__(
        self,
        directory: str | Path,
        stem: str = "model",
        config_key: str = "model_type",
        name: str = "",
    ) -> None:
        self.directory = Path(directory)
        self._stem = stem
        self._config_key = config_key
        self.config_json = self._read_config()
        self._manifest = read_manifest(self.directory) if stem == "model" else None
        own_name = self._manifest.name if self._manifest else self.directory.resolve().name
        self.name = name or own_name
        self._open_files: dict[str, Any] = {}
        self._cache: dict[tuple[str, torch.dtype], Tensor] = {}
        self._places: dict[Path, dict[str, Place]] = {}
        self._reader = PlaceReader()
        self._adapter: Adapter | None = None
        self.neurons: NeuronChoice | None = None  # which are loaded; None: all
        self._file_of = self._map_tensors()
        self._absent = self._list_absent()
        self._packed = find_packed(self.config_json, self._file_of)

    @property
    def tensor_names(self) -> list[str]:
        """Of the whole model, also where only some of its files are here."""
        return sorted(self._file_of)

    @property
    def weight_names(self) -> list[str]:
        """What can be read: tensors as they are stored, and what is made of codes and scales."""
        parts = {name for packed in self._packed.values() for name in packed.stored}
        return sorted((self._file_of.keys() - parts) | self._packed.keys())

    def stored_of(self, name: str) -> list[str]:
        """The stored tensors that a weight is made of."""
        return self._packed[name].stored if name in self._packed else [name]

    @property
    def parts(self) -> Parts | None:
        """What a folder of parts holds; None for a directory that holds a model as it is."""
        return self._manifest.parts_in(self.directory) if self._manifest else None

    def adapt(self, adapter: Adapter) -> None:
        """Have tensors read with these changes from now on, after those of before.

        Raises CheckpointError for a change that does not fit.
        """
        for name in adapter.names:
            if name not in self._file_of:
                raise CheckpointError(f"the adapter changes {name}, which {self.directory} lacks")
            adapter.check(name, self.shape(name))
        self._adapter = adapter if self._adapter is None else self._adapter.join(adapter)
        self._cache.clear()

    def choose(self, settings: NeuronSettings | None) -> None:
        """Have parts loaded with some of their neurons only. Raises SettingsError."""
        if settings is None:
            return
        settings.check()
        if settings.changes_nothing:
            return
        self.neurons = choose_neurons(settings)

    def _read_config(self) -> dict[str, Any]:
        return read_model_config(self.directory, self._config_key)

    @property
    def opened_files(self) -> list[str]:
        return sorted(self._open_files)

    def read_optional_json(self, file_name: str) -> dict[str, Any]:
        """A JSON file of the directory, or an empty map if there is none."""
        path = self.directory / file_name
        return read_json(path) if path.exists() else {}

    def _map_tensors(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if self._manifest is not None:
            files = {tensor.file for tensor in self._manifest.tensors.values()}
            found = {file: find_file(self.directory, file) or file + SUFFIXES[0] for file in files}
            return {name: found[tensor.file] for name, tensor in self._manifest.tensors.items()}
        for single_file in self._candidates():
            index = self.directory / f"{single_file}.index.json"
            if index.exists():
                return self._read_index(index)
            if (self.directory / single_file).exists():
                return dict.fromkeys(self._open(single_file).keys(), single_file)
        known = ", ".join([*self._candidates(), MANIFEST])
        raise CheckpointError(f"{self.directory} has none of {known}")

    def _list_absent(self) -> set[str]:
        """Files of a folder of parts that are elsewhere."""
        files = set(self._file_of.values()) if self._manifest else set()
        return {file for file in files if not (self.directory / file).exists()}

    def _candidates(self) -> list[str]:
        """Names of the weights' file, best first; each may have an index instead."""
        older = "pytorch_model" if self._stem == "model" else self._stem
        return [
            f"{self._stem}.safetensors", f"{self._stem}.fp16.safetensors", f"{older}.bin",
            f"{older}.pth",
        ]  # fmt: skip

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        for file_name in weight_map.values():
            check_place(index, file_name)
        missing = {f for f in weight_map.values() if not (self.directory / f).exists()}
        if missing:
            raise CheckpointError(f"{index} names files that are not there: {sorted(missing)}")
        return weight_map

    def _open(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            path = self.directory / file_name
            check_plain_file(path)
            if path.suffix != ".safetensors":
                self._open_files[file_name] = TorchFile(path)
                return self._open_files[file_name]
            try:
                self._open_files[file_name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is not a readable safetensors file: {error}"
                ) from error
        return self._open_files[file_name]

    def read(self, tensor_names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """The named tensors, converted to `dtype`, one after another in one block of memory.

        One aligned block in huge pages, where the system has them, is read several percent faster
        than scattered tensors; and tensors at odd file offsets would make the kernels add in
        another order and change the last bits of results. A tensor that was read before is shared.
        """
        new = [n for n in dict.fromkeys(tensor_names) if (n, dtype) not in self._cache]
        shapes = {name: self.shape(name) for name in new}
        sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        block = allocate(sum(round_up(size) for size in sizes.values()))
        at = 0
        for name in new:
            tensor = block[at : at + sizes[name]].view(dtype).view(shapes[name])
            self._read_into(tensor, name, dtype)
            self._cache[name, dtype] = tensor
            at += round_up(sizes[name])
        return {name: self._cache[name, dtype] for name in tensor_names}

    def forget(self) -> None:
        """Share what was read until now with nobody any more: who has it may let go of it."""
        self._cache.clear()

    def _read_into(self, tensor: Tensor, name: str, dtype: torch.dtype) -> None:
        """Straight from the file where nothing has to be done to it."""
        is_plain = name not in self._packed and self._file_of[name].endswith(".safetensors")
        place = self.place(name) if is_plain and tensor.numel() else None
        if place is None or place.dtype != dtype:
            tensor.copy_(self._get(name, dtype))
        else:
            self._reader.read_into(tensor.view(-1).view(torch.uint8), place)

    def read_once(self, tensor_name: str, dtype: torch.dtype) -> Tensor:
        """A tensor that is not shared: it is put together with others, or taken apart."""
        return self._get(tensor_name, dtype).to(dtype)

    def place(self, tensor_name: str) -> Place | None:
        """Where the bytes of a tensor are; None where it is made, or changed by an adapter.

        Raises CheckpointError unless it is in a safetensors file.
        """
        if tensor_name in self._packed:
            return None
        self.check_is_here(tensor_name)
        path = self.directory / self._file_of[tensor_name]
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path} is not a safetensors file; layers can take turns in memory from those only"
            )
        if path not in self._places:
            self._places[path] = read_places(path)
        place = self._places[path].get(tensor_name)
        if place is None:
            raise _not_plain(self.directory, tensor_name, self.read_stored(tensor_name).dtype)
        if self._adapter is not None and tensor_name in self._adapter.names:
            return None
        return place

    def is_in_safetensors(self, tensor_name: str) -> bool:
        """Whether a tensor is in a file of which parts can be read."""
        return tensor_name in self._packed or self._file_of[tensor_name].endswith(".safetensors")

    def _get(self, tensor_name: str, wanted: torch.dtype) -> Tensor:
        packed = self._packed.get(tensor_name)
        tensor = packed.unpack(self.read_stored) if packed else self.read_stored(tensor_name)
        if wanted.is_floating_point and tensor.dtype not in PLAIN_TYPES:
            raise _not_plain(self.directory, tensor_name, tensor.dtype)
        return tensor if self._adapter is None else self._adapter.apply(tensor_name, tensor)

    def read_stored(self, tensor_name: str) -> Tensor:
        """A tensor as it is stored, of whatever type."""
        self.check_is_here(tensor_name)
        try:
            tensor: Tensor = self._open(self._file_of[tensor_name]).get_tensor(tensor_name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.directory}: {tensor_name}: {error}") from error
        return tensor

    def describe(self, tensor_name: str) -> tuple[str, tuple[int, ...], str]:
        """Type, shape and digest of a tensor."""
        if self._manifest is not None and not self.is_here(tensor_name):
            known = self._manifest.tensors[tensor_name]
            return known.dtype, known.shape, known.digest
        view = self._slice(tensor_name)
        dtype, shape = view.get_dtype(), view.get_shape()
        digest = hashlib.sha256(f"{dtype} {shape}".encode() + _sample(view, shape))
        return dtype, tuple(shape), digest.hexdigest()[:16]

    def is_here(self, tensor_name: str) -> bool:
        """Whether a tensor's file is in the directory, which may be a folder of some parts."""
        return self._file_of[tensor_name] not in self._absent

    def check_is_here(self, tensor_name: str) -> None:
        """Raises CheckpointError, with what is here, unless the tensor's file is."""
        if not self.is_here(tensor_name):
            raise CheckpointError(
                f"{self.directory} holds {self.parts} of {self.name}, and not "
                f"{self._file_of[tensor_name]}, which has {tensor_name}"
            )

    def shape(self, tensor_name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        if tensor_name in self._packed:
            return self._packed[tensor_name].shape(self._stored_shape)
        return self._stored_shape(tensor_name)

    def _stored_shape(self, tensor_name: str) -> tuple[int, ...]:
        if self._manifest is not None:
            return self._manifest.tensors[tensor_name].shape
        return tuple(self._slice(tensor_name).get_shape())

    def _slice(self, tensor_name: str) -> Any:
        self.check_is_here(tensor_name)
        file_name = self._file_of[tensor_name]
        try:
            return self._open(file_name).get_slice(tensor_name)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(
                f"{self.directory / file_name} has no tensor {tensor_name}, as its index has it"
            ) from error

    def apart(self) -> Checkpoint:
        """The same directory with files of its own, for another thread."""
        other = copy.copy(self)
        other._open_files, other._cache, other._places = {}, {}, {}
        other._reader = PlaceReader()
        return other

    def close(self) -> None:
        """Forget files and tensors; tensors already handed out stay valid."""
        self._cache.clear()
        self._open_files.clear()
        self._reader.close()

    def fingerprint(self) -> str:
        """16 hex digits that differ when the configuration or the weights do.

        Covers the configuration and of every tensor its name, dtype, shape and 64 values spread
        over it, so it does not depend on how the tensors are spread over files, and is quick for
        a model of any size. A folder of parts has the same as the whole: of the tensors that are
        elsewhere it knows the digests. Raises CheckpointError where one of its own has another.
        """
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config_json.items() if k not in VOLATILE_KEYS}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in self.tensor_names:
            found = self.describe(name)[2]
            if self._manifest is not None and found != self._manifest.tensors[name].digest:
                raise CheckpointError(
                    f"{self.directory / self._file_of[name]}: {name} is not the tensor that "
                    f"{MANIFEST} describes; the file is of other weights"
                )
            digest.update(f"{name} {found}".encode())
        if self._adapter is not None:
            digest.update(self._adapter.digest().encode())
        if self.neurons is not None:
            digest.update(self.neurons.digest().encode())
        return digest.hexdigest()[:16]


def _not_plain(directory: Path, tensor_name: str, dtype: torch.dtype) -> CheckpointError:
    kind = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"{directory}: tensor {tensor_name} is stored as {kind}; expected float32, float16 or "
        "bfloat16, for a quantized weight without its scale is another number"
    )


def round_up(size: int) -> int:
    """The next size that is a multiple of a vector register's."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def allocate(size: int) -> Tensor:
    """Zeroed bytes that begin at a multiple of 2 MB, in huge pages if the system gives them."""
    # private: Python maps shared memory if not told, which Linux gives no huge pages by default
    area = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        area.madvise(mmap.MADV_HUGEPAGE)
    block = torch.frombuffer(area, dtype=torch.uint8)
    start = -block.data_ptr() % HUGE_PAGE
    return block[start : start + size]


def _sample(view: Any, shape: list[int]) -> bytes:
    """Up to 64 values of a tensor: the beginning of up to 4 of its rows."""
    if not shape or 0 in shape:
        return b""
    rows = sorted({shape[0] * part // 4 for part in range(4)})
    per_row = SAMPLE_VALUES // len(rows)
    picked = [view[row : row + 1].flatten()[:per_row] for row in rows]
    sample = torch.cat(picked).contiguous()
    return sample.view(torch.uint8).numpy().tobytes()
