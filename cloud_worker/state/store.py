"""What a worker asks of a KV store, and what comes back: the protocol both stores keep.

A store never blocks the worker's loop: `begin_*` starts an operation, `poll` returns what has
finished since. Per session a store keeps fixed-size rows and a record that says what they are:
shape (model, span, dtype, row size), generation, step, writer and position, the number of valid
rows. Rows without their record, or with another shape, are a miss, never an answer.

The fence. A commit writes rows start..end of (generation, step) and is refused
  - as `stale`, if the record has a newer generation or, in the same generation, a newer step, or
    the same step begun by another writer since;
  - as `gap`, if `start` is beyond the rows that are valid for its generation, or beyond those that
    are there: a server that evicts may have dropped a part of a session, or its record.
A commit of a step that is there already is answered with `Committed` and writes nothing. Check
and write are one atomic step, else a stale writer could pass the check and write later.

A store that is given `share_bytes` has at most so many of one account, an edge. A commit beyond
that is refused as `over`, and its session computed again from its edge when a worker takes over.
A session counts for the most bytes it had, rounded up, until it is deleted or expires.

A `session_key` is the session's name and the right to it at once: 16 random bytes from the edge,
and the edge's own public key where keys are used. A worker learns it with the session's first step.

Repeated steps are computed again rather than answered from a stored reply: KV rows depend only on
boundary rows, so the result is the same, and a stored reply would double what every step commits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

CHUNK_BYTES = 1 << 20
COUNTED_BYTES = 64 << 10  # a session counts in these for its account: it is not asked at every step


@dataclass(frozen=True, slots=True)
class Commit:
    """Write rows start..end, all within one chunk."""

    session_key: bytes
    shape: str
    generation: int
    fork: int  # rows below this are the same as in generation - 1
    step: int
    writer: str
    start: int
    end: int
    continues: bool  # not the first piece of this step by this writer
    rows: bytes
    row_bytes: int
    account: str = ""  # whose share of the store it takes; nobody's if empty


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a load. `rows` is a view of memory that is used again after the call."""

    start: int
    rows: memoryview
    end: int  # of all rows that the load can have, as far as is known
    written_in: int  # the generation that the store names; not to be believed


PartTaker: TypeAlias = Callable[[Part], bool]  # whether it wants those after it, too


@dataclass(frozen=True, slots=True)
class Load:
    """Read rows start..end, or as many of them as are valid for the generation.

    With `take` rows are handed over in order, as they come, from within `poll`; `Loaded` then
    says that no more will, and has none.
    """

    session_key: bytes
    shape: str
    generation: int
    fork: int
    start: int
    end: int
    row_bytes: int
    take: PartTaker | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """The store has the session's rows up to `position`."""

    session_key: bytes
    generation: int
    position: int


@dataclass(frozen=True, slots=True)
class CommitRefused:
    """`stale`: a newer writer is at work. `gap`: only rows below `position` are there.

    `over`: the account has its share of the store.
    """

    session_key: bytes
    generation: int
    code: str
    position: int


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """The store could not be asked, or could not write; nothing is known to be committed."""

    session_key: bytes
    generation: int
    reason: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """Rows from `start` on: empty when the store has none of them or cannot be asked.

    A store that is slow gives up, so that the edge sends what it has not loaded.
    """

    session_key: bytes
    generation: int
    start: int
    rows: bytes
    written_in: int  # the generation that the store names; not to be believed
    given_up: bool = False


StoreEvent = Committed | CommitRefused | CommitFailed | Loaded


class KvStore(Protocol):
    """See the module's own text for what must hold."""

    @property
    def identity(self) -> str:
        """Of the server behind it: workers must share one. Empty if it does not say."""
        ...

    @property
    def eviction_policy(self) -> str:
        """Of that server; empty if it does not say."""
        ...

    def begin_commit(self, commit: Commit) -> None: ...

    def begin_load(self, load: Load) -> None: ...

    def begin_delete(self, session_key: bytes) -> None: ...

    def poll(self) -> list[StoreEvent]:
        """What has finished. Never waits."""
        ...

    def fileno(self) -> int | None:
        """A descriptor that becomes readable when `poll` may have something, if there is one."""
        ...

    def is_sending(self) -> bool:
        """Whether something waits until the descriptor can be written to."""
        ...

    def is_up(self) -> bool:
        """False while the store is known not to answer."""
        ...

    def close(self) -> None: ...


def usable_rows(record_generation: int, record_position: int, generation: int, fork: int) -> int:
    """How many rows of a record hold in a generation that shares `fork` rows with the last."""
    if record_generation == generation:
        return record_position
    if record_generation == generation - 1:
        return min(record_position, fork)
    return 0


def counted_bytes(commit: Commit) -> int:
    """What a session with these rows counts for."""
    return -(-commit.end * commit.row_bytes // COUNTED_BYTES) * COUNTED_BYTES


def chunk_rows(row_bytes: int) -> int:
    """How many rows one chunk of about 1 MB holds."""
    return max(1, CHUNK_BYTES // max(1, row_bytes))
