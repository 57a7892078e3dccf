"""Steps that wait, a queue for each edge, taken in turn; every operation takes constant time.

An edge with a thousand sessions waits behind itself: whoever else comes is next but one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from broker.ledger import Account
from common.protocol.messages import StepKey


class FairQueue:
    """Steps by account, in the order in which they came; accounts in turn."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Account, OrderedDict[StepKey, None]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[StepKey]:
        return (key for keys in self._waiting.values() for key in keys)

    def add(self, account: Account, key: StepKey) -> None:
        keys = self._waiting.get(account)
        if keys is None:
            keys = self._waiting[account] = OrderedDict()
        keys[key] = None
        self._count += 1

    def add_first(self, account: Account, key: StepKey) -> None:
        """Before the others of its edge, whose turn is next: it has waited already."""
        self.add(account, key)
        self._waiting[account].move_to_end(key, last=False)
        self._waiting.move_to_end(account, last=False)

    def remove(self, account: Account, key: StepKey) -> None:
        keys = self._waiting[account]
        del keys[key]
        self._count -= 1
        if not keys:
            del self._waiting[account]

    def accounts(self) -> Iterator[Account]:
        """Whose turn it is, first to last. Ends with the first `take`."""
        return iter(self._waiting)

    def take(self, account: Account) -> StepKey:
        """The first step of an edge, whose next turn comes after all others'."""
        keys = self._waiting[account]
        key, _ = keys.popitem(last=False)
        self._count -= 1
        if keys:
            self._waiting.move_to_end(account)
        else:
            del self._waiting[account]
        return key
