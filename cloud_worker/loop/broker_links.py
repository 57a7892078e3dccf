"""A worker's connections to its brokers: what is said and heard over them, and who has taken it."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import zmq

from cloud_worker.loop.heartbeat import UNSENT_LIMIT, Heartbeat
from cloud_worker.state.store import KvStore
from common.errors import SettingsError
from common.protocol.messages import Alive, Announce, Drain, Leave, Message, NotJoined
from common.protocol.sockets import Context, connect_dealer, has_message, receive_frames
from common.protocol.spinning import SpinningPoller
from common.protocol.wire import encode_header
from common.security.keys import ClientKeys

log = logging.getLogger("midspan.worker")

SAY_AGAIN_S = 30.0  # why a broker does not take this worker


class BrokerLinks:
    """Connections in the order of the brokers' addresses; a broker is its index there."""

    def __init__(
        self,
        brokers: Sequence[str],
        keys: ClientKeys | None,
        spin_s: float,
        alive: Alive,
        heartbeat_s: float,
        on_ready: Callable[[str], None],
    ) -> None:
        """`on_ready` is told the address of each broker that has taken the announcement."""
        self.refusal: SettingsError | None = None  # of a broker that never takes this worker
        self._brokers = brokers
        self._worker_id = alive.worker_id
        self._on_ready = on_ready
        self._joined: set[int] = set()  # those that have taken the announcement
        self._drain_accepted: set[int] = set()
        self._unsent = [0] * len(brokers)  # announcements in a row
        self._say_again_at: dict[tuple[int, str], float] = {}
        self._context: Context = zmq.Context()
        self._sockets = [connect_dealer(self._context, broker, keys) for broker in brokers]
        self._poller = SpinningPoller(spin_s)
        self._gatherer = zmq.Poller()  # of steps, not of what the store says
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
            self._gatherer.register(socket, zmq.POLLIN)
        self._polled_store_fd: int | None = None
        self._heartbeat = Heartbeat(self._context, brokers, alive, heartbeat_s, keys)

    # --- saying

    def start(self) -> None:
        """From now on this worker is alive."""
        self._heartbeat.start()

    def close(self) -> None:
        """Take leave."""
        self._heartbeat.stop()
        for index in range(len(self._sockets)):
            self.send(index, Leave(self._worker_id))
        self._context.destroy(linger=1000)

    def announce(self, announcement: Announce) -> None:
        """Tell all brokers what there is here, over the connections that take the steps.

        Those that have not accepted it yet are told that this worker drains, if it is not `ready`.
        """
        for index in range(len(self._sockets)):
            if self.send(index, announcement):
                self._unsent[index] = 0
            else:
                self._unsent[index] += 1
                self._connect_anew(index)
            if not announcement.ready and index not in self._drain_accepted:
                self.send(index, Drain(self._worker_id))

    def _connect_anew(self, index: int) -> None:
        """ZeroMQ gives a broker up that has refused our key once; we do not."""
        if self._unsent[index] % UNSENT_LIMIT:
            return
        endpoint = self._brokers[index]
        if self._unsent[index] == UNSENT_LIMIT:
            log.warning(
                "the broker at %s is not there, or refuses this worker's key (admit it there with "
                "`midspan keys authorize --as worker`); trying again", endpoint,
            )  # fmt: skip
        with contextlib.suppress(zmq.ZMQError):
            self._sockets[index].disconnect(endpoint)
        self._sockets[index].connect(endpoint)

    def send(self, index: int, message: Message, *bodies: bytes) -> bool:
        """To one broker. What cannot be sent now is dropped: the edge will ask again."""
        try:
            self._sockets[index].send_multipart([encode_header(message), *bodies], zmq.NOBLOCK)
        except zmq.Again:
            log.debug("no broker takes a %s", message.kind)
            return False
        return True

    def expect(self) -> None:
        """An answer has gone: another step may come soon."""
        self._poller.expect()

    # --- hearing

    def wait(self, wait_s: float, store: KvStore) -> None:
        """Until a broker or the store has something to say, or the store takes more."""
        store_fd = store.fileno()
        if store_fd != self._polled_store_fd:  # the store has connected anew
            if self._polled_store_fd is not None:
                self._poller.unregister(self._polled_store_fd)
            if store_fd is not None:
                self._poller.register(store_fd, zmq.POLLIN)
            self._polled_store_fd = store_fd
        if store_fd is not None:
            waits_to_send = zmq.POLLOUT if store.is_sending() else 0
            self._poller.modify(store_fd, zmq.POLLIN | waits_to_send)
        self._poller.poll(round(wait_s * 1000))

    def wait_for_steps(self, wait_ms: int) -> None:
        """Until a broker has something to say."""
        self._gatherer.poll(wait_ms)

    def read(self) -> Iterator[tuple[int, list[bytes]]]:
        """All that is here, with the broker that it comes from."""
        for source, socket in enumerate(self._sockets):
            while has_message(socket):
                yield source, receive_frames(socket)

    # --- who has taken this worker

    def has_joined(self) -> bool:
        """Whether any broker has."""
        return bool(self._joined)

    def on_joined(self, source: int) -> None:
        """A broker has taken the announcement."""
        if source not in self._joined:
            self._joined.add(source)
            self._on_ready(self._brokers[source])

    def on_not_joined(self, source: int, message: NotJoined) -> None:
        """A broker has not, and says why."""
        broker = self._brokers[source]
        if message.is_final and source not in self._joined:
            self.refusal = SettingsError(f"--broker {broker}: {message.reason}")
            return
        now = time.monotonic()  # what is in the way may go
        if now >= self._say_again_at.get((source, message.reason), 0.0):
            self._say_again_at[source, message.reason] = now + SAY_AGAIN_S
            log.warning(
                "the broker at %s does not take this worker: %s (trying again until then)",
                broker, message.reason,
            )  # fmt: skip

    def on_other_protocol(self, source: int, what: str) -> None:
        """A broker speaks another protocol than this worker."""
        if source not in self._joined:
            self.refusal = SettingsError(f"the broker at {self._brokers[source]} says: {what}")

    def on_drain_accepted(self, source: int) -> None:
        """A broker sends nothing new any more."""
        self._drain_accepted.add(source)

    def have_let_go(self) -> bool:
        """Whether all that took this worker have accepted that it drains, or are gone."""
        gone = {index for index, count in enumerate(self._unsent) if count > 2}
        return self._joined <= self._drain_accepted | gone
