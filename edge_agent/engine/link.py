"""An edge's connection to the broker in use, out of a list of brokers. Not thread-safe."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence

import zmq

from common.errors import BrokerUnavailable, ProtocolError
from common.protocol.messages import Message, NotJoined, StepKey
from common.protocol.sockets import (
    Context,
    Socket,
    connect_dealer,
    has_message,
    read_link_event,
    receive_frames,
    wire_bytes,
)
from common.protocol.wire import check_frames, decode_header, is_of_other_protocol
from common.security.keys import ClientKeys

HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
LINK_EVENTS = HANDSHAKE_FAILED | zmq.EVENT_DISCONNECTED

Received = tuple[Message, bytes, int]  # with its body, or none, and the bytes of it all


class BrokerLink:
    """Connects on construction; goes to the next broker when told to."""

    def __init__(self, brokers: Sequence[str], keys: ClientKeys | None = None) -> None:
        self.brokers = list(brokers)
        self._keys = keys
        self._refused_by = ""
        self.current = 0
        self._context: Context = zmq.Context()
        self._sockets: list[Socket] = []
        # who forgets `close` shall not hang: a context waits for sockets that nobody can close
        self._finalizer = weakref.finalize(self, _close, self._context, self._sockets)
        self.bytes_up = self.bytes_down = 0
        self._lost_link = False
        self._connect()

    @property
    def broker(self) -> str:
        """The address in use."""
        return self.brokers[self.current]

    def close(self) -> None:
        self._finalizer()

    def use(self, index: int) -> None:
        """Begin anew with a broker, perhaps the one in use."""
        self._read_link_events()
        for socket in self._sockets:
            socket.close(linger=0)
        self._sockets.clear()
        self.current = index % len(self.brokers)
        self._connect()

    def use_next(self) -> None:
        """Begin anew with the next broker of the list."""
        self.use(self.current + 1)

    def connect_to(self, index: int) -> Socket:
        """A further socket, to a broker of the list."""
        # no pings: behind a large message on a thin link they would end the connection
        return connect_dealer(self._context, self.brokers[index], self._keys, pings=False)

    def send(self, frames: list[bytes], timeout_s: float, socket: Socket | None = None) -> bool:
        """Hand frames to a connected broker; False when there is none in time."""
        socket = socket or self.socket
        if socket.closed:
            return False
        socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        try:
            socket.send_multipart(frames)
        except zmq.Again:
            return False
        self.bytes_up += wire_bytes(frames)
        return True

    def receive(self, timeout_s: float, socket: Socket | None = None) -> Received | None:
        """The next message that can be read, if it comes in time.

        Raises BrokerUnavailable when the broker speaks another protocol or is there for workers.
        """
        socket = socket or self.socket
        socket.setsockopt(zmq.RCVTIMEO, max(1, round(timeout_s * 1000)))
        try:
            return self._read(receive_frames(socket))
        except zmq.Again:
            return None

    def receive_now(self) -> Received | None:
        """The next message that is here and can be read."""
        while has_message(self.socket):
            received = self._read(receive_frames(self.socket, zmq.NOBLOCK))
            if received is not None:
                return received
        return None

    def _read(self, frames: list[bytes]) -> Received | None:
        size = wire_bytes(frames)
        self.bytes_down += size
        try:
            check_frames(frames)
            message = decode_header(frames[0])
            if isinstance(message, NotJoined):
                raise BrokerUnavailable(f"--broker {self.broker}: {message.reason}")
            return message, frames[1] if len(frames) > 1 else b"", size
        except ProtocolError as error:
            if is_of_other_protocol(frames[0]):
                raise BrokerUnavailable(f"the broker at {self.broker} says: {error}") from error
            return None  # not an answer that we can read; ask again

    def has_lost_link(self) -> bool:
        """Whether the connection ended since this was last asked: what was in it is gone."""
        self._read_link_events()
        lost, self._lost_link = self._lost_link, False
        return lost

    def why_unavailable(self, waited_s: float) -> str:
        """What to tell the user when no broker answers."""
        self._read_link_events()
        if self._refused_by:
            return self._refused_by
        listed = ", ".join(self.brokers)
        return (
            f"no broker answers at {listed} (waited {waited_s:g} s); "
            "start one with `midspan up`, or name yours with --broker"
        )

    def _connect(self) -> None:
        self._lost_link = False
        self.socket = self.connect_to(self.current)
        self.events: Socket = self.socket.get_monitor_socket(
            LINK_EVENTS,
            f"inproc://{secrets.token_hex(8)}",  # a closed one's may still be in use
        )
        self._sockets += [self.socket, self.events]

    def _read_link_events(self) -> None:
        """What ZeroMQ tells on the side: connections that ended, and keys that were refused."""
        while has_message(self.events):
            event = read_link_event(self.events)
            if event == zmq.EVENT_DISCONNECTED:
                self._lost_link = True
                continue
            refused = event == zmq.EVENT_HANDSHAKE_FAILED_AUTH
            if not refused and self._keys is not None:
                self._refused_by = (
                    f"the broker at {self.broker} has another key than --broker-key, or none"
                )
                continue
            why = "refused this edge's key" if self._keys else "wants --key and --broker-key"
            self._refused_by = (
                f"the broker at {self.broker} {why}; a key is admitted there with "
                "`midspan keys authorize`"
            )


def _close(context: Context, sockets: list[Socket]) -> None:
    for socket in sockets:
        socket.close(linger=200)
    context.destroy(linger=200)


def key_of(message: Message) -> StepKey | None:
    """The step that a message is about."""
    return getattr(message, "key", None)
