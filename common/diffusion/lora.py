"""A LoRA for SDXL: what it changes in the UNet and in the text encoders, whoever trained it.

diffusers' and PEFT's names are those of modules, with dots; kohya's have underscores instead, and
call the UNet's modules by diffusers' names or by those of the first publication. Each module is
looked up by all that it may be called, so nothing is guessed from underscores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from common.adapters.adapter import Adapter, Change, LowRank
from common.adapters.choice import LoraChoice
from common.adapters.lora_file import LoraFile, read_lora
from common.adapters.peft import PeftScales
from common.diffusion.ldm_names import LdmNames
from common.errors import CheckpointError

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
TEXT_ENCODERS = (TEXT, TEXT_2)
# beginnings of names, by what they are for; with a dot behind, or an underscore for kohya's
PREFIXES = {
    "text_encoder_2.": TEXT_2, "lora_te2_": TEXT_2, "text_encoder.": TEXT, "lora_te1_": TEXT,
    "lora_te_": TEXT, "unet.": UNET, "lora_unet_": UNET, "base_model.model.": UNET,
}  # fmt: skip
PROCESSOR = ".processor."  # diffusers' older names


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """What a LoRA does to one module."""

    name: str  # as it is in the file, for messages
    change: LowRank


class ImageLora:
    """One LoRA: changes by part, and by the module's name in the file. Raises CheckpointError."""

    def __init__(self, choice: LoraChoice) -> None:
        file = read_lora(choice.path)
        if file.whole:
            raise CheckpointError(
                f"{choice.path} has a tensor {min(file.whole)}, which nothing here understands"
            )
        self.path = choice.path
        parts = (UNET, *TEXT_ENCODERS)
        self._changes = {part: _read_part(file, part, choice.scale) for part in parts}

    def for_unet(self, stored: Iterable[str], config: dict[str, Any]) -> Adapter:
        """Changes to the UNet's stored tensors."""
        ldm = LdmNames(config)
        names: dict[str, str] = {}
        for module in _modules(stored):
            other = ldm.find(module)
            for called in (module, other):
                if called is not None:
                    names[called] = names[_flat(called)] = module
        return self._adapter(UNET, names)

    def for_text_encoder(self, part: str, modules: Iterable[str]) -> Adapter:
        """Changes to the weights of a text encoder's modules."""
        names: dict[str, str] = {}
        for module in modules:
            inner = module.removeprefix("text_model.")
            for called in (inner, f"text_model.{inner}"):
                names[called] = names[_flat(called)] = module
        return self._adapter(part, names)

    def changes(self, part: str) -> bool:
        return bool(self._changes[part])

    def _adapter(self, part: str, names: Mapping[str, str]) -> Adapter:
        changes: dict[str, list[Change]] = {}
        for called, change in self._changes[part].items():
            if called not in names:
                raise CheckpointError(
                    f"{self.path} changes {change.name}, which the model's {part} has not"
                )
            changes.setdefault(f"{names[called]}.weight", []).append(change.change)
        return Adapter(changes)


def _read_part(file: LoraFile, part: str, scale: float) -> dict[str, ModuleChange]:
    settings = file.config or {
        name.removeprefix(f"{part}."): value
        for name, value in file.metadata.items()
        if name.startswith(f"{part}.")
    }
    scales = PeftScales(settings, f"{file.path}, of {part},")
    changes = {}
    for name, pair in file.pairs.items():
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        if PREFIXES.get(prefix, UNET) == part:
            assert pair.down is not None
            assert pair.up is not None
            module = _modern(name.removeprefix(prefix))
            amount = scale * scales.scale_of(module, pair)
            changes[module] = ModuleChange(name, LowRank(pair.down, pair.up, amount))
    return changes


def _modern(module: str) -> str:
    """`…attn1.processor.to_q` is …attn1.to_q today; an attention's output is a list of two."""
    if PROCESSOR in module:
        module = module.replace(PROCESSOR, ".")
        module = f"{module}.0" if module.endswith(".to_out") else module
    return module


def _modules(stored: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]


def _flat(name: str) -> str:
    return name.replace(".", "_")
