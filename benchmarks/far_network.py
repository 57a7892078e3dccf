"""Far networks: tokens/s and time to the first token over a round trip and a rate.

And what a model of the link says to that:

    python benchmarks/far_network.py [--namespaces] [--tokens 96] [--json] [--plot far-network.png]

The model has the shape of 56 M parameters and says its prompt of 512 tokens again, with one token
in twenty another one, so that drafts are right as often as for text that is edited. Broker and
worker are on one side of a link, the edge on the other; one thread for each. The link carries TCP's
bytes (chaos/far_link.py, in a process of its own), or with --namespaces IP packets between two
network namespaces (chaos/tun_link.py; Linux, as root), where TCP has to widen its window first. In
turns: without drafts and a prompt in one piece after another, and with drafts and pieces on their
way together.

`model` is what a link should give: the steps' time in head, middle, tail and queues as measured
in that very run, a round trip for each of them, and their bytes at the link's rate. `ratio` is what
was measured to that.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from overhead import make_model
from report import tell_rows
from round_trips import make_copier

from chaos.tun_link import NEAR, TunLink, in_network_of, leave_network
from common.console.plots import require_matplotlib, save_figure
from common.console.processes import freeze_loaded_objects, set_up_torch
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.drafting.choice import Drafters
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.stats import GenerationStats

ROUND_TRIPS_MS = (20, 50, 100)
RATES_MBIT = (5, 20, 100)
PROMPT = 512

Reach = Callable[[str, float, float], AbstractContextManager[str]]  # broker, ms, Mbit/s


@contextmanager
def far_link(broker: str, rtt_ms: float, mbit: float) -> Iterator[str]:
    """Where the broker is reached over such a link."""
    words = [sys.executable, "-m", "chaos.far_link", broker]
    words += ["--rtt-ms", str(rtt_ms), "--mbit", str(mbit)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


@contextmanager
def packet_links() -> Iterator[Reach]:
    """Links between the namespace of this process, which is a new one, and another."""
    leave_network()
    link = TunLink()

    @contextmanager
    def reach(broker: str, rtt_ms: float, mbit: float) -> Iterator[str]:
        link.set(rtt_ms, mbit)
        with in_network_of(link.far_process):
            yield broker

    try:
        yield reach
    finally:
        link.close()


def write(
    ends: ModelEnds, broker: str, prompt: list[int], tokens: int, is_drafted: bool
) -> tuple[GenerationStats, list[int]]:
    """What an answer cost, and its tokens."""
    settings = uniform_settings("int8")
    if not is_drafted:
        settings = replace(settings, pieces_ahead=1)
    client = BrokerClient([broker])
    client.status()  # a connection is not what is measured
    drafters = Drafters("lookup") if is_drafted else None
    session = Session(ends, client, settings, drafters=drafters)
    written = list(session.generate(prompt, tokens, SamplingSettings()))
    client.close()
    return session.stats, written


def expect_s(stats: GenerationStats, rtt_ms: float, mbit: float) -> float:
    """What all decode steps should take by the model of the link."""
    computing = sum(sum(stats.stage_s[name]) for name in ("head", "queue", "middle", "tail"))
    moved = stats.bytes_up - stats.prompt_bytes_up + stats.bytes_down - stats.prompt_bytes_down
    return computing + stats.round_trips * rtt_ms / 1e3 + moved * 8 / (mbit * 1e6)


def describe(stats: GenerationStats, rtt_ms: float, mbit: float) -> dict[str, Any]:
    took_s = stats.total_s - stats.first_token_s
    new = stats.new_tokens - 1
    return {
        "tokens_per_s": round(new / took_s, 1),
        "model": round(new / expect_s(stats, rtt_ms, mbit), 1),
        "ratio": round(expect_s(stats, rtt_ms, mbit) / took_s, 2),
        "per_trip": round(stats.tokens_per_round_trip, 2),
        "first_ms": round(stats.first_token_s * 1e3),
    }


def measure(scratch: Path, tokens: int, reach: Reach, listens_at: str) -> Iterator[dict[str, Any]]:
    shape, directory = scratch / "shape", scratch / "copier"
    make_model(shape)
    prompt = make_copier(directory, shape, copied=PROMPT - 1)
    ends = load_ends(directory)
    freeze_loaded_objects()
    settings = PoolSettings(
        workers=1, model=str(directory), threads=1,
        edge_endpoint=f"tcp://{listens_at}:*", broker_options=["--insecure"],
    )  # fmt: skip
    with LocalPool(settings) as pool:
        _, wanted = write(ends, pool.edge_endpoint, prompt, tokens, is_drafted=True)
        for rtt_ms in ROUND_TRIPS_MS:
            for mbit in RATES_MBIT:
                with reach(pool.edge_endpoint, rtt_ms, mbit) as broker:
                    row: dict[str, Any] = {"rtt_ms": rtt_ms, "mbit": mbit}
                    for name, is_drafted in (("off", False), ("drafted", True)):
                        count = tokens if is_drafted else max(8, tokens // 4)
                        stats, written = write(ends, broker, prompt, count, is_drafted)
                        assert written == wanted[:count]
                        row |= {
                            f"{name}_{key}": value
                            for key, value in describe(stats, rtt_ms, mbit).items()
                        }
                    yield row


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    require_matplotlib()
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for mbit, color in zip(RATES_MBIT, ("tab:red", "tab:orange", "tab:green"), strict=True):
        own = [row for row in rows if row["mbit"] == mbit]
        trips = [row["rtt_ms"] for row in own]
        for name, style in (("drafted", "-"), ("off", ":")):
            label = f"{mbit} Mbit/s, {'with' if name == 'drafted' else 'without'} drafts"
            rates = [row[f"{name}_tokens_per_s"] for row in own]
            left.plot(trips, rates, style, marker="o", color=color, label=label)
            first = [row[f"{name}_first_ms"] for row in own]
            right.plot(trips, first, style, marker="o", color=color)
    for axes, what in ((left, "tokens/s"), (right, f"ms to the first token after {PROMPT}")):
        axes.set(xlabel="round trip, ms", ylabel=what, ylim=(0, None), xticks=ROUND_TRIPS_MS)
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    save_figure(figure, path)


@click.command()
@click.option("--tokens", default=96, show_default=True)
@click.option("--namespaces", is_flag=True, help="A link of packets, between two of the network.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="A PNG of it.")
def main(tokens: int, namespaces: bool, as_json: bool, picture: Path | None) -> None:
    set_up_torch(1)
    links = packet_links() if namespaces else nullcontext(far_link)
    with tempfile.TemporaryDirectory() as scratch, links as reach:
        rows = list(measure(Path(scratch), tokens, reach, NEAR if namespaces else "127.0.0.1"))
    if picture is not None:
        plot(rows, picture)
    tell_rows(rows, as_json)


if __name__ == "__main__":
    main()
