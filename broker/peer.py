"""Who is at the other end of a connection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Peer:
    """Who sent a message: a connection, and the CURVE key behind it."""

    address: bytes  # ROUTER's name for the connection
    key: str = ""  # empty where keys are not used
    connection: int = -1  # its file descriptor

    @property
    def account(self) -> bytes:
        """Whose sessions are counted together."""
        return self.key.encode() or self.address
