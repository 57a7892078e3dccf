"""Sessions in a worker's memory, and the bound that all services of the worker have together."""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

MAX_SESSIONS = 8192


class Sized(Protocol):
    """A session that knows how many bytes it has."""

    @property
    def size(self) -> int: ...


S = TypeVar("S", bound=Sized)


@dataclass(frozen=True, slots=True, order=True)
class Idle:
    """A session that may be dropped; the one that was used longest ago sorts first."""

    used_at: float
    session_key: bytes
    size: int
    cache: int  # its index in the budget


class CacheBudget:
    """What was used longest ago goes first, whosever it is, when all caches exceed `limit_bytes`.

    Or when there are too many: a session that nobody ends and that has no rows takes room, too.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._caches: list[SessionCache[Sized]] = []

    def join(self, cache: SessionCache[S]) -> None:
        """A cache is bounded together with the others from now on."""
        self._caches.append(cache)  # type: ignore[arg-type]  # of any sessions

    def used_bytes(self) -> int:
        """What all caches have."""
        return sum(cache.used_bytes() for cache in self._caches)

    def evict(self, keep: Collection[bytes] = ()) -> int:
        """Drop sessions that are neither busy nor to be kept until the limits hold; how many."""
        used = self.used_bytes()
        count = sum(len(cache) for cache in self._caches)
        dropped = 0
        if used <= self.limit_bytes and count <= MAX_SESSIONS:
            return 0
        for idle in heapq.merge(*(cache.idle(i) for i, cache in enumerate(self._caches))):
            if used <= self.limit_bytes and count - dropped <= MAX_SESSIONS:
                break
            if idle.session_key not in keep:
                self._caches[idle.cache].drop(idle.session_key)
                used -= idle.size
                dropped += 1
        return dropped


class SessionCache(Generic[S]):
    """The sessions of one service by their keys. `find_busy` names those that must stay."""

    def __init__(self, budget: CacheBudget, find_busy: Callable[[], Collection[bytes]]) -> None:
        self._find_busy = find_busy
        self._sessions: OrderedDict[bytes, tuple[float, S]] = OrderedDict()
        budget.join(self)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[S]:
        return iter([session for _, session in self._sessions.values()])

    def find(self, session_key: bytes) -> S | None:
        known = self._sessions.get(session_key)
        return known[1] if known is not None else None

    def use(self, session_key: bytes, make: Callable[[], S]) -> S:
        """The session, most recently used from now on; made if it is new here."""
        session = self.find(session_key) or make()
        self._sessions[session_key] = (time.monotonic(), session)
        self._sessions.move_to_end(session_key)
        return session

    def drop(self, session_key: bytes) -> None:
        self._sessions.pop(session_key, None)

    def used_bytes(self) -> int:
        return sum(session.size for _, session in self._sessions.values())

    def idle(self, index: int) -> list[Idle]:
        """What may be dropped, the longest unused first, under this cache's index."""
        busy = self._find_busy()
        return [
            Idle(used_at, key, session.size, index)
            for key, (used_at, session) in self._sessions.items()
            if key not in busy
        ]
