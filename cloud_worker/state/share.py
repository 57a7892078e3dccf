"""What one edge may have of a store: asked for before a session grows, and remembered.

The store counts a session for its account in pieces of COUNTED_BYTES, so that few commits have to
ask. An account's count lies apart from the sessions that it counts, perhaps on another server, so
it is asked for by a request of its own, and the commit waits for the answer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from cloud_worker.state.store import Commit, counted_bytes

RENEW_PART = 0.25  # of a session's time to live: a count that nobody renews expires


@dataclass(frozen=True, slots=True)
class _Grant:
    account: str
    size: int  # bytes
    asked_at: float


class Grants:
    """What the store has granted to sessions that this worker commits to."""

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        self._grants: dict[bytes, _Grant] = {}
        self._sweep_at = 0.0

    def covers(self, commit: Commit) -> bool:
        """Whether it may be made without asking.

        The first rows of a session never are: what is remembered may be of a session that is gone.
        """
        if not commit.account:
            return True
        grant = self._grants.get(commit.session_key)
        if grant is None or commit.start == 0 or grant.size < counted_bytes(commit):
            return False
        return time.monotonic() - grant.asked_at < RENEW_PART * self._ttl_s

    def add(self, commit: Commit) -> None:
        """It was granted just now."""
        now = time.monotonic()
        self._sweep(now)
        self._grants[commit.session_key] = _Grant(commit.account, counted_bytes(commit), now)

    def take_back(self, session_key: bytes) -> str:
        """The session is gone. The account that it counted for, if that is known here."""
        grant = self._grants.pop(session_key, None)
        return grant.account if grant is not None else ""

    def _sweep(self, now: float) -> None:
        if now < self._sweep_at:
            return
        self._sweep_at = now + self._ttl_s
        oldest = now - RENEW_PART * self._ttl_s
        self._grants = {key: one for key, one in self._grants.items() if one.asked_at >= oldest}
