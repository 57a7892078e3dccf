"""Peers of another protocol are refused with a sentence that names both, whoever they are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from common.errors import BrokerUnavailable, ProcessFailed
from common.protocol.messages import Joined, OtherProtocol
from common.protocol.sockets import Context, connect_dealer
from common.protocol.wire import decode_header, encode_header
from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient

BOTH = "protocol 1 and the broker speaks protocol 2"
SESSION = b"s" * 16
OLD_STEP = [1, "step", SESSION, 3, 0, 7, 0, [[0, 1, 12]], 1, 0, 60_000, ""]
OLD_IMAGE = [1, "image", SESSION, 3, 7, 0, [], 0, 60_000, ""]
OLD_ANNOUNCE = [1, "announce", "w1", [], 8, 100, True, 1, "host", {}]


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=0)) as running:
        yield running


def ask(endpoint: str, *frames: bytes) -> list[bytes]:
    context: Context = zmq.Context()
    socket = connect_dealer(context, endpoint)
    socket.setsockopt(zmq.RCVTIMEO, 5000)
    try:
        socket.send_multipart(frames)
        return socket.recv_multipart()
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("old", [OLD_STEP, OLD_IMAGE])
def test_an_edge_of_protocol_1_is_refused_in_its_own_words(pool: LocalPool, old: list[Any]) -> None:
    (answer,) = ask(pool.edge_endpoint, msgpack.packb(old), b"body")
    version, kind, session_id, generation, step, code, reason = msgpack.unpackb(answer)
    assert (version, kind, session_id, generation, step) == (1, "refused", SESSION, 3, 7)
    assert code == "invalid"
    assert BOTH in reason


def test_a_worker_of_protocol_1_is_refused_and_both_are_in_the_log(pool: LocalPool) -> None:
    (answer,) = ask(pool.worker_endpoint, msgpack.packb(OLD_ANNOUNCE))
    told = decode_header(answer)
    assert isinstance(told, OtherProtocol)
    assert BOTH in told.reason
    assert pool.broker is not None
    pool.broker.wait_for("header is of protocol 1; this midspan speaks protocol 2", timeout_s=5)


class LaterBroker:
    """Answers whatever it is sent with a header of protocol 3."""

    def __init__(self) -> None:
        self._context: Context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        later = encode_header(Joined()).replace(b"/2", b"/3")
        while not self._closed.is_set():
            if self._socket.poll(20):
                peer, *_ = self._socket.recv_multipart()
                self._socket.send_multipart([peer, later])
        self._context.destroy(linger=0)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


@pytest.fixture
def later() -> Iterator[LaterBroker]:
    broker = LaterBroker()
    yield broker
    broker.close()


def test_an_edge_names_the_protocols_when_a_broker_speaks_another(later: LaterBroker) -> None:
    client = BrokerClient([later.endpoint])
    words = f"the broker at {later.endpoint} says: header is of protocol 3; this midspan speaks"
    with pytest.raises(BrokerUnavailable, match=f"{words} protocol 2"):
        client.status()
    client.close()


def test_a_worker_names_the_protocols_when_a_broker_speaks_another(
    later: LaterBroker, pool: LocalPool, tmp_path: Path
) -> None:
    command = midspan_command(
        "worker", "--broker", later.endpoint, "--redis-url", pool.redis_url,
        "--model", "stories-llama", "--threads", "1", "--id", "w",
    )  # fmt: skip
    worker = Child("w", command, tmp_path)
    with pytest.raises(ProcessFailed, match="is of protocol 3; this midspan speaks protocol 2"):
        worker.wait_for("worker w ready")
