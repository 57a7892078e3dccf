"""How midspan's ZeroMQ sockets are set up on the connecting side, and how messages are taken."""

from __future__ import annotations

from collections.abc import Sequence

import zmq
from zmq.backend import Socket as PlainSocket
from zmq.utils.monitor import recv_monitor_message

from common.security.keys import ClientKeys
from common.settings import MAX_BODY_BYTES, MAX_FRAMES

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

RECONNECT_MS, RECONNECT_LIMIT_MS = 50, 500
LINGER_MS = 200
# plain numbers and the socket's plain methods: pyzmq's conveniences take as long as the rest
EVENTS, CAN_RECEIVE = int(zmq.EVENTS), int(zmq.POLLIN)
_receive, _read_option = PlainSocket.recv, PlainSocket.get

PING_MS, PING_LIMIT_MS = 1000, 3000  # ZMTP's own heartbeats find links that died without a word


def connect_dealer(
    context: Context, endpoint: str, keys: ClientKeys | None = None, pings: bool = True
) -> Socket:
    """A DEALER that finds its broker again whenever that comes back.

    Nothing is queued for a broker that is not there: sending waits, or raises zmq.Again, so that
    old messages do not pile up. Without `pings` only the peers' own words say that a link lives.
    """
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IMMEDIATE, 1)
    socket.setsockopt(zmq.LINGER, LINGER_MS)  # nobody hangs on what cannot be sent
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_LIMIT_MS)
    if pings:
        socket.setsockopt(zmq.HEARTBEAT_IVL, PING_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, PING_LIMIT_MS)
    if keys is not None:
        keys.apply(socket)
    socket.connect(endpoint)
    return socket


def receive_frames(socket: Socket, flags: int = 0) -> list[bytes]:
    """One message. Of one with too many frames the rest is read and dropped, not kept.

    The list is then longer than MAX_FRAMES, by one. Raises zmq.Again as `recv` does.
    """
    frame = _receive(socket, int(flags), False)
    frames = [frame.bytes]
    while frame.more:
        frame = _receive(socket, 0, False)
        if len(frames) <= MAX_FRAMES:
            frames.append(frame.bytes)
    return frames


def read_link_event(monitor: Socket) -> int:
    """The next event of a socket's monitor: one of zmq's EVENT_ numbers."""
    return int(recv_monitor_message(monitor)["event"])


def wire_bytes(frames: Sequence[bytes]) -> int:
    """What a message costs in a ZMTP 3.1 stream: a frame has a head of 2 bytes, of 9 beyond 255."""
    return sum(len(frame) + (2 if len(frame) < 256 else 9) for frame in frames)


def has_message(socket: Socket) -> bool:
    """Whether a message can be received now; cheaper than an exception that says no."""
    return bool(int(_read_option(socket, EVENTS)) & CAN_RECEIVE)
