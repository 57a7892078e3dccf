"""What each connection makes the broker keep, in bytes, and an end to those that ask too much.

ZeroMQ bounds a frame (MAXMSGSIZE) and counts whole messages (its high-water marks), but keeps all
frames of a message that never ends, those of a peer that has not shown its key, and as many large
answers as it counts small ones. Linux knows for each TCP connection how many bytes came in and how
many the peer has acknowledged (TCP_INFO). What came in and was in no message that we read is in
ZeroMQ's memory or the kernel's; so is what we sent and the peer has not acknowledged. A connection
with too much of either is shut down, which makes ZeroMQ drop it and all it kept for it.

A connection is ZeroMQ's descriptor, as its monitor and each message name it. That number may
belong to something else by the time we look. So each look duplicates the descriptor and goes on
only if that is a TCP connection with the addresses that were seen when it was accepted.

Frames of two bytes on the wire take 64 in memory. So the process's memory is watched too: what is
neither explained by bytes under way nor given back to the system ends the connection that has
most under way. Connections over Unix sockets (ipc://) tell nothing and are not watched; nor are
any where the system has no TCP_INFO as Linux has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from broker.peer import Peer
from common.console.log_limit import LogLimit
from common.console.memory import read_memory_bytes

log = logging.getLogger("midspan.broker")

MB = 1 << 20
SEEN_BYTES = struct.Struct("=120xQQ")  # tcpi_bytes_acked and tcpi_bytes_received, Linux 4.1
SENT_BEFORE_READY = 264  # a CURVE server sends 64 and 170 bytes, and READY (67) to whom it admits
FRAME_BYTES = 64  # what a frame may cost on the wire beside its content, with keys; at most
LOOK_STRANGERS_S = 0.005
LOOK_STRANGER_S = 0.000_02  # for each of them, so that many do not take all our time
LOOK_ALL_S = 1.0
GROWTH_BYTES = 16 * MB  # of the process, after which all are looked at sooner
TRIM_S = 1.0
PIECE_BYTES, MAX_PIECES = 1 * MB, 16  # of what is thrown away; the kernel keeps 6 MB
QUIET_BYTES = 1 * MB  # while less is under way, the memory that there is is ours

Ends = tuple[tuple[Any, ...], tuple[Any, ...]]  # (host, port, ...) of ours and of the peer's


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Bytes that may be under way: of one connection each way, of one edge's, and of all."""

    stranger: int = 64 << 10  # to us, before its key was admitted
    edge: int = 130 * MB  # two of the largest messages
    worker: int = 520 * MB
    party: int = 512 * MB  # all with one edge's key, or from one host before that is known
    all: int = 1024 * MB
    unexplained: int = 256 * MB  # of the process's memory, beyond what it had in quiet times

    def of(self, role: str) -> int:
        return self.edge if role == "edge" else self.worker


@dataclass(slots=True)
class Connection:
    """Bytes are on the wire; `taken` and `given` since they were last looked at.

    Whoever reads a message of it adds its bytes, and FRAME_BYTES for each frame, to `taken`.
    """

    fd: int
    role: str  # "edge" or "worker"
    ends: Ends
    is_stranger: bool
    account: bytes = b""  # whose messages came over it; empty before the first
    address: bytes = b""
    received: int = 0
    acked: int = 0
    taken: int = 0
    given: int = 0
    up: int = 0  # came in, and in no message that was read
    down: int = 0  # sent, and not acknowledged

    @property
    def party(self) -> object:
        """Whose bytes are counted together. Workers have a key in common, and each counts alone."""
        return self.fd if self.role == "worker" else self.account or self.ends[1][0]

    @property
    def under_way(self) -> int:
        return self.up + self.down

    def see(self, received: int, acked: int) -> None:
        """What is counted too generously is lost at 0, so that errors do not add up."""
        self.up = max(0, self.up + received - self.received - self.taken)
        self.down = max(0, self.down + self.given - (acked - self.acked))
        self.received, self.acked, self.taken, self.given = received, acked, 0, 0
        self.is_stranger = self.is_stranger and acked <= SENT_BEFORE_READY


def find_excess(connections: Iterable[Connection], limits: ConnectionLimits) -> dict[int, str]:
    """Descriptors of the connections that are to be ended, each with the reason."""
    excess = {}
    for each in connections:
        limit = limits.stranger if each.is_stranger else limits.of(each.role)
        if each.up > limit:
            who = "without an admitted key" if each.is_stranger else "in no whole message"
            excess[each.fd] = f"sent {each.up:,} bytes {who}; at most {limit:,} are kept"
        elif each.down > limits.of(each.role):
            excess[each.fd] = (
                f"left {each.down:,} bytes unread; at most {limits.of(each.role):,} are kept"
            )
    rest = {each.fd: each for each in connections if each.fd not in excess}
    while rest:
        party, in_party = find_largest_party(rest.values())
        in_all = sum(each.under_way for each in rest.values())
        if in_party <= limits.party and in_all <= limits.all:
            break
        largest = max((c for c in rest.values() if c.party == party), key=lambda c: c.under_way)
        excess[largest.fd] = (
            f"is of a peer with {in_party:,} bytes under way, of {in_all:,}; at most "
            f"{limits.party:,} of {limits.all:,} are kept"
        )
        del rest[largest.fd]
    return excess


def find_largest_party(connections: Iterable[Connection]) -> tuple[object, int]:
    """Who has most under way, and how many bytes."""
    parties: Counter[object] = Counter()
    for each in connections:
        parties[each.party] += each.under_way
    return parties.most_common(1)[0]


@dataclass(slots=True)
class Connections:
    """Those of both sockets. Not thread-safe; all methods are for the broker's loop."""

    limits: ConnectionLimits
    has_keys: bool
    ended: int = 0
    _by_fd: dict[int, Connection] = field(default_factory=dict)
    _strangers: set[int] = field(default_factory=set)
    _looked_at: float = 0.0
    _strangers_looked_at: float = 0.0
    _trimmed_at: float = 0.0
    _memory: int = 0
    _quiet_memory: int = 0
    _admitted: Mapping[str, Collection[bytes]] = field(default_factory=dict)
    _unsure: set[int] = field(default_factory=set)  # met since the keys were last looked at
    _complaints: LogLimit = field(default_factory=lambda: LogLimit(log))

    def knows(self, fd: int) -> bool:
        return fd in self._by_fd

    def add(self, fd: int, role: str, port: int) -> None:
        """A connection to our port was accepted, as a monitor says."""
        self.remove(fd)
        opened = _duplicate(fd)
        if opened is None:
            return
        duplicate, ends = opened
        with duplicate:
            if ends[0][1] == port and _read_counts(duplicate) is not None:
                self._by_fd[fd] = Connection(fd, role, ends, self.has_keys)
                if self.has_keys:
                    self._strangers.add(fd)

    def remove(self, fd: int) -> bytes | None:
        """A connection ended, as a monitor says; the address that it had."""
        connection = self._by_fd.pop(fd, None)
        self._strangers.discard(fd)
        return connection.address if connection is not None else None

    def meet(self, peer: Peer) -> Connection | None:
        """The connection of a peer whose first message was read; None if it is not watched."""
        connection = self._by_fd.get(peer.connection)
        if connection is not None:
            connection.address, connection.account = peer.address, peer.account
            self._unsure.add(connection.fd)
        return connection

    def check_keys(self, changed: Mapping[str, Collection[bytes]] | None) -> None:
        """Called on ticks: who has a key that is not admitted any more loses its connections.

        `changed` are the keys that are admitted in each role, if those may be others than before.
        """
        if changed is not None:
            self._admitted = changed
            self._unsure.update(self._by_fd)
        why = "has a key that is not admitted any more"
        met = [self._by_fd[fd] for fd in self._unsure if fd in self._by_fd]
        self._unsure.clear()
        self._end(
            {
                each.fd: why
                for each in met
                if each.account and each.account not in self._admitted[each.role]
            }
        )

    def may_send(self, connection: Connection, frames: Sequence[bytes]) -> bool:
        """Whether a peer takes this message, which is then counted. One with too much is ended.

        A message that is too large by itself is not sent, and not held against who should get it.
        """
        size = sum(map(len, frames))
        limit = self.limits.of(connection.role)
        if size > limit:
            return False
        if connection.down + connection.given + size > limit:
            self._look([connection])
            if connection.down + size > limit:
                left = f"left {connection.down:,} bytes unread; at most {limit:,} are kept"
                self._end({connection.fd: left})
                return False
        connection.given += size
        return True

    def wait_s(self, now: float) -> float:
        """How long the loop may sleep as far as this goes."""
        if not self._strangers:
            return LOOK_ALL_S
        return max(0.0, self._strangers_looked_at + self._stranger_pause_s - now)

    @property
    def _stranger_pause_s(self) -> float:
        return max(LOOK_STRANGERS_S, LOOK_STRANGER_S * len(self._strangers))

    def check_strangers(self, now: float) -> None:
        """Called in every turn of the loop."""
        if self._strangers and now >= self._strangers_looked_at + self._stranger_pause_s:
            self._strangers_looked_at = now
            strangers = [self._by_fd[fd] for fd in self._strangers]
            self._look(strangers)
            self._end(find_excess(strangers, self.limits))

    def check_all(self, now: float, memory_bytes: int, count_kept: Callable[[], int]) -> None:
        """Called on ticks: looks when the process has grown, else once a second.

        `memory_bytes` is the process's, `count_kept` says how much of it are steps' bodies.
        """
        has_grown = memory_bytes > self._memory + GROWTH_BYTES
        if not has_grown and now < self._looked_at + LOOK_ALL_S:
            return
        self._looked_at, self._memory = now, memory_bytes
        self._look(self._by_fd.values())
        self._end(find_excess(self._by_fd.values(), self.limits))
        under_way = sum(each.under_way for each in self._by_fd.values())
        if under_way < QUIET_BYTES:
            self._quiet_memory = memory_bytes
        elif memory_bytes > self._quiet_memory + self.limits.unexplained:
            self._check_memory(now, memory_bytes, 2 * (under_way + count_kept()))

    def _check_memory(self, now: float, memory_bytes: int, explained: int) -> None:
        """What is under way may be there twice while it is read or sent, and so may a step."""
        unexplained = memory_bytes - self._quiet_memory - explained
        if unexplained > self.limits.unexplained and now >= self._trimmed_at + TRIM_S:
            self._trimmed_at = now
            unexplained -= memory_bytes - trim_memory(memory_bytes)
        if unexplained > self.limits.unexplained:
            party, _ = find_largest_party(self._by_fd.values())
            connections = [c for c in self._by_fd.values() if c.party == party]
            largest = max(connections, key=lambda c: c.under_way)
            self._end({largest.fd: f"has most under way while {unexplained:,} bytes more are used"})

    def _look(self, connections: Iterable[Connection]) -> None:
        for connection in list(connections):
            counts = None
            opened = _duplicate(connection.fd)
            if opened is not None:
                duplicate, ends = opened
                with duplicate:
                    counts = _read_counts(duplicate) if ends == connection.ends else None
            if counts is None:
                self.remove(connection.fd)  # it has ended, which we are about to be told
                continue
            connection.see(*counts)
            if not connection.is_stranger:
                self._strangers.discard(connection.fd)

    def _end(self, excess: dict[int, str]) -> None:
        for fd, reason in excess.items():
            connection = self._by_fd.get(fd)
            self.remove(fd)
            opened = _duplicate(fd)
            if opened is None:
                continue
            if connection is None or opened[1] != connection.ends:
                opened[0].close()
                continue
            with opened[0] as duplicate:
                if not _shut_down(duplicate):
                    continue  # it ended by itself
            self.ended += 1
            self._complaints.warning("ended the connection of a peer: it %s", reason)


def _duplicate(fd: int) -> tuple[socket.socket, Ends] | None:
    """A descriptor's TCP connection and its two addresses; None if it is no such thing (now)."""
    try:
        duplicate = socket.socket(fileno=os.dup(fd))
    except OSError:
        return None
    try:
        if duplicate.family in (socket.AF_INET, socket.AF_INET6):
            return duplicate, (duplicate.getsockname(), duplicate.getpeername())
    except OSError:
        pass
    duplicate.close()
    return None


def _read_counts(connection: socket.socket) -> tuple[int, int] | None:
    """Bytes received and bytes acknowledged by the peer; None where the system does not say."""
    option = getattr(socket, "TCP_INFO", None)
    if option is None:
        return None
    try:
        told = connection.getsockopt(socket.IPPROTO_TCP, option, SEEN_BYTES.size)
    except OSError:
        return None
    if len(told) < SEEN_BYTES.size:
        return None
    acked, received = SEEN_BYTES.unpack(told)
    return received, acked


def _shut_down(connection: socket.socket) -> bool:
    """End a connection, and throw away what lies in the kernel: ZeroMQ would read that still."""
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False  # it had ended by itself
    with contextlib.suppress(OSError):  # nothing is left, or the peer has reset it
        for _ in range(MAX_PIECES):
            if not connection.recv(PIECE_BYTES, socket.MSG_DONTWAIT):
                break
    return True


def trim_memory(memory_bytes: int) -> int:
    """Give what is free back to the system; the process's memory then, where the system says."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return read_memory_bytes() or memory_bytes
