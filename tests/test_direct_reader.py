"""Bytes of files read past the system's cache are those that are in the file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from common.errors import CheckpointError
from common.weights.direct_reader import BLOCK, SECTOR, DirectReader
from common.weights.safetensors_places import Place

SIZE = 2 * BLOCK + 3 * SECTOR + 1001
RANGES = [
    (0, 8),
    (7, 1),
    (SECTOR - 3, 6),
    (BLOCK - 5, 10),
    (BLOCK + SECTOR, SECTOR),
    (101, 2 * BLOCK),
    (SIZE - 1500, 1500),
    (0, SIZE),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "bytes"
    path.write_bytes(os.urandom(SIZE))
    return path


def place_of(path: Path, offset: int, size: int) -> Place:
    return Place(path, offset, size, torch.float32, path.stat().st_mtime_ns)


def test_places_at_any_offset_are_read_together(path: Path) -> None:
    want = path.read_bytes()
    memories = [torch.zeros(size, dtype=torch.uint8) for _, size in RANGES]
    places = [place_of(path, offset, size) for offset, size in RANGES]
    DirectReader().read_into(zip(memories, places, strict=True))
    for (offset, size), memory in zip(RANGES, memories, strict=True):
        assert memory.numpy().tobytes() == want[offset : offset + size], (offset, size)


def test_a_file_system_without_a_way_past_its_cache_is_read_as_usual() -> None:
    path = Path("/proc/self/cmdline")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(path, os.O_RDONLY | os.O_DIRECT)
    memory = torch.zeros(8, dtype=torch.uint8)
    place = Place(path, 0, 8, torch.float32, path.stat().st_mtime_ns)
    DirectReader().read_into([(memory, place)])
    assert memory.numpy().tobytes() == path.read_bytes()[:8]


@pytest.mark.parametrize(
    ("offset", "size", "room", "words"),
    [
        (SIZE - 10, 11, 11, "has become shorter than it was"),
        (SIZE + 2 * SECTOR, 4, 4, "has become shorter than it was"),
        (0, 12, 8, "has 12 bytes where its shape needs 8"),
    ],
)
def test_what_does_not_fit_is_named(
    path: Path, offset: int, size: int, room: int, words: str
) -> None:
    wanted = [(torch.zeros(room, dtype=torch.uint8), place_of(path, offset, size))]
    with pytest.raises(CheckpointError, match=words):
        DirectReader().read_into(wanted)


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    place = Place(tmp_path / "away", 0, 4, torch.float32, 0)
    with pytest.raises(CheckpointError, match=r"away cannot be read: there is no such file"):
        DirectReader().read_into([(torch.zeros(4, dtype=torch.uint8), place)])
