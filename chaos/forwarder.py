"""What links made of TCP have to do beside carrying bytes: take connections and end them."""

from __future__ import annotations

import contextlib
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

LOOPBACK = "127.0.0.1"


class Forwarder(ABC):
    """Forwards from `endpoint` to the broker, in threads of its own, until `close`.

    It knows nothing of messages or keys. `buffer_bytes` are those of the system for each
    connection and direction; None leaves them as they are.
    """

    def __init__(self, broker: str, buffer_bytes: int | None = None) -> None:
        host, _, port = broker.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._buffer_bytes = buffer_bytes
        self._front = self._open_socket()
        self._front.bind((LOOPBACK, 0))
        self._front.listen()
        self.endpoint = f"tcp://{LOOPBACK}:{self._front.getsockname()[1]}"
        self._open: list[socket.socket] = []
        start_thread(self._accept)

    @abstractmethod
    def carry(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        """Begin to pass bytes on, up to the broker or down from it, until either ends."""

    def close(self) -> None:
        """End all connections and take no more."""
        end_all((self._front, *self._open))
        for end in (self._front, *self._open):
            end.close()

    def _open_socket(self) -> socket.socket:
        end = socket.socket()
        if self._buffer_bytes is not None:
            end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer_bytes)
        return end

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._front.accept()
            except OSError:
                return  # closed
            far = self._open_socket()
            for end in (near, far):
                if self._buffer_bytes is not None:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer_bytes)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                far.connect(self._target)
            except OSError:
                near.close()
                far.close()
                continue
            self._open += [near, far]
            self.carry(near, far, is_up=True)
            self.carry(far, near, is_up=False)


def start_thread(work: Callable[..., None], *arguments: object) -> None:
    """One that ends with the process, at the latest."""
    threading.Thread(target=work, args=arguments, name="forwarder", daemon=True).start()


def end_all(ends: Iterable[socket.socket], ways: int = socket.SHUT_RDWR) -> None:
    """Whoever waits for one of them waits no more."""
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(ways)
