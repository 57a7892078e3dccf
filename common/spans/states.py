"""What layers keep of a whole text rather than of each token: state spaces, short convolutions.

A state is replaced at each step and is good for one position only, the number of tokens that it
has taken in. Nothing can be taken out of it again. So a session keeps the states of a few
positions: the newest, the one before, and those where a long step began or ended, to which a text
is mostly cut back. Whoever wants to go on from another position goes back to the newest of these
that is not beyond it, and computes the tokens from there again.

A pass has a copy, for the library's layers change states in place: one that fails leaves nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

CONVOLUTION, RECURRENT = "convolution", "recurrent"
NEURONS = "neurons"  # votes of a prompt for those that compute its answer (common/neurons)
MARKS = 2  # states kept besides the last two
HEADER = struct.Struct("<Q16s")  # position, digest of the layout

StateName: TypeAlias = tuple[int, str, int]  # layer, kind, which of its kind
Values: TypeAlias = Mapping[StateName, Tensor]


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Names, shapes and types of all that the layers of a span replace at each step."""

    names: tuple[StateName, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()

    @property
    def state_bytes(self) -> int:
        sizes = zip(self.shapes, self.dtypes, strict=True)
        return sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in sizes)

    @property
    def digest(self) -> bytes:
        """Tells states of other shapes or types apart."""
        text = repr((self.names, self.shapes, [str(dtype) for dtype in self.dtypes]))
        return hashlib.sha256(text.encode()).digest()[:16]


def layout_of(values: Values) -> StateLayout:
    """That of the values which a first pass has left."""
    names = tuple(sorted(values))
    return StateLayout(
        names,
        tuple(tuple(values[name].shape) for name in names),
        tuple(values[name].dtype for name in names),
    )


@dataclass(frozen=True, slots=True, eq=False)
class State:
    """What is kept of the first `position` tokens; at 0 nothing."""

    position: int
    values: Values = field(default_factory=dict)
    is_mark: bool = False  # a long step began or ended here


class Sized(Protocol):
    """Something that takes memory."""

    @property
    def size(self) -> int: ...


class States:
    """The states of one session in one span, by position; the last is the current one."""

    def __init__(self, layout: StateLayout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self._device = device
        self._state_bytes = layout.state_bytes
        self._kept = [State(0)]
        self._last_rows = 0  # of the last step
        self.cores: dict[int, Sized] = {}  # by layer; made of the current state, and made again
        self._cores_bytes = 0

    @property
    def current(self) -> State:
        return self._kept[-1]

    @property
    def position(self) -> int:
        """How many tokens the current state has taken in."""
        return self.current.position

    @property
    def held_bytes(self) -> int:
        return (len(self._kept) - 1) * self._state_bytes + self._cores_bytes

    def note_core(self, layer: int, core: Sized) -> None:
        """Keep what was made of the current state for one layer."""
        self.cores[layer] = core
        self._cores_bytes = sum(each.size for each in self.cores.values())

    def newest(self, position: int) -> State:
        """The newest state that is not beyond a position."""
        return next(state for state in reversed(self._kept) if state.position <= position)

    def cut_back(self, position: int) -> int:
        """Forget the states beyond `position`; returns that of the newest which is left."""
        while self.position > position:
            self._kept.pop()
        if not self.position:
            self.cores.clear()
            self._cores_bytes = 0
        return self.position

    def begin(self, rows: int) -> None:
        """A step of so many rows goes on from here, perhaps in several passes."""
        if max(rows, self._last_rows) > 1:
            self._kept[-1] = replace(self.current, is_mark=True)
        self._last_rows = rows

    def advance(self, end: int, values: Values) -> None:
        """A pass has taken the tokens up to `end` in. Raises ValueError for what does not fit."""
        if layout_of(values) != self.layout:
            raise ValueError("its layers keep states whose shapes or types change")
        empty, *kept = self._kept
        marks = [state for state in kept[:-1] if state.is_mark]
        self._kept = [empty, *marks[-MARKS:], *kept[-1:], State(end, values)]

    def adopt(self, state: State) -> None:
        """Go on from a state that was kept elsewhere."""
        self.cut_back(state.position - 1)
        self._kept.append(state)

    def pack(self, state: State) -> bytes:
        """A state as it goes into the store."""
        parts = [HEADER.pack(state.position, self.layout.digest)]
        for name in self.layout.names:
            flat = state.values[name].contiguous().cpu().reshape(-1).view(torch.uint8)
            parts.append(flat.numpy().tobytes())
        return b"".join(parts)

    def unpack(self, blob: bytes) -> State | None:
        """The reverse; None for what is no state of this layout."""
        if len(blob) != HEADER.size + self.layout.state_bytes:
            return None
        position, digest = HEADER.unpack_from(blob)
        if digest != self.layout.digest or position < 1:
            return None
        values, at = {}, HEADER.size
        for name, shape, dtype in zip(
            self.layout.names, self.layout.shapes, self.layout.dtypes, strict=True
        ):
            count = int(np.prod(shape))
            flat = torch.frombuffer(bytearray(blob[at : at + count * dtype.itemsize]), dtype=dtype)
            values[name] = flat.reshape(shape).to(self._device)
            at += count * dtype.itemsize
        return State(position, values)


class StatePass:
    """The states of a session while one step goes through, as transformers' layers ask for them.

    Raises ValueError where the session has no state of the position at which the step begins.
    """

    def __init__(self, states: States | None, start: int) -> None:
        self.values: dict[StateName, Tensor] = {}
        if states is None:
            return
        if states.position != start:
            raise ValueError(f"a step from row {start} on meets a state of {states.position} rows")
        self.values = {
            name: value if name[1] == NEURONS else value.clone()  # votes are replaced as a whole
            for name, value in states.current.values.items()
        }

    def find(self, name: StateName) -> Tensor | None:
        return self.values.get(name)

    def convolve(self, name: StateName, columns: Tensor, kernel: int | None) -> Tensor:
        """Take new columns (…, T) in; returns them behind those that were kept of the ones before.

        The first ones have zeros before them if they are fewer than the kernel reaches.
        """
        kept = self.values.get(name)
        if kept is not None:
            size = kept.shape[-1]
            full = torch.cat([kept, columns], dim=-1)
        else:
            size = kernel or columns.shape[-1]
            missing = max(0, size - columns.shape[-1])
            full = torch.nn.functional.pad(columns, (missing, 0))
        self.values[name] = full[..., -size:].clone()
        return full

    def replace(self, name: StateName, value: Tensor) -> Tensor:
        """Put a new state in the place of the last, in the type that the first one had."""
        kept = self.values.get(name)
        self.values[name] = value.to(kept.dtype if kept is not None else value.dtype)
        return self.values[name]
