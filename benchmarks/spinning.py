"""What `--spin-us` brings on one machine: messages and tokens with processes awake and asleep.

    python benchmarks/spinning.py [--spin-us 500 --spin-us 20000] [--rounds 8] [--json]

First one hop: a process sends another one 600 bytes every 3 ms and gets them back, while the
other, or both, spin between them. Then whole pools that spin in the worker, or in broker and
worker, each with one worker: the same text is written with all in turns; `added` is what is left of
a token's time when head, middle and tail are taken away. One torch thread for each process. All is
compared with sleeping in the same round, so that a noisy machine disturbs all alike: ratios are
medians over rounds, of the sleeping one's time to the other's. Above 1, spinning is faster. How
much else there was to do for the cores is said by `load`, of the last minute.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
import zmq
from overhead import make_model

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.console.tables import format_table
from common.protocol.sockets import Context
from common.protocol.spinning import SpinningPoller
from common.weights.demo_model import find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings

PROMPT_TOKENS = 32
HOP_BYTES, HOP_PAUSE_S, HOPS = 600, 0.003, 300
SLEEPING = "sleeping"


@dataclass(slots=True)
class Measured:
    """Milliseconds: of a round's median token, and of its steps beside the model."""

    token_ms: list[float] = field(default_factory=list)
    added_ms: list[float] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


def answer_hops(spin_s: float, told: Any) -> None:
    """In a process of its own: send back what comes, and say where it is to be sent."""
    context: Context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    told.send(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
    poller = SpinningPoller(spin_s)
    poller.register(socket, zmq.POLLIN)
    parent = os.getppid()
    while True:
        poller.expect()
        if poller.poll(1000):
            socket.send(socket.recv())
        elif os.getppid() != parent:
            return


def time_hops(here_s: float, there_s: float) -> float:
    """Median milliseconds there and back, with so much spinning at each end."""
    ours, theirs = multiprocessing.Pipe()
    other = multiprocessing.Process(target=answer_hops, args=(there_s, theirs), daemon=True)
    other.start()
    context: Context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(ours.recv())
    poller = SpinningPoller(here_s)
    poller.register(socket, zmq.POLLIN)
    took = []
    for _ in range(HOPS):
        go_on_at = time.perf_counter() + HOP_PAUSE_S
        while time.perf_counter() < go_on_at:  # as one who computes
            pass
        begun_at = time.perf_counter()
        socket.send(bytes(HOP_BYTES))
        poller.expect()
        while not poller.poll(1000):
            pass
        socket.recv()
        took.append(time.perf_counter() - begun_at)
    other.terminate()
    other.join()
    context.destroy(linger=0)
    return 1e3 * statistics.median(took)


def compare_hops(spin_us: int, rounds: int) -> list[dict[str, Any]]:
    """Hops between two processes that sleep, or spin for longer than a hop takes."""
    spin_s = spin_us / 1e6
    ways = {SLEEPING: (0.0, 0.0), "one spins": (0.0, spin_s), "both spin": (spin_s, spin_s)}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 else reversed(list(ways)):
            took[name].append(time_hops(*ways[name]))
    return [
        {
            "hop": name,
            "ms": round(statistics.median(times), 3),
            "ratio": ratio_of(times, took[SLEEPING]),
            "load": round(os.getloadavg()[0], 1),
        }
        for name, times in took.items()
    ]


def ratio_of(ours: list[float], sleeping: list[float]) -> float:
    """Of what sleeping took to ours, the median of pairs."""
    return round(statistics.median(b / a for a, b in zip(ours, sleeping, strict=True)), 3)


def list_ways(spins_us: tuple[int, ...]) -> dict[str, tuple[list[str], list[str]]]:
    """Options of broker and worker, by name."""
    ways: dict[str, tuple[list[str], list[str]]] = {SLEEPING: ([], [])}
    for spin_us in spins_us:
        option = ["--spin-us", str(spin_us)]
        ways[f"worker {spin_us} us"] = ([], option)
        ways[f"both {spin_us} us"] = (option, option)
    return ways


def write(ends: ModelEnds, endpoint: str, prompt: list[int], tokens: int, way: Measured) -> None:
    client = BrokerClient([endpoint])
    session = Session(ends, client, uniform_settings("int8"))
    way.tokens.append(list(session.generate(prompt, tokens, SamplingSettings())))
    client.close()
    stages = session.stats.stage_s
    added = [n + q for n, q in zip(stages["network"], stages["queue"], strict=True)][1:]
    way.added_ms.append(1e3 * statistics.median(added))
    whole = [sum(parts) for parts in zip(*stages.values(), strict=True)][1:]
    way.token_ms.append(1e3 * statistics.median(whole))


def measure(
    directory: Path, ways: dict[str, tuple[list[str], list[str]]], rounds: int, tokens: int
) -> dict[str, Measured]:
    ends = load_ends(directory)
    measured = {name: Measured() for name in ways}
    prompt = torch.randint(3, 900, (PROMPT_TOKENS,)).tolist()
    with contextlib.ExitStack() as stack:
        pools = {}
        for name, (of_broker, of_worker) in ways.items():
            settings = PoolSettings(
                workers=1, model=str(directory), broker_options=of_broker, worker_options=of_worker
            )
            pools[name] = stack.enter_context(LocalPool(settings))
            write(ends, pools[name].edge_endpoint, prompt, 8, Measured())
        freeze_loaded_objects()
        for number in range(rounds):
            for name in list(ways) if number % 2 else reversed(list(ways)):
                write(ends, pools[name].edge_endpoint, prompt, tokens, measured[name])
    return measured


def summarize(model: str, measured: dict[str, Measured]) -> list[dict[str, Any]]:
    base = measured[SLEEPING]
    return [
        {
            "model": model,
            "way": name,
            "added_ms": round(statistics.median(way.added_ms), 3),
            "token_ms": round(statistics.median(way.token_ms), 2),
            "added_ratio": ratio_of(way.added_ms, base.added_ms),
            "token_ratio": ratio_of(way.token_ms, base.token_ms),
            "load": round(os.getloadavg()[0], 1),
            "same": way.tokens == base.tokens,
        }
        for name, way in measured.items()
    ]


@click.command()
@click.option(
    "--spin-us", "spins_us", type=int, multiple=True, default=[500, 20_000], show_default=True
)
@click.option("--rounds", default=8, show_default=True)
@click.option("--tokens", default=64, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(spins_us: tuple[int, ...], rounds: int, tokens: int, as_json: bool) -> None:
    multiprocessing.set_start_method("spawn")
    set_up_torch(1)
    hops = compare_hops(max(spins_us), rounds)
    rows: list[dict[str, Any]] = []
    ways = list_ways(spins_us)
    with tempfile.TemporaryDirectory() as made:
        make_model(Path(made))
        for name, directory in (("demo", find_model(None)), ("56 M", Path(made))):
            rows += summarize(name, measure(directory, ways, rounds, tokens))
    if as_json:
        click.echo(json.dumps({"hops": hops, "tokens": rows}))
        return
    for table in (hops, rows):
        click.echo(format_table(list(table[0]), [list(map(str, row.values())) for row in table]))


if __name__ == "__main__":
    main()
