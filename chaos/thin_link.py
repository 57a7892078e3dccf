"""A thin link between edges and their broker: so many bytes per second each way, and no more.

It forwards bytes of TCP, so it knows nothing of messages or keys, and what an edge has sent lies in
small buffers until it has gone through. For tests and `midspan chaos`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time

PIECE_S = 0.05  # a piece of so many seconds is passed on at once
BUFFER_BYTES = 4096
FULL_PIECE = 1 << 16


class ThinLink:
    """Forwards from `endpoint` to the broker, in two threads for each connection, until `close`.

    `bytes_per_s` may be set at any time; None is as fast as it goes.
    """

    def __init__(self, broker: str, bytes_per_s: float | None = None) -> None:
        host, _, port = broker.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self.bytes_per_s = bytes_per_s
        self.bytes_up = self.bytes_down = 0
        self._front = socket.socket()
        self._front.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
        self._front.bind(("127.0.0.1", 0))
        self._front.listen()
        self.endpoint = f"tcp://127.0.0.1:{self._front.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, name="thin-link", daemon=True).start()

    def close(self) -> None:
        """End all connections and take no more."""
        for end in (self._front, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._front.accept()
            except OSError:
                return  # closed
            far = socket.socket()
            for end in (near, far):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            try:
                far.connect(self._target)
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(
                    target=self._forward, args=(source, sink, source is near), daemon=True
                ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                rate = self.bytes_per_s
                piece = source.recv(FULL_PIECE if rate is None else max(1, int(rate * PIECE_S)))
                if not piece:
                    break
                sink.sendall(piece)
                if is_up:
                    self.bytes_up += len(piece)
                else:
                    self.bytes_down += len(piece)
                if rate is not None:
                    time.sleep(len(piece) / rate)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
