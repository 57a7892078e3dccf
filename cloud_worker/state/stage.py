"""What a worker keeps of one session at one part of one model.

A stage has items of two kinds: rows, which are only ever appended (KV), and blobs, which are
replaced as a whole (an image's conditioning, its latents). An item is looked for in memory, then in
the store, then at the edge. In memory a stage is a cache, worth nothing once lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cloud_worker.state.row_seals import RowSeal
from common.protocol.messages import StepKey, StepReply

LARGE_REPLY_BYTES = 1 << 16
OVERHEAD_BYTES = 1000  # of a stage that has nothing yet


@dataclass(slots=True)
class Stage:
    """What text and images have in common. `key` names session, owner and part."""

    key: bytes
    seal: RowSeal  # of its items in the store
    account: str = field(default="", kw_only=True)  # of its edge in the store
    last_reply: tuple[StepReply, bytes] | None = field(default=None, kw_only=True)

    def reply_to(self, key: StepKey) -> tuple[StepReply, bytes] | None:
        """What the step was answered, if it was the last one."""
        if self.last_reply is not None and self.last_reply[0].key == key:
            return self.last_reply
        return None

    @property
    def items_size(self) -> int:
        """Bytes of its items in memory."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Bytes of its items and of its last reply, if that is a large one."""
        reply = len(self.last_reply[1]) if self.last_reply is not None else 0
        return self.items_size + (reply if reply >= LARGE_REPLY_BYTES else 0)

    def release(self) -> None:
        """It is dropped: what it has of a pool goes back."""
