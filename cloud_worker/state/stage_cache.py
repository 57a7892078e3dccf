"""Stages in a worker's memory, and the bound that all services of the worker have together."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from cloud_worker.state.stage import Stage

MAX_STAGES = 8192


S = TypeVar("S", bound=Stage)


@dataclass(frozen=True, slots=True, order=True)
class Idle:
    """A stage that may be dropped; the one that was used longest ago sorts first."""

    used_at: float
    key: bytes
    size: int
    cache: int  # its index in the budget


class CacheBudget:
    """What was used longest ago goes first, whosever it is, when all caches exceed `limit_bytes`.

    Or when there are too many: a stage that nobody ends and that has no rows takes room, too.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._caches: list[StageCache[Stage]] = []

    def join(self, cache: StageCache[S]) -> None:
        """A cache is bounded together with the others from now on."""
        self._caches.append(cache)  # type: ignore[arg-type]  # of any stages

    def used_bytes(self) -> int:
        """What all caches have."""
        return sum(cache.used_bytes() for cache in self._caches)

    def evict(self, keep: Collection[bytes] = ()) -> int:
        """Drop stages that are neither busy nor to be kept until the limits hold; how many."""
        used = self.used_bytes()
        count = sum(len(cache) for cache in self._caches)
        dropped = 0
        if used <= self.limit_bytes and count <= MAX_STAGES:
            return 0
        for idle in heapq.merge(*(cache.idle(i) for i, cache in enumerate(self._caches))):
            if used <= self.limit_bytes and count - dropped <= MAX_STAGES:
                break
            if idle.key not in keep:
                self._caches[idle.cache].drop(idle.key)
                used -= idle.size
                dropped += 1
        return dropped


class StageCache(Generic[S]):
    """The stages of one service by their keys. `find_busy` names those that must stay."""

    def __init__(self, budget: CacheBudget, find_busy: Callable[[], Collection[bytes]]) -> None:
        self._find_busy = find_busy
        self._stages: OrderedDict[bytes, tuple[float, S]] = OrderedDict()
        budget.join(self)

    def __len__(self) -> int:
        return len(self._stages)

    def __iter__(self) -> Iterator[S]:
        return iter([stage for _, stage in self._stages.values()])

    def find(self, key: bytes) -> S | None:
        known = self._stages.get(key)
        return known[1] if known is not None else None

    def use(self, key: bytes, make: Callable[[], S]) -> S:
        """The stage, most recently used from now on; made if it is new here."""
        stage = self.find(key) or make()
        self._stages[key] = (time.monotonic(), stage)
        self._stages.move_to_end(key)
        return stage

    def drop(self, key: bytes) -> None:
        dropped = self._stages.pop(key, None)
        if dropped is not None:
            dropped[1].release()

    def used_bytes(self) -> int:
        return sum(stage.size for _, stage in self._stages.values())

    def idle(self, index: int) -> list[Idle]:
        """What may be dropped, the longest unused first, under this cache's index."""
        busy = self._find_busy()
        return [
            Idle(used_at, key, stage.size, index)
            for key, (used_at, stage) in self._stages.items()
            if key not in busy
        ]
