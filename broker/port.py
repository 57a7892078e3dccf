"""One side of the broker: a ROUTER socket, the connections behind it, and who is at their ends."""

from __future__ import annotations

from collections.abc import Sequence

import zmq
from zmq.backend import Socket as PlainSocket
from zmq.utils.monitor import recv_monitor_message

from broker.admission import Admission
from broker.connections import FRAME_BYTES, Connection, Connections
from broker.peer import Peer
from common.errors import SettingsError
from common.protocol.sockets import Context, Socket, has_message
from common.settings import MAX_BODY_BYTES, MAX_FRAMES, MAX_STEPS_PER_EDGE

HANDSHAKE_MS = 3000  # a connection that has not shown its key by then is closed
# messages kept for a peer that does not read, beside what connections.py bounds in bytes: the
# answers to all steps that an edge may have, and as often that they are pending. What is dropped is
# asked for, sent and answered again
MAX_UNREAD = 2 * MAX_STEPS_PER_EDGE
KEEPALIVE_S = 60  # edges do not ping, so TCP finds those that died without a word
MAX_PEERS = 1 << 16  # remembered by address

# plain numbers and the socket's plain methods: pyzmq's conveniences take as long as the rest
NOW, NOW_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
_receive, _send = PlainSocket.recv, PlainSocket.send


class Port:
    """Binds on construction. Raises SettingsError when the address cannot be bound.

    `role` is who may connect: "edge" or "worker".
    """

    def __init__(
        self,
        context: Context,
        endpoint: str,
        role: str,
        admission: Admission | None,
        connections: Connections,
    ) -> None:
        self._role = role
        self._has_keys = admission is not None
        self._connections = connections
        self._met: dict[bytes, tuple[Peer, Connection | None]] = {}  # by address
        self._ended: set[int] = set()
        self.socket: Socket = context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 200),
            (zmq.MAXMSGSIZE, MAX_BODY_BYTES),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.SNDTIMEO, 0),
            (zmq.SNDHWM, MAX_UNREAD),
            (zmq.HANDSHAKE_IVL, HANDSHAKE_MS),
            (zmq.TCP_KEEPALIVE, 1),
            (zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_S),
        ):
            self.socket.setsockopt(option, value)
        if admission is not None:
            admission.guard(self.socket, role)
        self.bytes_in = self.bytes_out = 0  # of messages
        self.monitor: Socket = self.socket.get_monitor_socket(  # before anyone can connect
            zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.socket.close(linger=0)
            is_taken = error.errno == zmq.EADDRINUSE
            raise SettingsError(
                f"--{role}-endpoint {endpoint} cannot be bound: {zmq.strerror(error.errno or 0)}; "
                + ("is another broker running?" if is_taken else "expected one of this machine's")
            ) from error
        self.endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self) -> tuple[Peer, list[bytes]] | None:
        """The next message and who sent it; None if there is none.

        Of one with too many frames the rest is dropped; the list is then longer than MAX_FRAMES.
        """
        try:
            address = _receive(self.socket, NOW)
        except zmq.Again:
            return None
        frame = _receive(self.socket, NOW, False)
        met = self._met.get(address)
        if met is None:
            met = self._meet(address, frame)
        content = frame.bytes
        size = len(content) + FRAME_BYTES
        frames = [content]
        while frame.more:
            frame = _receive(self.socket, NOW, False)
            content = frame.bytes
            size += len(content) + FRAME_BYTES
            if len(frames) <= MAX_FRAMES:
                frames.append(content)
        peer, connection = met
        self.bytes_in += size
        if connection is not None:
            connection.taken += size
        return peer, frames

    def _meet(self, address: bytes, frame: zmq.Frame) -> tuple[Peer, Connection | None]:
        """Find out who has sent a message, from any of its frames."""
        fd = int(frame.get(zmq.SRCFD))
        if not self._connections.knows(fd):
            self.read_links()  # it was accepted before it said anything
        if len(self._met) >= MAX_PEERS:
            self._met.clear()  # those who are still there are met again
        peer = Peer(address, str(frame.get("User-Id")) if self._has_keys else "", fd)
        met = self._met[address] = (peer, self._connections.meet(peer))
        return met

    def send(self, address: bytes, frames: Sequence[bytes]) -> bool:
        """False when the peer is gone or takes nothing more; whoever needs it will ask again."""
        _, connection = self._met.get(address, (None, None))
        if connection is not None and not self._connections.may_send(connection, frames):
            return False
        socket = self.socket
        try:
            _send(socket, address, NOW_AND_MORE, True, False)
            for frame in frames[:-1]:
                _send(socket, frame, NOW_AND_MORE, True, False)
            _send(socket, frames[-1], NOW, True, False)
            self.bytes_out += sum(map(len, frames))
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def read_links(self) -> None:
        """Take note of the connections that have come and ended."""
        while has_message(self.monitor):
            event = recv_monitor_message(self.monitor)
            fd = int(event["value"])
            if event["event"] == zmq.EVENT_ACCEPTED:
                port = self.endpoint.rpartition(":")[2]
                if port.isdigit():  # not so for ipc://
                    self._connections.add(fd, self._role, int(port))
            else:
                address = self._connections.remove(fd)
                if address is not None:
                    self._met.pop(address, None)
                self._ended.add(fd)

    def take_ended(self) -> set[int]:
        """Descriptors of the connections that have ended since this was last asked."""
        ended, self._ended = self._ended, set()
        return ended
