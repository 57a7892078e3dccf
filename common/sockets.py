"""How midspan's ZeroMQ sockets are set up on the connecting side."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from common.settings import MAX_BODY_BYTES

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

RECONNECT_MS, RECONNECT_LIMIT_MS = 50, 500


def connect_dealer(
    context: Context, endpoint: str, *, identity: bytes = b"", keep_unsent: bool = False
) -> Socket:
    """A DEALER that finds its broker again whenever that comes back.

    Without `keep_unsent` nothing is queued for a broker that is not there: sending waits, or
    raises zmq.Again, so that old requests do not pile up.
    """
    socket = context.socket(zmq.DEALER)
    if identity:
        socket.setsockopt(zmq.IDENTITY, identity)
    socket.setsockopt(zmq.IMMEDIATE, int(not keep_unsent))
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_BODY_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_LIMIT_MS)
    socket.connect(endpoint)
    return socket


def wire_bytes(frames: Sequence[bytes]) -> int:
    """What a message costs in a ZMTP 3.1 stream: a frame has a head of 2 bytes, of 9 beyond 255."""
    return sum(len(frame) + (2 if len(frame) < 256 else 9) for frame in frames)


def has_message(socket: Socket) -> bool:
    """Whether a message can be received now; cheaper than an exception that says no."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)
