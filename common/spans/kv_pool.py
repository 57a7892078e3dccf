"""Memory for the KV of many sessions: one arena, handed out in runs of slots and used again.

A page that is touched for the first time costs more than ten times what copying into it does, and
a session that is taken over needs thousands of them at once. So the arena keeps some memory beyond
what is in use touched in advance, by a thread that works when a session has just been given room,
and what a session leaves is used by the next without going back to the system. A session's slots
lie side by side, for attention reads its rows as one strided view; it grows in place while the
slots behind it are free.

The lowest free slots are taken first, so what is in use and what was touched is a beginning of the
arena, and its rest is only addresses.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import threading
import time
from dataclasses import dataclass

import torch
from torch import Tensor

log = logging.getLogger("midspan.kv")

REFILL_AFTER_S = 0.1  # a session that was given room is computed first
PIECE_BYTES = 256 << 10  # touched at once; whoever needs the pool waits for no more
NO_RESERVE = (
    0x4000 if hasattr(mmap, "MADV_DONTNEED") else 0
)  # Linux: addresses, no promise of memory


@dataclass(slots=True)
class Slots:
    """`count` slots from `start` on."""

    start: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.count


class SlotPool:
    """Slots of `slot_bytes`, `limit_bytes` in all, of which `reserve_bytes` wait touched."""

    def __init__(self, slot_bytes: int, limit_bytes: int, reserve_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self._reserve_bytes = reserve_bytes
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count = min(limit_bytes, physical) // slot_bytes
        try:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            arena = mmap.mmap(-1, max(1, count) * slot_bytes, flags=flags)
        except (OSError, ValueError) as error:
            log.warning("KV is not pooled: %s", error)
            count, arena = 0, mmap.mmap(-1, slot_bytes)
        self._arena = arena
        self._bytes = torch.frombuffer(arena, dtype=torch.uint8)
        self._free = [Slots(0, count)] if count else []  # in order, never side by side
        self._used = 0  # slots
        self._touched_bytes = 0  # from the arena's beginning on
        self._most_bytes = count * slot_bytes  # that may be touched
        self._lock = threading.Lock()
        self._refilling = False
        self._refill()

    @property
    def touched_bytes(self) -> int:
        """What the arena has of the system's memory, in use or not."""
        return self._touched_bytes

    def take(self, count: int) -> Slots | None:
        """So many slots side by side, touched; None if there is no such room."""
        with self._lock:
            for index, run in enumerate(self._free):
                if run.count >= count:
                    return self._cut(index, count)
        return None

    def extend(self, slots: Slots, count: int) -> bool:
        """Make a run `count` slots long in its place, if those behind it are free."""
        more = count - slots.count
        with self._lock:
            for index, run in enumerate(self._free):
                if run.start == slots.end and run.count >= more:
                    slots.count += self._cut(index, more).count
                    return True
        return False

    def give_back(self, slots: Slots) -> None:
        """Whoever had the slots must not touch them any more."""
        with self._lock:
            self._used -= slots.count
            runs = sorted([*self._free, Slots(slots.start, slots.count)], key=lambda r: r.start)
            self._free = runs[:1]
            for run in runs[1:]:
                if run.start == self._free[-1].end:
                    self._free[-1].count += run.count
                else:
                    self._free.append(run)

    def memory(self, slots: Slots) -> Tensor:
        """The bytes of a run, uint8."""
        return self._bytes[slots.start * self.slot_bytes : slots.end * self.slot_bytes]

    def limit(self, most_bytes: int) -> None:
        """Have no more than so much touched from now on, except for what is in use."""
        with self._lock:
            self._most_bytes = min(most_bytes, len(self._bytes))
            last = self._free[-1] if self._free else None
            is_open = last is not None and last.end * self.slot_bytes == len(self._bytes)
            in_use = last.start * self.slot_bytes if last and is_open else len(self._bytes)
            keep = -(-max(in_use, self._most_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
            if keep < self._touched_bytes and hasattr(mmap, "MADV_DONTNEED"):
                self._arena.madvise(mmap.MADV_DONTNEED, keep, self._touched_bytes - keep)
                self._touched_bytes = keep
            self._refill()

    # --- with the lock

    def _cut(self, index: int, count: int) -> Slots:
        run = self._free[index]
        slots = Slots(run.start, count)
        run.start, run.count = run.start + count, run.count - count
        if not run.count:
            del self._free[index]
        self._used += count
        self._touch(slots.end * self.slot_bytes)
        self._refill()
        return slots

    def _touch(self, end: int) -> None:
        if end > self._touched_bytes:  # not by torch, which may start threads for it
            begin = self._bytes.data_ptr() + self._touched_bytes
            ctypes.memset(begin, 0, end - self._touched_bytes)  # others run meanwhile
            self._touched_bytes = end

    def _lacks_reserve(self) -> bool:
        spare = self._touched_bytes - self._used * self.slot_bytes
        return spare < self._reserve_bytes and self._touched_bytes < self._most_bytes

    def _refill(self) -> None:
        if not self._refilling and self._lacks_reserve():
            self._refilling = True
            threading.Thread(target=self._touch_reserve, daemon=True).start()

    # --- in a thread

    def _touch_reserve(self) -> None:
        time.sleep(REFILL_AFTER_S)
        while True:
            with self._lock:
                if not self._lacks_reserve():
                    self._refilling = False
                    return
                self._touch(min(self._touched_bytes + PIECE_BYTES, self._most_bytes))
