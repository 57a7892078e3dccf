"""What one step costs a broker in CPU time: peers that answer at once, and a bare forwarder beside.

    python benchmarks/broker.py [--json]

A real `midspan broker` between many edges, each with one session that asks for its next step as
soon as it has an answer, and workers that answer without computing. Bodies have 520 bytes, as the
row of a model of hidden size 512 in int8 has. The CPU time is that of the broker's whole process,
ZeroMQ's own thread and the workers' heartbeats included.

The baseline is a loop that decides nothing: it reads no header, keeps nothing and sends each step
to the next worker in turn, over the same sockets with the same frames.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import resource
import secrets
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import zmq

from common.protocol.messages import (
    Alive,
    Announce,
    Dispatch,
    Opening,
    Part,
    Service,
    Step,
    StepReply,
)
from common.protocol.sockets import Context, Socket, has_message, receive_frames
from common.protocol.wire import decode_header, encode_header
from common.settings import HEARTBEAT_S
from deploy.child import Child, midspan_command

BODY = os.urandom(520)
SERVICE = Service("f" * 16, "m", "2-6", 512, "float32")
RUNS = ((100, 8), (1000, 64), (1000, 256))


def connect_many(context: Context, endpoint: str, count: int) -> Socket:
    """One socket with `count` connections to an endpoint, called 0000, 0001, …"""
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.LINGER, 0)
    for index in range(count):
        socket.setsockopt(zmq.CONNECT_ROUTING_ID, b"%04d" % index)
        socket.connect(endpoint)
    return socket


def be_workers(endpoint: str, count: int, pipe: Connection) -> None:
    """Announce workers, keep them alive and answer all that comes, until the pipe says stop."""
    context: Context = zmq.Context()
    socket = connect_many(context, endpoint, count)
    pulses = [os.urandom(16) for _ in range(count)]
    announced_at = beaten_at = 0.0
    pipe.send("ready")
    while not pipe.poll():
        now = time.monotonic()
        if now - announced_at >= HEARTBEAT_S:  # as cloud_worker/loop/worker.py does
            announced_at = now
            for index, pulse in enumerate(pulses):
                announce = Announce(f"w{index}", [SERVICE], 64, 100, pulse=pulse)
                socket.send_multipart([b"%04d" % index, encode_header(announce)])
        if now - beaten_at >= HEARTBEAT_S:
            beaten_at = now
            for index, pulse in enumerate(pulses):
                beat = encode_header(Alive(f"w{index}", pulse))
                socket.send_multipart([b"%04d" % index, beat])
        socket.poll(10)
        for _ in range(256):
            if not has_message(socket):
                break
            name, *frames = receive_frames(socket)
            dispatch = decode_header(frames[0])
            if isinstance(dispatch, Dispatch):
                step = decode_header(frames[1])
                assert isinstance(step, Step)
                worker = f"w{int(name)}"
                reply = StepReply(*step.key, dispatch.attempt, 1, step.position, worker, 10, 100)
                socket.send_multipart([name, encode_header(reply), BODY])
    context.destroy(linger=0)


def be_edges(endpoint: str, count: int, seconds: float, pipe: Connection) -> None:
    """Ask for step after step in `count` sessions; send how many were answered, and how fast."""
    context: Context = zmq.Context()
    socket = connect_many(context, endpoint, count)
    opening = encode_header(
        Opening(SERVICE.model, [SERVICE.part], SERVICE.hidden, ["int8"], "", precision="float32")
    )
    sessions = [secrets.token_bytes(16) for _ in range(count)]
    numbers, asked_at = [0] * count, [0.0] * count

    def ask(index: int, *more: bytes) -> None:
        number = numbers[index]
        part = [Part(0, [1], len(BODY))]
        step = Step(sessions[index], 0, 0, number, number, part, 1, 0, 60_000)
        asked_at[index] = time.perf_counter()
        socket.send_multipart([b"%04d" % index, encode_header(step), BODY, *more])

    for index in range(count):
        ask(index, opening)
    answered = 0
    waits: list[float] = []
    warm_at = time.monotonic() + 1.0
    stop_at = warm_at + seconds
    is_warm = False
    while (now := time.monotonic()) < stop_at:
        if not is_warm and now >= warm_at:
            is_warm = True
            pipe.send("warm")
            answered, waits = 0, []
        socket.poll(100)
        for _ in range(256):
            if not has_message(socket):
                break
            name, *frames = receive_frames(socket)
            index = int(name)
            if frames[1:] and len(frames[1]) == len(BODY):
                answered += 1
                waits.append(time.perf_counter() - asked_at[index])
                numbers[index] += 1
                ask(index)
            else:  # the broker wants the opening, or says that it is busy
                ask(index, opening)
    pipe.send((answered, sorted(waits)[int(len(waits) * 0.99)] * 1e3 if waits else 0.0))
    context.destroy(linger=0)


def session_of(header: bytes) -> bytes:
    """The first field of 16 bytes in a header, without reading the rest."""
    at = header.index(b"\xc4\x10") + 2
    return header[at : at + 16]


def forward(pipe: Connection) -> None:
    """The baseline: from edges to workers in turn and back, as fast as a poll loop can."""
    context: Context = zmq.Context()
    edges, workers = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    ports = [socket.bind_to_random_port("tcp://127.0.0.1") for socket in (edges, workers)]
    pipe.send([f"tcp://127.0.0.1:{port}" for port in ports])
    names: dict[bytes, None] = {}
    turn = itertools.cycle(names)
    asked_by: dict[bytes, bytes] = {}
    dispatch = encode_header(Dispatch(1, 0, ""))
    poller = zmq.Poller()
    poller.register(edges, zmq.POLLIN)
    poller.register(workers, zmq.POLLIN)
    while not pipe.poll():
        poller.poll(10)
        for _ in range(256):
            if not has_message(workers):
                break
            name, *frames = receive_frames(workers)
            if len(frames) == 2:
                edges.send_multipart([asked_by[session_of(frames[0])], *frames])
            elif name not in names:
                names[name] = None
                turn = itertools.cycle(list(names))
        for _ in range(256):
            if not names or not has_message(edges):
                break
            name, *frames = receive_frames(edges)
            asked_by[session_of(frames[0])] = name
            workers.send_multipart([next(turn), dispatch, *frames[:2], b""])
    context.destroy(linger=0)


def cpu_s(pid: int) -> float:
    """User and system time of a process and all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(
    pid: int, endpoints: list[str], edges: int, workers: int, seconds: float
) -> list[float]:
    """CPU microseconds of process `pid` per step, p99 of a round trip in ms, steps per second."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    pool = spawn.Process(target=be_workers, args=(endpoints[1], workers, theirs), daemon=True)
    pool.start()
    ours.recv()
    time.sleep(1.0)  # they announce themselves
    edge_end, their_end = spawn.Pipe()
    asking = spawn.Process(
        target=be_edges, args=(endpoints[0], edges, seconds, their_end), daemon=True
    )
    asking.start()
    edge_end.recv()
    before_s, begun_at = cpu_s(pid), time.monotonic()
    answered, p99_ms = edge_end.recv()
    used_s, took_s = cpu_s(pid) - before_s, time.monotonic() - begun_at
    ours.send("stop")
    for process in (asking, pool):
        process.join(10)
    return [used_s / max(1, answered) * 1e6, p99_ms, answered / took_s]


def measure_broker(edges: int, workers: int, seconds: float) -> list[float]:
    with TemporaryDirectory() as directory:
        command = midspan_command(
            "broker",
            "--edge-endpoint",
            "tcp://127.0.0.1:*",
            "--worker-endpoint",
            "tcp://127.0.0.1:*",
        )
        child = Child("broker", command, Path(directory))
        words = child.wait_for("broker ready").split()
        endpoints = [words[words.index("edges") + 1], words[words.index("workers") + 1]]
        try:
            return measure(child.pid, endpoints, edges, workers, seconds)
        finally:
            child.stop()


def measure_forwarder(edges: int, workers: int, seconds: float) -> list[float]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=forward, args=(theirs,), daemon=True)
    process.start()
    endpoints = ours.recv()
    assert process.pid is not None
    try:
        return measure(process.pid, endpoints, edges, workers, seconds)
    finally:
        ours.send("stop")
        process.join(10)


@click.command()
@click.option("--seconds", default=5.0, show_default=True, help="Of each measurement.")
@click.option("--rounds", default=3, show_default=True, help="Medians are taken over them.")
@click.option("--only", help="As EDGESxWORKERS.  [default: 100x8, 1000x64 and 1000x256]")
@click.option("--json", "as_json", is_flag=True)
def main(seconds: float, rounds: int, only: str | None, as_json: bool) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    runs: list[dict[str, Any]] = []
    for edges, workers in [tuple(map(int, only.split("x")))] if only else RUNS:
        broker, forwarder = [], []
        for _ in range(rounds):
            broker.append(measure_broker(edges, workers, seconds))
            forwarder.append(measure_forwarder(edges, workers, seconds))
        cpu_us, p99_ms, per_s = (statistics.median(column) for column in zip(*broker, strict=True))
        bare_us = statistics.median(used_us for used_us, _, _ in forwarder)
        run = {
            "edges": edges,
            "workers": workers,
            "cpu_us_per_step": round(cpu_us, 1),
            "p99_ms": round(p99_ms, 2),
            "steps_per_s": round(per_s),
            "forwarder_cpu_us_per_step": round(bare_us, 1),
            "ratio": round(cpu_us / bare_us, 2),
        }
        runs.append(run)
        if not as_json:
            click.echo(", ".join(f"{name} {value}" for name, value in run.items()))
    if as_json:
        click.echo(json.dumps({"runs": runs}))


if __name__ == "__main__":
    main()
