"""Waiting awake: what is looked for and for how long, who does so, and what a text is then."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import zmq
from forks import run_midspan
from pools import GREEDY, PROMPTS, reference_tokens
from test_orphans import children_of
from waiting import wait_until

from broker.server import BrokerServer
from cloud_worker.loop.worker import Worker, WorkerSettings
from cloud_worker.serving import ServingSettings, load_services
from cloud_worker.state.memory_store import MemoryKvStore
from common.protocol.sockets import Context, Socket
from common.protocol.spinning import SpinningPoller
from common.settings import MAX_SPIN_US
from deploy.child import Child, midspan_command
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds
from edge_agent.text.session import Session
from edge_agent.text.tokenizer import TextTokenizer

LONG_S = 3600.0


@dataclass
class Looks:
    """How long each look at the sockets was ready to sleep, ms, and what waited between them."""

    timeouts: list[int | None] = field(default_factory=list)
    between: Counter[str] = field(default_factory=Counter)  # looks, by the thread's name


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Looks:
    noted = Looks()
    poll, give_way = zmq.Poller.poll, os.sched_yield

    def noting_poll(poller: zmq.Poller, timeout: int | None = None) -> object:
        noted.timeouts.append(timeout)
        return poll(poller, timeout)

    def noting_yield() -> None:
        noted.between[threading.current_thread().name] += 1
        give_way()

    monkeypatch.setattr(zmq.Poller, "poll", noting_poll)
    monkeypatch.setattr(os, "sched_yield", noting_yield)
    return noted


@pytest.fixture
def pair() -> Iterator[tuple[Socket, Socket]]:
    context: Context = zmq.Context()
    ends = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    ends[0].bind("inproc://pair")
    ends[1].connect("inproc://pair")
    yield ends
    context.destroy(linger=0)


def make_poller(socket: Socket, spin_s: float) -> SpinningPoller:
    poller = SpinningPoller(spin_s)
    poller.register(socket, zmq.POLLIN)
    return poller


def test_who_expects_nothing_sleeps_at_once(pair: tuple[Socket, Socket], looks: Looks) -> None:
    assert make_poller(pair[0], LONG_S).poll(5) == []
    assert looks.timeouts == [5]


def test_who_does_not_spin_sleeps_whatever_is_expected(
    pair: tuple[Socket, Socket], looks: Looks
) -> None:
    poller = make_poller(pair[0], 0.0)
    poller.expect()
    assert poller.poll(5) == []
    assert looks.timeouts == [5]


def test_what_comes_in_time_finds_it_awake(pair: tuple[Socket, Socket], looks: Looks) -> None:
    poller = make_poller(pair[0], LONG_S)
    poller.expect()
    sender = threading.Thread(
        target=lambda: (wait_until(lambda: len(looks.timeouts) > 10), pair[1].send(b"step"))
    )
    sender.start()
    assert poller.poll(60_000) == [(pair[0], zmq.POLLIN)]
    sender.join()
    assert set(looks.timeouts) == {0}


def test_no_wait_is_longer_for_being_awake(pair: tuple[Socket, Socket], looks: Looks) -> None:
    poller = make_poller(pair[0], LONG_S)
    poller.expect()
    assert poller.poll(5) == []
    assert poller.poll(0) == []
    assert set(looks.timeouts) == {0}


def test_after_its_time_it_sleeps_for_the_rest_and_then_every_time(
    pair: tuple[Socket, Socket], looks: Looks
) -> None:
    poller = make_poller(pair[0], 0.002)
    poller.expect()
    sender = threading.Thread(
        target=lambda: (wait_until(lambda: set(looks.timeouts) > {0}), pair[1].send(b"step"))
    )
    sender.start()
    assert poller.poll(60_000) == [(pair[0], zmq.POLLIN)]
    sender.join()
    *awake, rest = looks.timeouts
    assert set(awake) == {0}
    assert rest is not None
    assert 0 < rest <= 60_000
    pair[0].recv()
    looks.timeouts.clear()
    assert poller.poll(1) == []
    assert looks.timeouts == [1]


def test_broker_and_worker_look_after_a_step_and_not_before(
    demo_ends: ModelEnds, whole_model: torch.nn.Module, looks: Looks
) -> None:
    """Heartbeats and announcements, which always come, are slept for."""
    tokenizer = TextTokenizer(demo_ends.directory)
    store = MemoryKvStore()
    makers = load_services(
        demo_ends.directory, "2-6", None, None, [], store, ServingSettings("float32", "cpu")
    )
    joined = threading.Event()
    broker = BrokerServer("tcp://127.0.0.1:*", "tcp://127.0.0.1:*", spin_s=0.05)
    worker = Worker(
        store,
        lambda outbox: [make(outbox) for make in makers],
        WorkerSettings([broker.worker_endpoint], spin_s=0.05),
        on_ready=lambda _: joined.set(),
    )
    threads = [
        threading.Thread(target=broker.run, name="broker"),
        threading.Thread(target=worker.run, name="worker"),
    ]
    for thread in threads:
        thread.start()
    try:
        assert joined.wait(60)
        client = BrokerClient([broker.edge_endpoint])
        for _ in range(3):
            client.status()
        assert looks.between == {}
        session = Session(demo_ends, client)
        ids = tokenizer.encode(PROMPTS[0])
        written = list(session.generate(ids, 12, GREEDY))
        client.close()
        assert looks.between.keys() == {"broker", "worker"}
    finally:
        worker.request_drain()
        threads[1].join()
        broker.stop()
        threads[0].join()
    assert [written] == reference_tokens(whole_model, tokenizer, PROMPTS[:1], 12)


@pytest.mark.usefixtures("unforked")  # command lines
def test_up_hands_it_to_its_broker_and_workers(tmp_path: Path) -> None:
    command = midspan_command(
        "up", "--workers", "1", "--model", "stories-llama", "--spin-us", "300",
        "--edge-endpoint", f"ipc://{tmp_path}/edges",
        "--worker-endpoint", f"ipc://{tmp_path}/workers",
    )  # fmt: skip
    up = Child("up", command, tmp_path)
    try:
        assert " --spin-us 300" in up.wait_for("one more worker: ")
        lines = [
            Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in children_of(up.pid)
        ]
        spinning = [line for line in lines if b"--spin-us" in line]
        assert {line[line.index(b"--spin-us") + 1] for line in spinning} == {b"300"}
        assert {b"broker", b"worker"} <= {word for line in spinning for word in line}
    finally:
        up.stop()


@pytest.mark.parametrize("command", ["worker", "broker", "up"])
@pytest.mark.parametrize("value", ["-1", str(MAX_SPIN_US + 1), "fast"])
def test_a_time_out_of_bounds_is_named(command: str, value: str) -> None:
    done = run_midspan(command, "--spin-us", value)
    assert done.returncode != 0
    assert "'--spin-us'" in done.stderr
    assert value in done.stderr
