"""What a connection may make the broker keep: a real broker, real sockets, bytes counted by Linux.

A broker at rest has about 30 MB. Limits and how they are kept: broker/connections.py.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import zmq
from pools import PROMPTS, generate

from broker.connections import MB, Connection, ConnectionLimits, Connections, find_excess
from chaos.raw_peers import RawPeer, large_worker, make_step
from chaos.thin_link import ThinLink
from common.protocol.sockets import Context, connect_dealer, receive_frames
from common.security.keys import BROKER, ClientKeys, create_key, ensure_member
from common.settings import MAX_STEPS_PER_EDGE
from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer

LIMITS = ConnectionLimits()
ENDED_WITHIN_S = 2.0  # a handshake may take 3 s: what ends before was ended by us


class Broker:
    """The command, with keys or without."""

    def __init__(self, directory: Path, keys: Path | None = None) -> None:
        options = ["--edge-endpoint", "tcp://127.0.0.1:*", "--worker-endpoint", "tcp://127.0.0.1:*"]
        options += ["--keys", str(keys)] if keys else []
        self.child = Child("broker", midspan_command("broker", *options), directory)
        words = self.child.wait_for("broker ready").split()
        self.edges, self.workers = words[3], words[5]
        self.at_rest = self.peak_bytes()

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self.child.pid}/status").read_text()
        return next(int(x.split()[1]) << 10 for x in status.splitlines() if "VmHWM" in x)

    @property
    def grown_mb(self) -> float:
        return (self.peak_bytes() - self.at_rest) / MB


@contextmanager
def running(directory: Path, keys: Path | None = None) -> Iterator[Broker]:
    broker = Broker(directory, keys)
    try:
        yield broker
        broker.child.check()
    finally:
        broker.child.stop()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    with running(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("keys")
    create_key(directory, BROKER)
    return directory


@pytest.fixture
def locked_broker(tmp_path: Path, keys: Path) -> Iterator[Broker]:
    with running(tmp_path, keys) as started:
        yield started


def side_by_side(peers: list[RawPeer], work: Callable[[RawPeer], object]) -> None:
    threads = [threading.Thread(target=work, args=(peer,)) for peer in peers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_eight_connections_without_a_key_are_ended_before_they_have_sent_much(
    locked_broker: Broker,
) -> None:
    peers = [RawPeer(locked_broker.edges, "CURVE") for _ in range(8)]
    side_by_side(peers, lambda peer: peer.send_unfinished(37 * MB))
    assert all(peer.is_ended(ENDED_WITHIN_S) for peer in peers)
    assert locked_broker.grown_mb < 60  # what comes in 5 ms, and not 296


def test_a_message_without_end_ends_its_connection(broker: Broker) -> None:
    peer = RawPeer(broker.edges, "NULL")
    peer.send_frames_without_end(300, MB)
    assert peer.is_ended(ENDED_WITHIN_S)
    assert broker.grown_mb < 260  # 130, and what comes between two looks; without a limit 300
    broker.child.wait_for("in no whole message", 5)


def test_empty_frames_without_end_which_are_small_on_the_wire_end_their_connection(
    broker: Broker,
) -> None:
    peer = RawPeer(broker.edges, "NULL")
    peer.send_frames_without_end(12 * MB, 0)  # 24 MB, which would take 768
    assert peer.is_ended(ENDED_WITHIN_S)
    assert broker.grown_mb < 600


def test_an_admitted_edges_endless_message_ends_its_connection(
    locked_broker: Broker, keys: Path
) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    edge = connect_dealer(context, locked_broker.edges, ensure_member(keys, "phone", "edge"))
    ends = edge.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    edge.send_multipart([bytes(MB)] * 300)  # whole in the end, which the broker need not wait for
    assert ends.poll(10_000)
    context.destroy(linger=0)
    assert locked_broker.grown_mb < 260


def test_many_connections_of_one_edge_have_one_limit(broker: Broker) -> None:
    peers = [RawPeer(broker.edges, "NULL") for _ in range(8)]
    side_by_side(peers, lambda peer: peer.send_frames_without_end(110, MB))  # none is over its own
    assert broker.grown_mb < 700  # without a limit 880
    assert sum(peer.is_ended(0.2) for peer in peers) >= 3


def test_an_edge_that_reads_no_answers_is_ended(broker: Broker) -> None:
    with (
        large_worker(broker.workers, 30 * MB, compute_s=0.1) as got,
        closing(BrokerClient([broker.edges])) as client,
    ):
        wait_for_worker(client)
        peer = RawPeer(broker.edges, "NULL")
        for _ in range(10):
            peer.send_message(make_step())
        give_up_at = time.monotonic() + 30
        while len(got) < 10:
            assert time.monotonic() < give_up_at
            client.status()
        assert client.status()["ended_connections"] == 1
    assert broker.grown_mb < 310  # four answers, the fifth, and copies of it; without a limit 360


def wait_for_worker(client: BrokerClient) -> None:
    give_up_at = time.monotonic() + 10
    while not client.status()["workers"]:
        assert time.monotonic() < give_up_at


@pytest.mark.parametrize(
    ("with_keys", "body_mb", "answer_mb"), [(True, 60, 1), (False, 1, 60)], ids=["up", "down"]
)
def test_a_large_message_over_a_thin_link_is_not_cut(
    tmp_path: Path, keys: Path, with_keys: bool, body_mb: int, answer_mb: int
) -> None:
    """It is under way for many looks."""
    edge: ClientKeys | None = ensure_member(keys, "phone", "edge") if with_keys else None
    worker = ensure_member(keys, "gpu", "worker") if with_keys else None
    with (
        running(tmp_path, keys if with_keys else None) as broker,
        large_worker(broker.workers, answer_mb * MB, worker) as got,
        closing(BrokerClient([broker.edges], keys=edge)) as client,
    ):
        wait_for_worker(client)
        link = ThinLink(broker.edges, 25 * MB)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = connect_dealer(context, link.endpoint, edge, pings=False)
        ends = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        socket.send_multipart(make_step(bytes(body_mb * MB)))
        assert socket.poll(60_000)
        _, body = socket.recv_multipart()
        assert len(body) == answer_mb * MB
        assert got == [body_mb * MB]
        assert not ends.poll(0)
        assert client.status()["ended_connections"] == 0
        context.destroy(linger=0)
        link.close()


def test_a_well_behaved_edge_has_its_tokens_meanwhile(demo_ends: ModelEnds) -> None:
    ids = TextTokenizer(demo_ends.directory).encode(PROMPTS[0])
    with LocalPool(PoolSettings(workers=1)) as pool:
        wanted, _ = generate(pool, demo_ends, ids, 30)
        peers = [RawPeer(pool.edge_endpoint, "NULL") for _ in range(3)]
        attack = threading.Thread(
            target=side_by_side, args=(peers, lambda peer: peer.send_frames_without_end(200, MB))
        )
        attack.start()
        tokens, _ = generate(pool, demo_ends, ids, 30)
        attack.join()
        assert tokens == wanted
        assert all(peer.is_ended(ENDED_WITHIN_S) for peer in peers)
        pool.check()


def make_connection(fd: int, up: int = 0, **others: object) -> Connection:
    made = Connection(fd, "edge", (("127.0.0.1", 1), ("10.0.0.1", fd)), is_stranger=False, up=up)
    for name, value in others.items():
        setattr(made, name, value)
    return made


def test_what_is_counted_too_generously_or_twice_does_not_add_up() -> None:
    connection = make_connection(1)
    connection.taken = 500  # of which 400 came in
    connection.see(received=400, acked=100)
    assert (connection.up, connection.down) == (0, 0)
    connection.given = 80
    connection.see(received=700, acked=150)
    assert (connection.up, connection.down) == (300, 30)


def test_the_party_with_most_loses_its_largest_connection_first() -> None:
    limits = ConnectionLimits(edge=100, party=150, all=260)
    mine = [make_connection(fd, 60, account=b"mine") for fd in (1, 2)]
    theirs = [make_connection(fd, 10 * fd, account=b"theirs") for fd in (6, 7, 8)]
    assert list(find_excess([*mine, *theirs], limits)) == [8]
    strangers = [make_connection(fd, 90) for fd in (10, 11)]  # of one host
    assert list(find_excess([*mine, *strangers], limits)) == [10]
    assert list(find_excess(strangers, limits)) == [10]  # over the party's limit alone
    assert not find_excess(mine, limits)


def test_a_descriptor_that_was_given_to_something_else_is_left_alone() -> None:
    connections = Connections(ConnectionLimits(edge=0), has_keys=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        ends = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        accepted = [listener.accept()[0] for _ in range(2)]
        connections.add(accepted[0].fileno(), "edge", port)
        os.dup2(accepted[1].fileno(), accepted[0].fileno())
        ends[1].send(b"x")
        connections.check_all(10.0, 0, lambda: 0)
        assert connections.ended == 0
        connections.add(accepted[1].fileno(), "edge", port)
        connections.check_all(20.0, 0, lambda: 0)
        assert connections.ended == 1
        for each in (*ends, *accepted):
            each.close()


def test_a_connection_that_is_not_to_our_port_is_not_watched() -> None:
    connections = Connections(LIMITS, has_keys=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = socket.create_connection(listener.getsockname())
        connections.add(end.fileno(), "edge", listener.getsockname()[1])
        assert not connections.knows(end.fileno())
        end.close()
    reading, writing = os.pipe()
    connections.add(reading, "edge", 1)
    assert not connections.knows(reading)
    os.close(reading)
    os.close(writing)


def test_a_stranger_that_has_gone_is_forgotten_before_that_is_told() -> None:
    connections = Connections(LIMITS, has_keys=True)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
        fd = accepted.fileno()
        connections.add(fd, "edge", listener.getsockname()[1])
        connections.check_strangers(1.0)
        assert connections.knows(fd)
        assert connections.wait_s(1.0) < 0.01
        accepted.close()
        connections.check_strangers(2.0)
        assert not connections.knows(fd)
        assert connections.wait_s(2.0) == 1.0
        end.close()


def test_an_edge_that_reads_late_has_the_answers_to_all_the_steps_that_it_may_have(
    broker: Broker,
) -> None:
    count, reply_bytes = MAX_STEPS_PER_EDGE, 32 << 10  # more than fits into TCP's buffers
    context: Context = zmq.Context()
    context.setsockopt(zmq.RCVHWM, 1)
    edge = connect_dealer(context, broker.edges)
    watcher = BrokerClient([broker.edges])
    with closing(watcher), large_worker(broker.workers, reply_bytes):
        wait_for(lambda: watcher.status()["workers"] != [])
        for _ in range(count):
            edge.send_multipart(make_step())
        wait_for(lambda: watcher.status()["counters"].get("answers") == count, limit_s=60)
        answers = 0
        while edge.poll(1000):
            answers += len(receive_frames(edge)) == 2
    context.destroy(linger=0)
    assert answers == count


def wait_for(check: Callable[[], bool], limit_s: float = 10.0) -> None:
    give_up_at = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
