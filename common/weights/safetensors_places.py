"""Where the tensors of a safetensors file lie in it, and their bytes, past the library's mapping.

Pages of a mapped file stay in memory as long as the system likes, and count as this process's: a
part that is copied out of one takes its weights' memory twice.

The layout is of https://huggingface.co/docs/safetensors: eight bytes that count the header's, the
header as JSON with each tensor's type, shape and place behind the header, then the values.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import CheckpointError, why_unreadable

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Place:
    """The bytes of one tensor in a file."""

    path: Path
    offset: int
    size: int
    dtype: torch.dtype
    written_at: int  # the file's time, in ns: of bytes written later nobody knows whose they are


class PlaceReader:
    """Reads bytes of files, which it keeps open. Raises CheckpointError."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}

    def read_into(self, memory: Tensor, place: Place) -> None:
        """Fill `memory`, as many bytes as the place has, uint8 on the CPU."""
        check_size(memory, place)
        left, at = memoryview(memory.numpy().data), place.offset
        try:
            while left:
                count = os.preadv(self._open(place.path), [left], at)
                if not count:
                    raise CheckpointError(f"{place.path} has become shorter than it was")
                left, at = left[count:], at + count
            check_unchanged(self._open(place.path), place)
        except OSError as error:
            raise CheckpointError(
                f"{place.path} cannot be read: {why_unreadable(error)}"
            ) from error

    def _open(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def check_size(memory: Tensor, place: Place) -> None:
    """Raise CheckpointError unless a memory of bytes is as long as a place."""
    if memory.numel() != place.size:
        raise CheckpointError(
            f"{place.path} has {place.size} bytes where its shape needs {memory.numel()}"
        )


def check_unchanged(file: int, place: Place) -> None:
    """Raise CheckpointError if an open file has been written to since its places were read."""
    if os.fstat(file).st_mtime_ns != place.written_at:
        raise CheckpointError(
            f"{place.path} has been written to since it was opened; start again with what it is now"
        )


def read_places(path: Path) -> dict[str, Place]:
    """The places of all tensors of floating-point numbers. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
            written_at = os.fstat(file.fileno()).st_mtime_ns
        return {
            name: _place_of(path, 8 + header_size, said, written_at)
            for name, said in header.items()
            if name != "__metadata__" and said["dtype"] in TYPES
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {why_unreadable(error)}"
        ) from error


def _place_of(path: Path, values_at: int, said: dict[str, Any], written_at: int) -> Place:
    begin, end = said["data_offsets"]
    return Place(path, values_at + begin, end - begin, TYPES[said["dtype"]], written_at)
