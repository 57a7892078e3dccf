"""The steps that wait for one service: a queue for each edge, taken in turn.

An edge with a thousand sessions waits behind itself: whoever else comes is next but one.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from common.messages import StepKey

LOOK_AHEAD = 16  # of one edge's steps, when its first cannot go yet


class FairQueue:
    """Steps by account, in the order in which they came; accounts in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[bytes, deque[StepKey]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[StepKey]:
        return (key for waiting in self._waiting.values() for key in waiting)

    def add(self, account: bytes, key: StepKey) -> None:
        self._waiting.setdefault(account, deque()).append(key)
        self._count += 1

    def add_first(self, account: bytes, key: StepKey) -> None:
        """Before the others of its edge, whose turn is next: it has waited already."""
        self._waiting.setdefault(account, deque()).appendleft(key)
        self._waiting.move_to_end(account, last=False)
        self._count += 1

    def remove(self, account: bytes, key: StepKey) -> None:
        waiting = self._waiting[account]
        waiting.remove(key)
        self._count -= 1
        if not waiting:
            del self._waiting[account]

    def accounts(self) -> list[bytes]:
        """Whose turn it is, first to last."""
        return list(self._waiting)

    def first(self, account: bytes) -> list[StepKey]:
        """The steps of an edge that may go next, best first."""
        waiting = self._waiting.get(account, ())
        return [key for key, _ in zip(waiting, range(LOOK_AHEAD), strict=False)]

    def served(self, account: bytes) -> None:
        """An edge had its turn."""
        if account in self._waiting:
            self._waiting.move_to_end(account)
