"""Where the tensors of a safetensors file lie in it, for reading them without mapping the file.

The layout is of https://huggingface.co/docs/safetensors: eight bytes that count the header's, the
header as JSON with each tensor's type, shape and place behind the header, then the values.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import CheckpointError

TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True, slots=True)
class Place:
    """The bytes of one tensor in a file."""

    path: Path
    offset: int
    size: int
    dtype: torch.dtype


def read_places(path: Path) -> dict[str, Place]:
    """The places of all tensors of floating-point numbers. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            (header_size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(header_size))
        return {
            name: _place_of(path, 8 + header_size, said)
            for name, said in header.items()
            if name != "__metadata__" and said["dtype"] in TYPES
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, MemoryError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _place_of(path: Path, values_at: int, said: dict[str, Any]) -> Place:
    begin, end = said["data_offsets"]
    return Place(path, values_at + begin, end - begin, TYPES[said["dtype"]])
