"""The sessions whose KV is in this worker's memory: a bounded cache, worth nothing once lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from cloud_worker.state.row_seals import RowSeal
from cloud_worker.state.session_cache import CacheBudget, SessionCache
from common.protocol.messages import Step, StepReply
from common.spans.kv_rows import KvRows

LARGE_REPLY_BYTES = 1 << 16


@dataclass(slots=True)
class WarmSession:
    """One session's KV rows, how many of them are final, and how much of those is committed.

    Rows from `final` on are drafts. They are worth something to the very next step only, which says
    by its position how many hold; whoever has missed a step does not know, and forgets them.
    """

    session_key: bytes
    kv: KvRows
    generation: int
    fork: int
    last_step: int = 0
    final: int = 0
    committed: int = 0
    commit_in_flight: bool = False
    pieces_of_step: int | None = None  # the step of which a first piece was committed
    last_reply: tuple[StepReply, bytes] | None = None  # for a step that is sent again
    seal: RowSeal | None = None  # of its rows in the store
    account: str = ""  # of its edge in the store
    commit_at: float = 0.0  # not before; the edge has its share of the store

    @property
    def is_dirty(self) -> bool:
        return self.committed < self.final

    @property
    def size(self) -> int:
        """Bytes of its rows and of its last reply, if that is a large one."""
        reply = len(self.last_reply[1]) if self.last_reply is not None else 0
        return self.kv.capacity_bytes + (reply if reply >= LARGE_REPLY_BYTES else 0)

    def adjust_to(self, step: Step) -> bool:
        """Keep only the rows that are valid before `step`. False if the step is out of date."""
        if step.generation < self.generation:
            return False
        if step.generation == self.generation:
            is_next = step.step in (self.last_step, self.last_step + 1)
            keep = step.position if is_next else min(step.position, self.final)
        elif step.generation == self.generation + 1:
            keep = min(step.position, step.fork, self.final)
        else:
            keep = 0
        outlives = self.seal is None or self.seal.outlives_generation
        if step.generation != self.generation and not outlives:
            self.committed = 0  # what is in the store is sealed for the old generation
        self.generation, self.fork = step.generation, step.fork
        self.cut_back(keep)
        self.final = self.kv.length  # what lies below a step's position is no draft any more
        return True

    def cut_back(self, position: int) -> None:
        """Forget the rows from `position` on."""
        self.kv.length = min(self.kv.length, position)
        self.final = min(self.final, position)
        self.committed = min(self.committed, position)


class WarmCache(SessionCache[WarmSession]):
    """The text sessions of one service."""

    def __init__(
        self,
        new_kv: Callable[[], KvRows],
        budget: CacheBudget,
        find_busy: Callable[[], Collection[bytes]] = frozenset,
    ) -> None:
        super().__init__(budget, find_busy)
        self._new_kv = new_kv

    def drop(self, session_key: bytes) -> None:
        session = self.find(session_key)
        if session is not None:
            session.kv.release()
        super().drop(session_key)

    def open(self, session_key: bytes, step: Step) -> WarmSession:
        """The session of a step, most recently used from now on; empty if it is new here."""
        return self.use(
            session_key,
            lambda: WarmSession(session_key, self._new_kv(), step.generation, step.fork),
        )
