"""A far link between edges and their broker: a round trip, and so many bytes per second each way.

What kernels do with `tc netem`, for TCP only and without rights or kernel modules: bytes wait in a
queue for their turn on the link, and then for half a round trip. It knows nothing of messages or
keys. For benchmarks, in a process of its own:

    python -m chaos.far_link tcp://127.0.0.1:5555 --rtt-ms 50 --mbit 20
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

import click

PIECE = 1 << 14  # bytes that are passed on at once
MOST_QUEUED = 256  # pieces


class FarLink:
    """Forwards from `endpoint` to the broker, until `close`."""

    def __init__(self, broker: str, rtt_s: float, bytes_per_s: float) -> None:
        host, _, port = broker.removeprefix("tcp://").rpartition(":")
        self._target = (host, int(port))
        self._way_s = rtt_s / 2
        self._bytes_per_s = bytes_per_s
        self._front = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._front.getsockname()[1]}"
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, name="far-link", daemon=True).start()

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
                far = socket.create_connection(self._target)
            except OSError:
                return  # closed
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                on_its_way: queue.Queue[tuple[float, bytes]] = queue.Queue(MOST_QUEUED)
                for work in (self._take_in, self._give_out):
                    threading.Thread(
                        target=work, args=(source, sink, on_its_way), daemon=True
                    ).start()

    def _take_in(
        self,
        source: socket.socket,
        sink: socket.socket,
        on_its_way: queue.Queue[tuple[float, bytes]],
    ) -> None:
        """Each piece has left when those before it have, and it has itself."""
        free_at, piece = 0.0, b" "
        while piece:
            try:
                piece = source.recv(PIECE)
            except OSError:
                piece = b""
            free_at = max(free_at, time.monotonic()) + len(piece) / self._bytes_per_s
            on_its_way.put((free_at + self._way_s, piece))

    def _give_out(
        self,
        source: socket.socket,
        sink: socket.socket,
        on_its_way: queue.Queue[tuple[float, bytes]],
    ) -> None:
        piece = b" "
        with contextlib.suppress(OSError):
            while piece:
                due_at, piece = on_its_way.get()
                time.sleep(max(0.0, due_at - time.monotonic()))
                sink.sendall(piece)
        for end, way in ((source, socket.SHUT_RD), (sink, socket.SHUT_WR)):
            with contextlib.suppress(OSError):
                end.shutdown(way)


@click.command()
@click.argument("broker")
@click.option("--rtt-ms", type=float, required=True, help="Milliseconds there and back.")
@click.option("--mbit", type=float, required=True, help="Millions of bits per second each way.")
def main(broker: str, rtt_ms: float, mbit: float) -> None:
    """Print where edges reach BROKER over such a link; lasts until it is killed."""
    click.echo(FarLink(broker, rtt_ms / 1000, mbit * 1e6 / 8).endpoint)
    threading.Event().wait()


if __name__ == "__main__":
    main()
