"""A thin link between edges and their broker: so many bytes per second each way, and no more.

What an edge has sent lies in small buffers until it has gone through. For tests and `chaos`.
"""

from __future__ import annotations

import contextlib
import socket
import time

from chaos.forwarder import Forwarder, end_all, start_thread

PIECE_S = 0.05  # a piece of so many seconds is passed on at once
BUFFER_BYTES = 4096
FULL_PIECE = 1 << 16


class ThinLink(Forwarder):
    """`bytes_per_s` may be set at any time; None is as fast as it goes."""

    def __init__(self, broker: str, bytes_per_s: float | None = None) -> None:
        self.bytes_per_s = bytes_per_s
        self.bytes_up = self.bytes_down = 0
        super().__init__(broker, BUFFER_BYTES)

    def carry(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        start_thread(self._forward, source, sink, is_up)

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
        end_all((source, sink))
