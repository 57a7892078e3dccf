"""A far link between edges and their broker: a round trip, and so many bytes per second each way.

What kernels do with `tc netem`, for TCP only and without rights or kernel modules: bytes wait in a
queue for their turn on the link, and then for half a round trip. In a process of its own:

    python -m chaos.far_link tcp://127.0.0.1:5555 --rtt-ms 50 --mbit 20
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from typing import TypeAlias

import click

from chaos.forwarder import Forwarder, end_all, start_thread

PIECE = 1 << 14  # bytes that are passed on at once
MOST_QUEUED = 256  # pieces


OnItsWay: TypeAlias = "queue.Queue[tuple[float, bytes]]"  # when each piece is due, and the piece


class FarLink(Forwarder):
    """A round trip of `rtt_s`, and so many bytes per second each way."""

    def __init__(self, broker: str, rtt_s: float, bytes_per_s: float) -> None:
        self._way_s = rtt_s / 2
        self._bytes_per_s = bytes_per_s
        super().__init__(broker)

    def carry(self, source: socket.socket, sink: socket.socket, is_up: bool) -> None:
        on_its_way: OnItsWay = queue.Queue(MOST_QUEUED)
        start_thread(self._take_in, source, on_its_way)
        start_thread(self._give_out, source, sink, on_its_way)

    def _take_in(self, source: socket.socket, on_its_way: OnItsWay) -> None:
        """Each piece has left when those before it have, and it has itself."""
        free_at, piece = 0.0, b" "
        while piece:
            try:
                piece = source.recv(PIECE)
            except OSError:
                piece = b""
            free_at = max(free_at, time.monotonic()) + len(piece) / self._bytes_per_s
            on_its_way.put((free_at + self._way_s, piece))

    def _give_out(self, source: socket.socket, sink: socket.socket, on_its_way: OnItsWay) -> None:
        piece = b" "
        with contextlib.suppress(OSError):
            while piece:
                due_at, piece = on_its_way.get()
                time.sleep(max(0.0, due_at - time.monotonic()))
                sink.sendall(piece)
        end_all([source], socket.SHUT_RD)
        end_all([sink], socket.SHUT_WR)


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
