"""Which spans of which models go to which devices: sizes in, placements out.

A model stays whole where it fits, on the device that it leaves the least room on; larger models
choose first. One that fits nowhere is cut over the devices with most room, as few as will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import SettingsError
from common.spans.cut import Span


@dataclass(frozen=True, slots=True)
class Layers:
    """The middle of a model: what each of its layers takes, from layer `first` on."""

    model: str
    first: int
    bytes_each: Sequence[int]

    @property
    def total(self) -> int:
        return sum(self.bytes_each)


@dataclass(frozen=True, slots=True)
class Placement:
    """A worker with a span of a model, on a device by its index."""

    device: int
    model: str
    span: Span
    layer_bytes: int


def place(models: Sequence[Layers], room: Sequence[int], worker_bytes: int) -> list[Placement]:
    """Workers for all models, by device. Each takes `worker_bytes` beside its layers.

    Raises SettingsError for models that do not fit, which says what is lacking.
    """
    free, placed = list(room), list[Placement]()
    for model in sorted(models, key=lambda model: -model.total):
        fitting = [i for i, size in enumerate(free) if size >= model.total + worker_bytes]
        devices = [min(fitting, key=lambda i: free[i])] if fitting else _most_room_first(free)
        parts = _cut_over(model, devices, free, worker_bytes)
        for part in parts:
            free[part.device] -= part.layer_bytes + worker_bytes
        placed += parts
    return sorted(placed, key=lambda part: (part.device, part.model, part.span))


def _most_room_first(free: Sequence[int]) -> list[int]:
    return sorted(range(len(free)), key=lambda i: -free[i])


def _cut_over(
    model: Layers, devices: Sequence[int], free: Sequence[int], worker_bytes: int
) -> list[Placement]:
    """As many layers as each device takes, one device after another."""
    parts, at = list[Placement](), 0
    for device in devices:
        left, begin, used = free[device] - worker_bytes, at, 0
        while at < len(model.bytes_each) and used + model.bytes_each[at] <= left:
            used += model.bytes_each[at]
            at += 1
        if at > begin:
            span = Span(model.first + begin, model.first + at)
            parts.append(Placement(device, model.model, span, used))
    if at < len(model.bytes_each):
        lacking = sum(model.bytes_each[at:])
        raise SettingsError(
            f"{model.model} does not fit: its layers from {model.first + at} on take "
            f"{lacking / 1e9:.2f} GB more than the devices have; add one, keep more layers on the "
            "edge (--span), store less KV (--kv-tokens) or choose a smaller --dtype"
        )
    return parts
