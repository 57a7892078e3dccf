"""What the broker remembers of peers, workers, steps and sessions."""

from __future__ import annotations

from dataclasses import dataclass, field

from common.messages import Announce, AnyOpening, AnyStep, Service, StepKey

SEND_AGAIN_S = 1.0
ServiceKey = tuple[str, str, str]  # model fingerprint, part, precision


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


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that a worker was sent, and has neither answered nor confirmed to have dropped."""

    account: bytes
    sent_at: float


@dataclass(slots=True)
class Worker:
    """A worker as it last announced itself."""

    announce: Announce
    peer: Peer
    seen_at: float
    draining: bool = False
    in_flight: dict[StepKey, Flight] = field(default_factory=dict)
    steps_done: int = 0

    def is_same(self, announce: Announce, peer: Peer) -> bool:
        """Whether the one that announces itself is this worker, connected anew or not.

        Without keys only its connection says so: host and process are mere words.
        """
        if not peer.key:
            return peer.address == self.peer.address
        claim = (peer.key, announce.host, announce.pid)
        return claim == (self.peer.key, self.announce.host, self.announce.pid)

    @property
    def room(self) -> int:
        if self.draining or not self.announce.ready:
            return 0
        return self.announce.capacity - len(self.in_flight)

    def serves(self, service: ServiceKey) -> bool:
        return any(service_key(s) == service for s in self.announce.services)

    def count_of(self, account: bytes) -> int:
        """How many of an edge's steps are here."""
        return sum(flight.account == account for flight in self.in_flight.values())

    def is_stuck(self, now: float, patience_s: float) -> bool:
        """Whether a step has been here for so long that new ones better go elsewhere."""
        oldest = next(iter(self.in_flight.values()), None)
        return oldest is not None and now - oldest.sent_at >= patience_s


@dataclass(slots=True)
class StepRecord:
    """A step between its arrival and its answer."""

    step: AnyStep
    service: ServiceKey
    edge: Peer
    account: bytes  # of the edge when it came; it may have connected anew since
    body_bytes: int
    arrived_at: float
    queued_at: float
    deadline_at: float
    worker_id: str | None = None
    attempts: int = 0
    sent_at: float = 0.0
    asked_at: float = 0.0  # the worker, for the last time
    failures: list[tuple[str, str]] = field(default_factory=list)  # worker, reason
    late_on: dict[str, int] = field(default_factory=dict)  # worker -> attempt that may still answer
    moves: int = 0  # attempts that were made because another took long
    again_after_s: float = SEND_AGAIN_S
    edge_gone_at: float | None = None
    wait_until: float = 0.0  # before it is handed out again

    @property
    def tries(self) -> int:
        """Attempts that count against the step."""
        return self.attempts - self.moves

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
    opening_frame: bytes = b""  # as it came
    precision: str = ""  # of the workers that have answered


def service_key(service: Service) -> ServiceKey:
    return service.model, service.part, service.precision


def describe_service(service: Service) -> str:
    """`stories-llama 2-6 (fingerprint 0123456789abcdef) in float32`"""
    precision = f" in {service.precision}" if service.precision else ""
    return f"{service.name} {service.part} (fingerprint {service.model}){precision}"
