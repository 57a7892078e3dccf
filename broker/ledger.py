"""What each edge holds in the broker: sessions, steps and bytes of bodies, against its limits."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

from common.settings import (
    MAX_BYTES_PER_EDGE,
    MAX_QUEUED_BYTES,
    MAX_QUEUED_STEPS,
    MAX_SESSIONS_PER_EDGE,
    MAX_STEPS_PER_EDGE,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """What the broker takes in all, and from one edge."""

    steps: int = MAX_QUEUED_STEPS
    body_bytes: int = MAX_QUEUED_BYTES
    sessions_per_edge: int = MAX_SESSIONS_PER_EDGE
    steps_per_edge: int = MAX_STEPS_PER_EDGE
    bytes_per_edge: int = MAX_BYTES_PER_EDGE


@dataclass(slots=True, eq=False)
class Account:
    """What one edge holds: the edge of a key, or of a connection where keys are not used."""

    name: bytes
    sessions: int = 0
    steps: int = 0
    body_bytes: int = 0
    number: int = field(init=False)  # workers take edges in turn by it

    def __post_init__(self) -> None:
        self.number = zlib.crc32(self.name)


class Ledger:
    """Keeps the accounts of all edges that hold something."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._accounts: dict[bytes, Account] = {}
        self._with_sessions = 0
        self._steps = self._body_bytes = 0

    def open(self, name: bytes) -> Account:
        """The account of an edge; one that holds nothing is forgotten again."""
        account = self._accounts.get(name)
        return account if account is not None else Account(name)

    def add_session(self, account: Account) -> None:
        self._accounts[account.name] = account
        self._with_sessions += account.sessions == 0
        account.sessions += 1

    def drop_session(self, account: Account) -> None:
        account.sessions -= 1
        if not account.sessions:
            self._with_sessions -= 1
            self._forget_if_empty(account)

    def has_all_sessions(self, account: Account) -> bool:
        """Whether an edge may open no more."""
        return account.sessions >= self.limits.sessions_per_edge

    def is_alone(self, account: Account) -> bool:
        """Whether nobody else has a session here."""
        return self._with_sessions <= (account.sessions > 0)

    def add_step(self, account: Account, body_bytes: int) -> None:
        self._accounts[account.name] = account
        account.steps += 1
        account.body_bytes += body_bytes
        self._steps += 1
        self._body_bytes += body_bytes

    def drop_step(self, account: Account, body_bytes: int) -> None:
        account.steps -= 1
        account.body_bytes -= body_bytes
        self._steps -= 1
        self._body_bytes -= body_bytes
        if not account.steps:
            self._forget_if_empty(account)

    def has_room(self, account: Account, body_bytes: int) -> bool:
        """Whether one more step of an edge is taken. The first always is, however large."""
        limits = self.limits
        if self._steps >= limits.steps or account.steps >= limits.steps_per_edge:
            return False
        fits = self._body_bytes + body_bytes <= limits.body_bytes or not self._steps
        own_fits = account.body_bytes + body_bytes <= limits.bytes_per_edge
        return fits and (own_fits or not account.steps)

    def _forget_if_empty(self, account: Account) -> None:
        if not account.sessions and not account.steps:
            self._accounts.pop(account.name, None)
