"""How PEFT scales a LoRA, by adapter_config.json; and a language model's adapter.

Every setting that is not known here, and is set, is refused by its name: it would make another
model. The rules are those of peft's own layers (Apache-2.0): alpha / r, or alpha / sqrt(r) with
rslora, each of them by a pattern of the module's name where there is one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from common.adapters.adapter import Adapter, Change, LowRank, Replacement
from common.adapters.choice import LoraChoice
from common.adapters.lora_file import CONFIG, LoraFile, Pair, read_lora
from common.errors import CheckpointError

if TYPE_CHECKING:
    from common.weights.checkpoint import Checkpoint

# settings of training, of where a LoRA came from, and those that its tensors show
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "alpha_pattern", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "task_type", "use_rslora",
}  # fmt: skip
# ways to begin that change the base weights as well
CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
CONV1D_FAMILIES = {"gpt2", "openai-gpt"}
BASE = "base_model.model."
HEAD = re.compile(r"(lm_head|embed_out|output_layer)\.weight$")
EMBEDDINGS = re.compile(r"(embed_tokens|wte|word_embeddings|embed_in)\.weight$")


class PeftScales:
    """The scale of each module's change. Raises CheckpointError for settings that are not done."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config, self._where = config, where
        check_settings(config, where)

    def scale_of(self, module: str, pair: Pair) -> float:
        """By the configuration, else by the module's own alpha, else 1."""
        assert pair.down is not None
        rank = pair.down.shape[0]
        if not self._config:
            return (rank if pair.alpha is None else pair.alpha) / rank
        if pair.alpha is not None:
            raise CheckpointError(f"{self._where} and a tensor beside {module} both say an alpha")
        told = self._find("rank_pattern", module, self._config.get("r", rank))
        if told != rank:
            raise CheckpointError(f"{self._where} says rank {told} for {module}, which has {rank}")
        alpha = self._find("alpha_pattern", module, self._config.get("lora_alpha", rank))
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self._where} has alpha {alpha!r}; expected a number")
        return float(alpha) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def _find(self, name: str, module: str, otherwise: Any) -> Any:
        patterns = self._config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{self._where} has {name} {patterns!r}; expected an object")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise CheckpointError(f"{self._where}: {name} {pattern!r}: {error}") from error
        return otherwise


def check_settings(config: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for what is set and not done here."""
    if config and config.get("peft_type", "LORA") != "LORA":
        raise CheckpointError(f"{where} is of type {config['peft_type']}; expected LORA")
    if config.get("use_dora"):
        raise CheckpointError(f"{where} has use_dora: a DoRA cannot be merged here")
    others = [name for name, value in config.items() if value and name not in HARMLESS]
    if others:
        name = others[0]
        raise CheckpointError(f"{where} has {name} {config[name]!r}, which is not done here")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGING_STARTS):
        raise CheckpointError(
            f"{where} has init_lora_weights {start!r}, which changes the base as well; convert it "
            "to a plain LoRA when it is saved"
        )


def adapt_text_model(checkpoint: Checkpoint, choices: Iterable[LoraChoice]) -> None:
    """Have a language model's tensors read with these LoRAs. Raises CheckpointError."""
    for choice in choices:
        names, config = checkpoint.tensor_names, checkpoint.config_json
        checkpoint.adapt(open_text_adapter(choice, names, config))


def open_text_adapter(
    choice: LoraChoice, stored: Iterable[str], model_config: Mapping[str, Any]
) -> Adapter:
    """A PEFT folder's changes to a language model's stored tensors. Raises CheckpointError."""
    file = read_lora(choice.path)
    if not file.config:
        raise CheckpointError(f"{choice.path} has no {CONFIG}; expected a folder that PEFT saved")
    return TextAdapterReader(file, list(stored), model_config, choice.scale).read()


class TextAdapterReader:
    """Finds the stored tensor that each module's change is for."""

    def __init__(
        self,
        file: LoraFile,
        stored: list[str],
        model_config: Mapping[str, Any],
        scale: float,
    ) -> None:
        self._file, self._scale = file, scale
        self._config = model_config
        self._scales = PeftScales(file.config, str(file.path / CONFIG))
        self._names = StoredNames(stored, str(file.path))
        self._check_transposed()

    def read(self) -> Adapter:
        """Whole tensors first: PEFT saves embeddings that it changes beside their change."""
        changes: dict[str, list[Change]] = {}
        for name, tensor in self._file.whole.items():
            changes.setdefault(self._find(_plain(name)), []).append(Replacement(tensor))
        for module, pair in self._file.pairs.items():
            change = self._low_rank(_plain(module), pair)
            changes.setdefault(self._find(f"{_plain(module)}.weight"), []).append(change)
        return Adapter(changes)

    def _find(self, name: str) -> str:
        stored = self._names.find(name)
        self._check_untied(stored)
        return stored

    def _low_rank(self, module: str, pair: Pair) -> LowRank:
        assert pair.down is not None
        assert pair.up is not None
        scale = self._scale * self._scales.scale_of(module, pair)
        transposed = pair.is_embedding or bool(self._file.config.get("fan_in_fan_out"))
        return LowRank(pair.down, pair.up, scale, transposed)

    def _check_transposed(self) -> None:
        """What lies transposed on disk is told by two sides that must agree."""
        family = self._config.get("model_type")
        lies = family in CONV1D_FAMILIES
        told = bool(self._file.config.get("fan_in_fan_out"))
        if lies != told:
            raise CheckpointError(
                f"{self._file.path / CONFIG} has fan_in_fan_out {told}; weights of {family} "
                f"{'are' if lies else 'are not'} stored transposed"
            )

    def _check_untied(self, name: str) -> None:
        """A tensor with two uses cannot be changed in one of them."""
        has_head = any(HEAD.search(stored) for stored in self._names.all)
        is_tied = self._config.get("tie_word_embeddings") or not has_head
        if is_tied and (HEAD.search(name) or EMBEDDINGS.search(name)):
            raise CheckpointError(
                f"{self._file.path} changes {name}, which the model uses as embeddings and as LM "
                "head; only one of the two was trained"
            )


class StoredNames:
    """The names of a checkpoint's tensors, found by what a module is called elsewhere."""

    def __init__(self, stored: list[str], where: str) -> None:
        self.all = stored
        self._where = where
        self._known = set(stored)
        self._by_end: dict[str, set[str]] = {}
        for name in stored:
            for end in _ends(name):
                self._by_end.setdefault(end, set()).add(name)

    def find(self, wanted: str) -> str:
        """The only tensor of this name, with more or fewer modules around it."""
        if wanted in self._known:
            return wanted
        found = self._by_end.get(wanted, set()) or {e for e in _ends(wanted) if e in self._known}
        if len(found) != 1:
            raise CheckpointError(
                f"{self._where} changes {wanted}, of which the checkpoint has {len(found)}"
            )
        return found.pop()


def _ends(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[index:]) for index in range(1, len(parts) - 1)]


def _plain(module: str) -> str:
    """A module's name without what PEFT puts around it."""
    for inserted in (".modules_to_save.default", ".modules_to_save", ".base_layer"):
        module = module.replace(inserted, "")
    return module.removeprefix(BASE)
