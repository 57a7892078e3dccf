"""A worker is ready when a broker has taken its announcement, and alive when it says so itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from forks import error_line

from common.errors import ProcessFailed
from common.protocol.messages import Alive
from common.protocol.sockets import Context, connect_dealer
from common.protocol.wire import encode_header
from deploy.child import Child, midspan_command
from deploy.pool import LocalPool, PoolSettings

WORKER = ("worker", "--model", "stories-llama", "--threads", "1")


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1, model="stories-llama")) as running:
        yield running


def start(pool: LocalPool, directory: Path, broker: str, *options: str) -> Child:
    address = ("--broker", broker, "--redis-url", pool.redis_url)
    return Child("other", midspan_command(*WORKER, *address, *options), directory)


def status(pool: LocalPool) -> dict[str, Any]:
    client = pool.connect()
    try:
        return client.status()
    finally:
        client.close()


def test_a_worker_whose_id_is_taken_is_ready_when_the_other_one_is_gone(
    pool: LocalPool, tmp_path: Path
) -> None:
    second = start(pool, tmp_path, pool.worker_endpoint, "--id", "w1")
    try:
        line = second.wait_for("does not take this worker")
        pid = pool.workers["w1"].pid
        assert f"a worker 'w1' is here already (process {pid} on " in line
        assert "choose another --id" in line
        time.sleep(0.5)
        assert second.log_text().count("does not take this worker") == 1
        assert "ready:" not in second.log_text()
        pool.kill_worker("w1")
        second.wait_for("worker w1 ready")
    finally:
        second.stop()


def test_a_worker_that_goes_to_the_edges_address_ends_and_names_the_right_one(
    pool: LocalPool, tmp_path: Path
) -> None:
    lost = start(pool, tmp_path, pool.edge_endpoint)
    with pytest.raises(ProcessFailed) as failed:
        lost.wait_for("worker lost ready")
    words = f"{pool.edge_endpoint} is for edges; workers go to {pool.worker_endpoint}"
    assert words in str(failed.value)
    assert "ready:" not in lost.log_text()


@pytest.mark.parametrize(("option", "value"), [("--capacity", "0"), ("--cache-mb", "-1")])
def test_a_worker_that_could_take_nothing_does_not_start(option: str, value: str) -> None:
    assert f"Invalid value for '{option}'" in error_line(*WORKER, option, value)


def test_nobody_elses_heartbeats_keep_a_worker_alive(pool: LocalPool) -> None:
    context: Context = zmq.Context()
    stranger = connect_dealer(context, pool.worker_endpoint)
    pool.workers["w1"].signal(signal.SIGSTOP)
    try:
        give_up_at = time.monotonic() + 10
        while status(pool)["workers"]:
            assert time.monotonic() < give_up_at, "a stranger keeps it alive"
            stranger.send(encode_header(Alive("w1", bytes(16))))
            time.sleep(0.05)
        assert status(pool)["counters"]["forged_workers"] > 0
    finally:
        pool.workers["w1"].signal(signal.SIGCONT)
        context.destroy(linger=0)


def test_an_edge_that_goes_to_the_workers_address_is_told_the_right_one(pool: LocalPool) -> None:
    line = error_line("ask", "hi", "--broker", pool.worker_endpoint)
    assert f"{pool.worker_endpoint} is for workers; edges go to {pool.edge_endpoint}" in line
