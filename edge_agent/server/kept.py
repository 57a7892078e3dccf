"""Conversations that are kept between requests, so that the next turn sends only what is new.

A chat request says everything from the beginning, and nothing in it says which one came before. So
the prompt is compared with what the kept sessions hold. One that would lose more than half of that
is left alone: it is somebody else's chat with the same beginning.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_agent.engine.engine import Engine
from edge_agent.engine.streams import Conversation


class KeptConversations:
    """At most `limit` sessions; the one that was used longest ago gives way. One thread."""

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._kept: list[Conversation] = []  # the last one was used last

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, prompt_ids: Sequence[int]) -> Conversation | None:
        """One to submit this prompt to at once; None when all that may be kept are answering."""
        idle = [each for each in self._kept if not each.is_answering]
        shared = {each: each.count_shared(prompt_ids) for each in idle}
        best = max(idle, key=lambda each: shared[each], default=None)
        if best is not None and shared[best] and 2 * shared[best] >= best.held:
            self._kept.remove(best)
            self._kept.append(best)
            return best
        if len(self._kept) >= self._limit:
            if not idle:
                return None
            self._kept.remove(idle[0])
            idle[0].close()
        self._kept.append(self._engine.open())
        return self._kept[-1]

    def close(self) -> None:
        for conversation in self._kept:
            conversation.close()
        self._kept.clear()
