"""Layers that take turns in memory: while one computes, a thread reads the next.

A span passes its layers in the same order each time, so the thread reads them in a circle, as far
ahead as there is memory: when a pass is over it goes on with the first ones of the next.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from common.errors import SettingsError, in_one_line

AHEAD = 2  # layers of which one computes and one is read
LEAST_RESIDENT = AHEAD


class Reader(Protocol):
    """Where the weights of a layer come from; common/weights/layer_reader.py has the real one."""

    size: int

    def views(self, memory: Tensor) -> dict[str, Tensor]: ...

    def read_into(self, memory: Tensor) -> None: ...


@dataclass(slots=True, eq=False)
class _Slot:
    """Memory of one layer, where it computes."""

    memory: Tensor
    used: Any = None  # a CUDA event behind the last computation with it


@dataclass(slots=True, eq=False)
class _Reading:
    """A layer in a slot, or on its way there."""

    layer: int
    slot: _Slot
    is_over: bool = False
    error: Exception | None = None


def choose_streamed(layers: int, resident: int) -> list[int]:
    """Which of a span's layers take turns, if `resident` of them may be in memory at once.

    All but `resident` - 2 do, in two slots; the others stay, spread evenly, so that there is time
    to read while they compute. Raises SettingsError below 2.
    """
    if resident < LEAST_RESIDENT:
        raise SettingsError(
            f"{resident} layers in memory are too few; expected at least {LEAST_RESIDENT}, one "
            "that computes and one that is being read"
        )
    if resident >= layers:
        return []
    count = layers - (resident - AHEAD)
    return [index * layers // count for index in range(count)]


class LayerStream:
    """The layers of one span that take turns. Used by one thread at a time."""

    def __init__(
        self,
        readers: Mapping[int, Reader],
        device: torch.device | str,
        allocate: Callable[[int], Tensor],
    ) -> None:
        """`readers` by layer, in the order of use; `allocate` gives bytes of the CPU's memory."""
        self._readers = dict(readers)
        self._order = list(readers)
        self._device = torch.device(device)
        size = max(reader.size for reader in readers.values())
        self._on_cpu = self._device.type == "cpu"
        if self._on_cpu:
            slots = [_Slot(allocate(size)) for _ in range(AHEAD)]
        else:
            slots = [
                _Slot(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(AHEAD)
            ]
            self._pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._changed = threading.Condition()
        self._free = deque(slots)
        self._ahead: deque[_Reading] = deque()  # in the order of use
        self._next = 0  # index in the order, of what is read next
        self._thread: threading.Thread | None = None
        self.failure = ""  # why the last pass that failed could not read a layer

    def __len__(self) -> int:
        return len(self._order)

    def put_around(self, index: int, layer: nn.Module) -> None:
        """Let a layer have its weights while its forward runs, and no longer."""
        inner = layer.forward
        owners = {name: _owner_of(layer, name) for name, _ in layer.named_parameters()}
        empty = {name: owner._parameters[leaf] for name, (owner, leaf) in owners.items()}

        def forward(*args: Any, **kwargs: Any) -> Any:
            reading = self._take(index)
            try:
                views = self._readers[index].views(reading.slot.memory)
                for name, (owner, leaf) in owners.items():
                    owner._parameters[leaf] = nn.Parameter(views[name], requires_grad=False)
                return inner(*args, **kwargs)
            finally:
                for name, (owner, leaf) in owners.items():
                    owner._parameters[leaf] = empty[name]
                self._give_back(reading)

        layer.forward = forward

    def _take(self, index: int) -> _Reading:
        """Wait until a layer is in memory. Raises what reading it has raised, twice."""
        failures = 0
        with self._changed:
            self._start()
            while True:
                if not self._ahead:  # the first pass, or something has failed before
                    self._next = self._order.index(index)
                elif self._ahead[0].is_over:
                    reading = self._ahead.popleft()
                    if reading.layer == index and reading.error is None:
                        return reading
                    self._free.append(reading.slot)
                    if reading.layer == index:
                        failures += 1
                        if failures == 2 and reading.error is not None:
                            self.failure = in_one_line(reading.error)
                            raise reading.error
                    continue
                self._changed.notify_all()
                self._changed.wait()

    def _give_back(self, reading: _Reading) -> None:
        if not self._on_cpu:
            reading.slot.used = torch.cuda.current_stream(self._device).record_event()
        with self._changed:
            self._free.append(reading.slot)
            self._changed.notify_all()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._read_on, name="layers", daemon=True)
            self._thread.start()

    def _read_on(self) -> None:
        """In the thread: fill every slot that is free with the layer whose turn it is."""
        stream: Any = None
        if not self._on_cpu:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        while True:
            with self._changed:
                while not self._free:
                    self._changed.wait()
                reading = _Reading(self._order[self._next], self._free.popleft())
                self._next = (self._next + 1) % len(self._order)
                self._ahead.append(reading)
            try:
                self._fill(reading, stream)
            except Exception as error:  # the pass that wants this layer raises it
                reading.error = error
            with self._changed:
                reading.is_over = True
                self._changed.notify_all()

    def _fill(self, reading: _Reading, stream: Any) -> None:
        reader, slot = self._readers[reading.layer], reading.slot
        if stream is None:
            reader.read_into(slot.memory)
            return
        reader.read_into(self._pinned)
        with torch.cuda.stream(stream):
            if slot.used is not None:
                stream.wait_event(slot.used)
            slot.memory.copy_(self._pinned, non_blocking=True)
        stream.synchronize()


def _owner_of(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    owner, _, leaf = name.rpartition(".")
    return layer.get_submodule(owner), leaf
