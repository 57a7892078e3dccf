"""What the broker remembers of peers, workers, steps and sessions."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Announce, AnyOpening, AnyStep, Service, StepKey

ServiceKey = tuple[str, str]  # model fingerprint, part


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


@dataclass(slots=True)
class Worker:
    """A worker as it last announced itself."""

    announce: Announce
    peer: Peer
    seen_at: float
    draining: bool = False
    in_flight: set[StepKey] = field(default_factory=set)
    steps_done: int = 0

    @property
    def claim(self) -> tuple[str, str, int]:
        """What makes it the same worker after a reconnection."""
        return self.peer.key, self.announce.host, self.announce.pid

    @property
    def room(self) -> int:
        if self.draining or not self.announce.ready:
            return 0
        return self.announce.capacity - len(self.in_flight)

    def serves(self, service: ServiceKey) -> bool:
        return any((s.model, s.part) == service for s in self.announce.services)


@dataclass(slots=True)
class StepRecord:
    """A step between its arrival and its answer."""

    step: AnyStep
    service: ServiceKey
    edge: Peer
    body_bytes: int
    arrived_at: float
    queued_at: float
    deadline_at: float
    worker_id: str | None = None
    attempts: int = 0
    sent_at: float = 0.0
    failures: list[tuple[str, str]] = field(default_factory=list)  # worker, reason

    def failed_on(self, worker_id: str) -> bool:
        return any(failed == worker_id for failed, _ in self.failures)


@dataclass(slots=True)
class SessionRecord:
    """How a session was opened, where its KV is warm, and its newest step."""

    opening: AnyOpening
    edge: Peer
    worker_id: str | None
    newest: StepKey
    seen_at: float


def describe_service(service: Service) -> str:
    """`stories-llama 2-6 (fingerprint 0123456789abcdef)`"""
    return f"{service.name} {service.part} (fingerprint {service.model})"
