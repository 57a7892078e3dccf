"""An SDXL checkpoint in one file, as it was first published and as most fine-tunes are traded.

The file has weights only. Configurations, tokenizers and scheduler come from a directory in
diffusers format, whose own weights need not be there. Of the UNet only the tensors of a part are
read, by their names in the file; its fingerprint is that of the same UNet in a directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.diffusion.ldm_names import LdmNames
from common.diffusion.shapes import WHOLE
from common.errors import CheckpointError
from common.weights.checkpoint import Checkpoint
from common.weights.model_files import check_plain_file
from common.weights.safetensors_places import Place, read_places

UNET_PREFIX = "model.diffusion_model."


class SingleFileUnet(Checkpoint):
    """The UNet's tensors of such a file, by diffusers' names. Raises CheckpointError."""

    def __init__(self, directory: Path, weights: Path) -> None:
        self._weights = weights.resolve()
        super().__init__(directory / "unet", config_key="_class_name", name=weights.stem)

    def _map_tensors(self) -> dict[str, str]:
        return dict.fromkeys(self._open(str(self._weights)).keys(), str(self._weights))

    def _open(self, file_name: str) -> Any:
        if file_name not in self._open_files:
            names = name_tensors(self.config_json)
            self._open_files[file_name] = RenamedFile(open_weights(self._weights), names)
        return self._open_files[file_name]

    def place(self, tensor_name: str) -> Place | None:
        """Where the bytes of a tensor are, which the file calls by another name."""
        if self._weights not in self._places:
            stored, names = read_places(self._weights), name_tensors(self.config_json)
            found = {name: stored[called] for name, called in names.items() if called in stored}
            self._places[self._weights] = found
        return super().place(tensor_name)


class RenamedFile:
    """An open safetensors file whose tensors have other names. Raises CheckpointError."""

    def __init__(self, opened: Any, names: dict[str, str]) -> None:
        self._opened, self._names = opened, names
        there = {name for name in opened.keys() if name.startswith(UNET_PREFIX)}  # noqa: SIM118
        for which, differing in (("lacks", set(names.values()) - there),
                                 ("also has", there - set(names.values()))):  # fmt: skip
            if differing:
                raise CheckpointError(
                    f"the file {which} {min(differing)}: it is not of the UNet in unet/config.json"
                )

    def keys(self) -> list[str]:
        return list(self._names)

    def get_tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._opened.get_tensor(self._names[name])
        return tensor

    def get_slice(self, name: str) -> Any:
        return self._opened.get_slice(self._names[name])


def open_weights(path: Path) -> Any:
    """A safetensors file. Raises CheckpointError."""
    check_plain_file(path)
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def name_tensors(config: dict[str, Any]) -> dict[str, str]:
    """diffusers' name of each tensor of a UNet -> its name in such a file."""
    from common.diffusion.unet import build_unet

    ldm = LdmNames(config)
    names = {}
    for name in build_unet(config, WHOLE).state_dict():
        found = ldm.find(name)
        if found is None:
            raise CheckpointError(f"the UNet has a tensor {name}, which no single file has")
        names[name] = UNET_PREFIX + found
    return names


def has_prefixed(path: Path, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in open_weights(path).keys())  # noqa: SIM118


def read_prefixed(path: Path, prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by their whole names."""
    opened = open_weights(path)
    names = [name for name in opened.keys() if name.startswith(prefix)]  # noqa: SIM118
    return {name: opened.get_tensor(name) for name in names}
