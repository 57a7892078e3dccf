"""Read bytes of files past the system's cache of files, several blocks at a time.

Weights that are read again and again and do not fit into memory gain nothing from that cache: each
page is put there, found a place by driving out another, and is gone when its turn comes again.
Without it a disk is read at its own speed, and the memory of the machine, or of a container, is
left to layers.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from common.errors import CheckpointError, why_unreadable
from common.weights.safetensors_places import Place, check_size, check_unchanged

SECTOR = 4096  # bytes; what disks and file systems ask offsets, sizes and memory to be multiples of
BLOCK = 1 << 20  # bytes
AT_ONCE = 2  # blocks: while one is copied to where it belongs, the disk reads another


class DirectReader:
    """Reads places of files, which it keeps open. Raises CheckpointError.

    Where a file system has no such way (O_DIRECT), files are read as usual.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="disk")
        self._of_thread = threading.local()

    def read_into(self, wanted: Iterable[tuple[Tensor, Place]]) -> None:
        """Fill each memory, uint8 on the CPU, with the bytes of its place, which are as many."""
        blocks = []
        for memory, place in wanted:
            check_size(memory, place)
            file = self._open(place.path)
            for begin, end in _cut_in_blocks(place.offset, place.offset + place.size):
                part = memory[begin - place.offset : end - place.offset]
                blocks.append(self._pool.submit(self._read_block, part, place, file, begin))
        wait(blocks)  # all, even if one has failed: the memory is theirs until then
        for block in blocks:
            block.result()

    def _read_block(self, memory: Tensor, place: Place, file: int, begin: int) -> None:
        """Bytes of one block of the file, from `begin` on, as many as the memory has."""
        scratch = self._own_scratch()
        first = begin // SECTOR * SECTOR
        count = begin - first + memory.numel()
        try:
            if _read_sectors(file, scratch, first, count) < count:
                raise CheckpointError(f"{place.path} has become shorter than it was")
            check_unchanged(file, place)
        except OSError as error:
            raise CheckpointError(
                f"{place.path} cannot be read: {why_unreadable(error)}"
            ) from error
        memory.copy_(torch.frombuffer(scratch, dtype=torch.uint8)[begin - first : count])

    def _own_scratch(self) -> mmap.mmap:
        if not hasattr(self._of_thread, "scratch"):
            self._of_thread.scratch = mmap.mmap(-1, BLOCK)  # begins at a page
        scratch: mmap.mmap = self._of_thread.scratch
        return scratch

    def _open(self, path: Path) -> int:
        if path not in self._files:
            try:
                self._files[path] = _open_direct(path)
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {why_unreadable(error)}") from error
        return self._files[path]

    def close(self) -> None:
        self._pool.shutdown()
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


def _cut_in_blocks(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Ranges that lie within one block of the file each, so that a block is read once."""
    for at in range(begin // BLOCK * BLOCK, end, BLOCK):
        yield max(at, begin), min(at + BLOCK, end)


def _read_sectors(file: int, memory: mmap.mmap, first: int, count: int) -> int:
    """Read whole sectors from `first` on that hold `count` bytes; how many bytes came."""
    have, asked = 0, -(-count // SECTOR) * SECTOR
    while have < count:
        with memoryview(memory)[have:asked] as room:
            got = os.preadv(file, [room], first + have)
        have += got
        if not got or got % SECTOR:  # the end of the file
            break
    return have


def _open_direct(path: Path) -> int:
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags)
