"""What peers make a broker keep that show no key, end no message or read no answer.

    python -P benchmarks/before_a_key.py    (-P: or broker.py beside it would be the package)

A broker in a process of its own for each figure, once without broker/connections.py's limits
("before") and once with them. Prints its peak of resident memory (VmHWM), the bytes that the peers
got rid of, and how many of their connections were ended. At most 300 MB are sent in each attempt,
all on 127.0.0.1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

from broker.connections import ConnectionLimits
from broker.server import BrokerServer
from chaos.raw_peers import RawPeer, large_worker, make_step
from common.protocol.sockets import connect_dealer
from common.security.keys import BROKER, create_key, ensure_member, read_public
from edge_agent.engine.client import BrokerClient

MB = 1 << 20
SENT_MB = 300
ANSWER_MB = 30
SETTLE_S = 1.0
NO_LIMITS = ConnectionLimits(*[1 << 60] * 6)


class Broker:
    """One in a process of its own."""

    def __init__(self, with_limits: bool, keys: Path | None) -> None:
        command = [sys.executable, "-P", __file__, "--serve", "limits" if with_limits else "none"]
        command += ["--keys", str(keys)] if keys is not None else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.edges, self.workers = self.process.stdout.readline().split()
        self.at_rest_mb = self.peak_mb()

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(x.split()[1]) / 1024 for x in status.splitlines() if "VmHWM" in x)


def serve(limits: str, keys: Path | None) -> None:
    chosen = NO_LIMITS if limits == "none" else ConnectionLimits()
    address = "tcp://127.0.0.1:*"
    server = BrokerServer(address, address, keys=keys, connection_limits=chosen)
    print(server.edge_endpoint, server.worker_endpoint, flush=True)
    server.run()


Figures = tuple[float, int]  # MB that the peers got rid of, connections that were ended


def side_by_side(
    count: int, connect: Callable[[], RawPeer], work: Callable[[RawPeer], object]
) -> Figures:
    """Peers in threads; each is ended or done."""
    peers = [connect() for _ in range(count)]
    threads = [threading.Thread(target=work, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    time.sleep(SETTLE_S)
    ended = sum(peer.is_ended(0.3) for peer in peers)
    for peer in peers:
        peer.close()
    return sum(peer.sent_bytes for peer in peers) / MB, ended


def without_a_key(count: int) -> Callable[[Broker], Figures]:
    size = min(60, SENT_MB // count) * MB

    def attempt(broker: Broker) -> Figures:
        return side_by_side(
            count, lambda: RawPeer(broker.edges, "CURVE"), lambda peer: peer.send_unfinished(size)
        )

    return attempt


def endless(frame_bytes: int, wire_mb: int) -> Callable[[Broker], Figures]:
    frames = wire_mb * MB // (frame_bytes + (2 if frame_bytes < 256 else 9))

    def attempt(broker: Broker) -> Figures:
        return side_by_side(
            1, lambda: RawPeer(broker.edges, "NULL"),
            lambda peer: peer.send_frames_without_end(frames, frame_bytes),
        )  # fmt: skip

    return attempt


def endless_with_a_key(keys: Path) -> Callable[[Broker], Figures]:
    """ZeroMQ's own sockets send a message when it is whole: this one has 300 frames of 1 MB."""

    def attempt(broker: Broker) -> Figures:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        edge = connect_dealer(context, broker.edges, ensure_member(keys, "edge", "edge"))
        ends = edge.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        edge.send_multipart([bytes(MB)] * SENT_MB)
        ended = ends.poll(3000)
        context.destroy(linger=0)
        return SENT_MB, int(bool(ended))

    return attempt


def unread_answers(broker: Broker) -> Figures:
    """An edge asks for ten large answers and reads none of them."""
    with large_worker(broker.workers, ANSWER_MB * MB, compute_s=0.2) as got:
        client = BrokerClient([broker.edges])
        while not client.status()["workers"]:
            time.sleep(0.05)
        client.close()
        peer = RawPeer(broker.edges, "NULL")
        for _ in range(SENT_MB // ANSWER_MB):
            peer.send_message(make_step())
        give_up_at = time.monotonic() + 10
        while len(got) < SENT_MB // ANSWER_MB and time.monotonic() < give_up_at:
            time.sleep(0.05)
        time.sleep(SETTLE_S)
        peer.close()
    return len(got) * ANSWER_MB, -1


@contextmanager
def made_keys() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        create_key(Path(directory), BROKER)
        read_public(str(Path(directory) / f"{BROKER}.key"))
        yield Path(directory)


def measure(attempt: Callable[[Broker], Figures], with_limits: bool, keys: Path | None) -> str:
    broker = Broker(with_limits, keys)
    try:
        sent_mb, ended = attempt(broker)
        return f"{broker.at_rest_mb:5.0f} -> {broker.peak_mb():5.0f} MB, {sent_mb:4.0f} MB sent" + (
            f", {ended} ended" if ended >= 0 else ""
        )
    finally:
        broker.process.kill()
        broker.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", choices=["limits", "none"], help=argparse.SUPPRESS)
    parser.add_argument("--keys", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.keys)
        return
    with made_keys() as keys:
        attempts: list[tuple[str, Callable[[Broker], Figures], Path | None]] = [
            ("one connection without a key", without_a_key(1), keys),
            ("eight connections without a key", without_a_key(8), keys),
            ("endless message, frames of 1 MB", endless(MB, SENT_MB), None),
            ("endless message, empty frames", endless(0, 16), None),
            ("300 frames of 1 MB, admitted key", endless_with_a_key(keys), keys),
            ("ten answers of 30 MB, none read", unread_answers, None),
        ]
        for name, attempt, used in attempts:
            for with_limits in (False, True):
                figures = measure(attempt, with_limits, used)
                print(f"{name:34} {'now' if with_limits else 'before':7} {figures}", flush=True)


if __name__ == "__main__":
    main()
