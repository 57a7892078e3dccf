"""A text session at one span: its KV rows, and how far they are final and committed.

Where layers keep a state of the whole text, that is an item of its own: a blob in the store, with
the position that it is good for. Rows beyond a state's position are of no use without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cloud_worker.state.stage import Stage
from common.protocol.messages import Step
from common.spans.kv_rows import KvRows


@dataclass(slots=True)
class TextStage(Stage):
    """One session's KV rows, how many of them are final, and how much of those is committed.

    Rows from `final` on are drafts. They are worth something to the very next step only, which says
    by its position how many hold; whoever has missed a step does not know, and forgets them.
    """

    kv: KvRows
    generation: int
    fork: int
    last_step: int = 0
    final: int = 0
    committed: int = 0
    commit_in_flight: bool = False
    pieces_of_step: int | None = None  # the step of which a first piece was committed
    commit_at: float = 0.0  # not before; the edge has its share of the store
    saved: int = 0  # the position of the state that the store has, of this generation
    save_from: int = 1  # where the next one is worth being saved

    @property
    def is_dirty(self) -> bool:
        return self.committed < self.final and bool(self.kv.layout.row_bytes)

    @property
    def stored(self) -> int:
        """The position from which another worker could go on."""
        if self.kv.states is None:
            return self.committed
        return min(self.committed, self.saved) if self.kv.layout.row_bytes else self.saved

    @property
    def items_size(self) -> int:
        return self.kv.capacity_bytes

    def release(self) -> None:
        self.kv.release()

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
        if step.generation != self.generation and not self.seal.outlives_generation:
            self.committed = 0  # what is in the store is sealed for the old generation
        if step.generation != self.generation:
            self.saved, self.save_from = 0, 1  # states are read in their own generation only
        self.generation, self.fork = step.generation, step.fork
        self.cut_back(keep)
        self.final = self.kv.length  # what lies below a step's position is no draft any more
        return True

    def cut_back(self, position: int) -> None:
        """Forget the rows from `position` on, or from the last state that is not beyond it."""
        self.kv.cut_back(position)
        self.final = min(self.final, self.kv.length)
        self.committed = min(self.committed, self.kv.length)
