"""Peers below ZeroMQ, which send what no library would, and a worker with answers of any size.

For tests and benchmarks of the broker's limits. The format is ZMTP 3.1, rfc.zeromq.org/spec/37.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Iterator

import zmq

from common.protocol.messages import Announce, Dispatch, Opening, Part, Service, Step, StepReply
from common.protocol.sockets import Context, connect_dealer, has_message, receive_frames
from common.protocol.wire import decode_header, encode_header
from common.security.keys import ClientKeys

MORE, LONG, COMMAND = 1, 2, 4  # flags of a frame
PIECE = bytes(1 << 18)
GREETING_BYTES = 64


class RawPeer:
    """A connection that says what it is told to, and reads nothing."""

    def __init__(self, endpoint: str, mechanism: str) -> None:
        """`mechanism` is NULL, which is then a DEALER that has shaken hands, or CURVE."""
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._socket = socket.create_connection((host, int(port)))
        self._socket.settimeout(2.0)
        self.sent_bytes = 0
        signature = b"\xff" + bytes(8) + b"\x7f" + bytes([3, 1])
        self.send(signature + mechanism.encode().ljust(20, b"\0") + bytes(32))
        if mechanism == "NULL":
            self._socket.recv(GREETING_BYTES, socket.MSG_WAITALL)
            kind = b"\x0bSocket-Type" + struct.pack("!I", 6) + b"DEALER"
            self.send(make_frame(b"\x05READY" + kind, COMMAND))
            self._socket.recv(2, socket.MSG_WAITALL)  # the beginning of its own

    def close(self) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bool:
        """False when the other side has ended the connection or does not read for 2 s."""
        try:
            self._socket.sendall(data)
        except OSError:
            return False
        self.sent_bytes += len(data)
        return True

    def send_message(self, frames: list[bytes]) -> bool:
        last = len(frames) - 1
        return self.send(b"".join(make_frame(f, MORE * (i < last)) for i, f in enumerate(frames)))

    def send_unfinished(self, size: int) -> bool:
        """All but the last byte of one command of `size` bytes, as in a handshake."""
        return self.send(struct.pack("!BQ", LONG | COMMAND, size)) and self._send_zeros(size - 1)

    def send_frames_without_end(self, count: int, frame_bytes: int) -> bool:
        """So many frames of a message, none of which is the last."""
        frame = make_frame(bytes(frame_bytes), MORE)
        at_once = max(1, len(PIECE) // len(frame))
        pieces = [at_once] * (count // at_once) + [count % at_once]
        return all(self.send(frame * piece) for piece in pieces)

    def _send_zeros(self, count: int) -> bool:
        pieces = [len(PIECE)] * (count // len(PIECE)) + [count % len(PIECE)]
        return all(self.send(PIECE[:piece]) for piece in pieces)

    def is_ended(self, timeout_s: float) -> bool:
        """Whether the other side ends the connection in this time; what it says is thrown away."""
        give_up_at = time.monotonic() + timeout_s
        self._socket.settimeout(0.1)
        while time.monotonic() < give_up_at:
            with contextlib.suppress(TimeoutError):
                try:
                    if not self._socket.recv(1 << 16):
                        return True
                except ConnectionError:
                    return True
        return False


def make_frame(body: bytes, flags: int = 0) -> bytes:
    if len(body) < 256:
        return struct.pack("!BB", flags, len(body)) + body
    return struct.pack("!BQ", flags | LONG, len(body)) + body


SERVICE = Service("0" * 16, "large", "0-1", 8, "float32")


def make_step(body: bytes = bytes(32)) -> list[bytes]:
    """The first step of a new session for a LargeWorker."""
    step = Step(secrets.token_bytes(16), 0, 0, 0, 0, [Part(0, [1], len(body))], 1, 0, 60_000)
    opening = Opening(SERVICE.model, [SERVICE.part], SERVICE.hidden, ["fp32"], "")
    return [encode_header(step), body, encode_header(opening)]


@contextlib.contextmanager
def large_worker(
    broker: str, reply_bytes: int, keys: ClientKeys | None = None, compute_s: float = 0.0
) -> Iterator[list[int]]:
    """Answers every step with so many zeros, in a thread; gives the sizes of the bodies it got."""
    stop = threading.Event()
    got: list[int] = []

    def run() -> None:
        context: Context = zmq.Context()
        socket = connect_dealer(context, broker, keys)
        announce = encode_header(Announce("large", [SERVICE], 64, 2000, host="here"))
        body = bytes(reply_bytes)
        announce_at = 0.0
        while not stop.is_set():
            if time.monotonic() >= announce_at:
                socket.send(announce)
                announce_at = time.monotonic() + 0.1
            socket.poll(10)
            if not has_message(socket):
                continue
            frames = receive_frames(socket)
            dispatch = decode_header(frames[0])
            if isinstance(dispatch, Dispatch):
                step = decode_header(frames[1])
                assert isinstance(step, Step)
                time.sleep(compute_s)
                got.append(len(frames[2]))
                reply = StepReply(*step.key, dispatch.attempt, 1, 0, "large", 0, 0)
                socket.send_multipart([encode_header(reply), body])
        context.destroy(linger=0)

    thread = threading.Thread(target=run, name="large-worker", daemon=True)
    thread.start()
    try:
        yield got
    finally:
        stop.set()
        thread.join()
