"""What a TOML file says is to be measured. See experiments/importance-stories.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from common.console.inputs import read_text
from common.errors import SettingsError
from evaluation.importance.coarse import BY_SIZE
from evaluation.importance.metrics import METRICS, RANDOM, list_metrics


@dataclass(frozen=True, slots=True)
class Experiment:
    """Its fields are the file's keys."""

    model: str
    text: Path
    documents: bool = False  # blank lines in the text separate documents
    tokens: int | None = None  # of the text; all
    window: int = 512  # tokens of one forward pass
    stride: int = 32  # from one window to the next
    layers: tuple[int, ...] = (0,)  # rows that leave these are rounded
    metrics: tuple[str, ...] = (*METRICS, RANDOM)
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)  # of the tokens
    bits: tuple[int, ...] = (4,)  # of those that are less important
    channels: tuple[str, ...] = (
        "8",
        "4",
        "1 mean",
        "1 maximum",
    )  # bits, and what one bit stands for
    cuts: tuple[int, ...] = ()  # all rows are rounded behind each, and behind one drawn per token
    first: int = 1  # layers that the metric `first` looks at
    relevance_texts: int = 8  # windows that the relevance of heads is measured on
    prompts: int = 0  # prompts of half a window whose rows get two widths; none
    continuation: int = 32  # tokens that are written on each prompt

    def __post_init__(self) -> None:
        for name in ("window", "stride", "first", "relevance_texts", "continuation"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.window < 4:
            raise SettingsError(f"window is {self.window}; expected at least 4")
        if self.stride > self.window:
            raise SettingsError(f"stride is {self.stride}; expected at most window, {self.window}")
        for bits in self.bits:
            if bits not in range(2, 9):
                raise SettingsError(f"bits has {bits}; expected 2 to 8")
        for metric in self.metrics:
            if metric not in METRICS and metric != RANDOM:
                raise SettingsError(f"metrics names {metric!r}; expected some of {list_metrics()}")
        for ratio in self.ratios:
            if not 0 <= ratio <= 1:
                raise SettingsError(f"ratios has {ratio}; expected shares between 0 and 1")
        for channel in self.channels:
            read_channel(channel)

    def check_layers(self, count: int) -> None:
        """Raises SettingsError for layers that a model of `count` layers does not have."""
        for name in ("layers", "cuts"):
            for layer in getattr(self, name):
                if layer not in range(count):
                    raise SettingsError(f"{name} has {layer}; expected 0 to {count - 1}")
        if self.first > count:
            raise SettingsError(f"first is {self.first}; the model has {count} layers")


def read_channel(text: str) -> tuple[int, str]:
    """Bits, and what size a single bit stands for. Raises SettingsError."""
    bits, _, by = text.partition(" ")
    by = by or "maximum"
    if not bits.isdecimal() or int(bits) not in range(1, 9) or by not in BY_SIZE:
        raise SettingsError(
            f"channels has {text!r}; expected bits from 1 to 8, and behind 1 {' or '.join(BY_SIZE)}"
        )
    return int(bits), by


def read_experiment(path: Path) -> Experiment:
    """Paths in the file are relative to it. Raises SettingsError for what it should not say."""
    try:
        values = tomllib.loads(read_text(path, "the experiment"))
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    kinds = {field.name: str(field.type) for field in fields(Experiment)}
    for name, value in values.items():
        if name not in kinds:
            raise SettingsError(f"{path} says {name}; expected {', '.join(kinds)}")
        values[name] = _read_value(path, name, value, kinds[name])
    for name in ("model", "text"):
        if name not in values:
            raise SettingsError(f"{path} does not say {name}")
    values["text"] = path.parent / values["text"]
    try:
        return Experiment(**values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,), "Path": (str,), "bool": (bool,), "int": (int,), "int | None": (int,),
    "tuple[int, ...]": (int,), "tuple[float, ...]": (int, float), "tuple[str, ...]": (str,),
}  # fmt: skip


def _read_value(path: Path, name: str, value: Any, kind: str) -> Any:
    is_list = kind.startswith("tuple")
    members = value if is_list and isinstance(value, list) else [value]
    if is_list != isinstance(value, list) or any(type(m) not in KINDS[kind] for m in members):
        words = kind.removesuffix(" | None").removeprefix("tuple[").removesuffix(", ...]")
        expected = f"a list of {words}" if is_list else words.replace("Path", "str")
        raise SettingsError(f"{path}: {name} is {value!r}; expected {expected}")
    return tuple(members) if is_list else value
