"""Fill a part's parameters from a checkpoint, whatever the tensors are called and packed there.

The library's own tables say how stored names became today's names, and which stored tensors are
put together (the experts of a layer are stored one by one) or taken apart. They are applied here to
the names alone; then only those tensors are read that the part's parameters are made of.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from common.errors import CheckpointError, in_one_line
from common.weights.checkpoint import Checkpoint
from common.weights.safetensors_places import Place

TEXT_PART = re.compile(r"(model\.)?(language_model|text_model)\.(model\.)?")


@dataclass(slots=True)
class Origin:
    """The stored tensors that one parameter, or a few, are made of."""

    target: str  # the first parameter
    converter: WeightConverter | None = None
    stored: list[tuple[str, str]] = field(default_factory=list)  # (the converter's pattern, name)

    def targets(self) -> list[str]:
        """All parameters that come of it."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


class WeightMap:
    """Where a model's parameters are in a checkpoint. Made while the model is whole."""

    def __init__(self, checkpoint: Checkpoint, causal_lm: Any) -> None:
        self._checkpoint = checkpoint
        self._model = causal_lm
        self._tied = _tied_names(causal_lm)
        self._origins = _find_origins(checkpoint.weight_names, causal_lm)

    def fill(
        self, kept: nn.Module, prefix: str, dtype: torch.dtype, device: torch.device | str
    ) -> dict[str, int]:
        """Fill the parameters and stored buffers of `kept`. Returns bytes by stored name.

        Those without values are of other parts. `prefix` is where `kept` is in the model. Raises
        CheckpointError for what is missing.
        """
        parameters = kept.named_parameters(remove_duplicate=False)
        names = {prefix + name: name for name, parameter in parameters if parameter.numel()}
        sources = {name: self._find(name) for name in names}
        bytes_read: dict[str, int] = {}
        self._fill_plain(kept, names, sources, dtype, device, bytes_read)
        self._fill_converted(kept, names, sources, dtype, device, bytes_read)
        self._fill_buffers(kept, prefix, device, bytes_read)
        return bytes_read

    def check(self, model: nn.Module) -> None:
        """Raise CheckpointError for a parameter that is not there, or has another shape."""
        for name, _ in model.named_parameters(remove_duplicate=False):
            origin = self._find(name)
            if origin.converter is None:
                stored = origin.stored[-1][1]
                self._check_shape(stored, self._checkpoint.shape(stored), model, name)

    def apart(self) -> WeightMap:
        """The same map with files of its own, for another thread."""
        other = copy.copy(self)
        other._checkpoint = self._checkpoint.apart()
        return other

    def forget(self) -> None:
        """As Checkpoint.forget."""
        self._checkpoint.forget()

    def place(self, name: str, shape: tuple[int, ...]) -> Place | None:
        """Where a parameter of this shape is stored; None if it is made of what is.

        Raises CheckpointError where that is no place that can be read again and again.
        """
        origin = self._find(name)
        places = [self._checkpoint.place(stored) for _, stored in origin.stored]
        if origin.converter is not None:
            return None
        stored = origin.stored[-1][1]
        self._check(stored, self._checkpoint.shape(stored), shape)
        return places[-1]

    def find_plain(self, name: str, shape: tuple[int, ...]) -> str:
        """The stored tensor that a parameter of this shape is.

        Raises CheckpointError where it is put together of several, or has another shape.
        """
        origin = self._find(name)
        if origin.converter is not None:
            raise CheckpointError(
                f"{self._checkpoint.directory}: {name} is put together of several stored tensors; "
                "neurons are chosen of matrices that are stored as they are"
            )
        stored = origin.stored[-1][1]
        self._check(stored, self._checkpoint.shape(stored), shape)
        return stored

    def make(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters that are made of others or changed by an adapter, by name.

        Nothing of the files stays open.
        """
        made: dict[str, Tensor] = {}
        for name in shapes:
            if name in made:  # with another one of the same origin
                continue
            origin = self._find(name)
            if origin.converter is None:
                made[name] = self._checkpoint.read_once(origin.stored[-1][1], dtype)
            else:
                made |= self._convert(origin, dtype, {})
        for name, shape in shapes.items():
            if name not in made:
                raise CheckpointError(f"{self._checkpoint.directory} has no tensor {name}")
            self._check(name, tuple(made[name].shape), shape)
        self._checkpoint.close()
        return made

    def list_stored(self, parameter: str) -> list[str]:
        """The stored tensors that a parameter is made of. Raises CheckpointError if there are none.

        Of several stored under names that mean the same, the one that is read.
        """
        origin = self._find(parameter)
        names = [name for _, name in origin.stored]
        if origin.converter is None:
            names = names[-1:]
        return [stored for name in names for stored in self._checkpoint.stored_of(name)]

    def list_stored_buffers(self, kept: nn.Module, prefix: str) -> list[str]:
        """The stored tensors that are buffers of `kept`, a module called `prefix` in the model."""
        origins = (self._origins.get(prefix + name) for name in _stored_buffers(kept))
        plain = [o for o in origins if o is not None and o.converter is None]
        return [origin.stored[-1][1] for origin in plain]

    def _find(self, name: str) -> Origin:
        for candidate in (name, self._tied.get(name)):
            if candidate in self._origins:
                return self._origins[candidate]
        raise CheckpointError(f"{self._checkpoint.directory} has no tensor {name}")

    def _fill_plain(
        self,
        kept: nn.Module,
        names: dict[str, str],
        sources: dict[str, Origin],
        dtype: torch.dtype,
        device: torch.device | str,
        bytes_read: dict[str, int],
    ) -> None:
        plain = {n: o.stored[-1][1] for n, o in sources.items() if o.converter is None}
        for name, stored in plain.items():
            self._check_shape(stored, self._checkpoint.shape(stored), kept, names[name])
        tensors = self._checkpoint.read(plain.values(), dtype)
        for name, stored in plain.items():
            _assign(kept, names[name], tensors[stored].to(device))
            bytes_read[stored] = tensors[stored].nbytes

    def _fill_buffers(
        self,
        kept: nn.Module,
        prefix: str,
        device: torch.device | str,
        bytes_read: dict[str, int],
    ) -> None:
        """Buffers that are stored, in the type that the model gives them."""
        for name in _stored_buffers(kept):
            origin = self._origins.get(prefix + name)
            if origin is not None and origin.converter is None:
                stored, buffer = origin.stored[-1][1], _find_tensor(kept, name)
                self._check_shape(stored, self._checkpoint.shape(stored), kept, name)
                tensor = self._checkpoint.read_once(stored, buffer.dtype)
                _assign(kept, name, tensor.to(device))
                bytes_read[stored] = tensor.nbytes

    def _fill_converted(
        self,
        kept: nn.Module,
        names: dict[str, str],
        sources: dict[str, Origin],
        dtype: torch.dtype,
        device: torch.device | str,
        bytes_read: dict[str, int],
    ) -> None:
        """One after another, for what is put together is there twice meanwhile."""
        origins = {id(o): o for o in sources.values() if o.converter is not None}
        made: set[str] = set()
        for origin in origins.values():
            tensors = self._convert(origin, dtype, bytes_read)
            for name, tensor in tensors.items():
                if name in names and name not in made:
                    self._check_shape(name, tuple(tensor.shape), kept, names[name])
                    _assign(kept, names[name], tensor.contiguous().to(device))
                    made.add(name)
        missing = {n for n, o in sources.items() if o.converter is not None} - made
        if missing:
            raise CheckpointError(f"{self._checkpoint.directory} has no tensor {min(missing)}")

    def _convert(
        self, origin: Origin, dtype: torch.dtype, bytes_read: dict[str, int]
    ) -> dict[str, Tensor]:
        mapping = copy.deepcopy(origin.converter)
        assert mapping is not None
        for pattern, stored in origin.stored:
            tensor = self._checkpoint.read_once(stored, dtype)
            bytes_read[stored] = tensor.nbytes
            mapping.add_tensor(origin.target, stored, pattern, _later(tensor))
        try:
            made = mapping.convert(origin.target, model=self._model, config=self._model.config)
        except Exception as error:  # of whatever class the library's operations raise
            raise CheckpointError(
                f"{self._checkpoint.directory}: {origin.target} cannot be made of the stored "
                f"tensors: {in_one_line(error)}"
            ) from error
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}

    def _check_shape(
        self, what: str, shape: tuple[int, ...], kept: nn.Module, local_name: str
    ) -> None:
        self._check(what, shape, tuple(_find_tensor(kept, local_name).shape))

    def _check(self, what: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if shape != wanted:
            raise CheckpointError(
                f"{self._checkpoint.directory}: tensor {what} has shape {shape}; "
                f"its config.json needs {wanted}"
            )


def _find_origins(stored_names: Iterable[str], causal_lm: Any) -> dict[str, Origin]:
    """Parameter -> its origin, for all that the checkpoint has."""
    transforms = get_model_conversion_mapping(causal_lm)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known, base = causal_lm.state_dict(), causal_lm.base_model_prefix
    main = causal_lm.get_input_embeddings()
    prefix = next(n for n, m in causal_lm.named_modules() if m is main).rpartition(".")[0]
    origins: dict[str, Origin] = {}
    for stored in sorted(stored_names, key=dot_natural_key):
        name = _within_text_part(stored, prefix)
        target, pattern = rename_source_key(name, renamings, converters, base, known)
        if target not in known and name in known:
            target, pattern = rename_source_key(name, [], [], base, known)
        if target not in known:
            continue
        converter = by_pattern[pattern] if pattern is not None else None
        origin = origins.setdefault(target, Origin(target, converter))
        origin.stored.append((pattern or stored, stored))
    return {name: origin for origin in origins.values() for name in origin.targets()}


def _within_text_part(stored: str, prefix: str) -> str:
    """What a tensor would be called if the model had no pictures; others keep their names."""
    match = TEXT_PART.match(stored)
    if match is None:
        return stored
    rest = stored[match.end() :]
    return rest if rest.startswith("lm_head.") else f"{prefix}.{rest}"


def _tied_names(causal_lm: Any) -> dict[str, str]:
    """Parameter -> the one that it shares its values with, as the configuration has it."""
    tied = getattr(causal_lm, "all_tied_weights_keys", None) or {}
    return dict(tied)


def _stored_buffers(kept: nn.Module) -> list[str]:
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in kept.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _find_tensor(kept: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(kept.get_submodule(owner), leaf)
    return tensor


def _assign(kept: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module = kept.get_submodule(owner)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _later(tensor: Tensor) -> Callable[[], Tensor]:
    """As the library takes tensors that are still to be read."""
    return lambda: tensor
