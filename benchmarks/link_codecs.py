"""Codecs by link: the first token's time and that of each further one, with `auto` beside them.

    python benchmarks/link_codecs.py [--rounds 3] [--json]

The demo model writes after a prompt of 448 tokens, without drafts, in every codec in turns; edge,
broker and one worker on this machine, one thread each, a link between (chaos/far_link.py, in a
process of its own). Medians. `auto` measures the link before each session, which is not in its
times but in `probing_ms`. `auto_to_best` is its time to that of the fastest named codec: one is
as fast, and it may be up to 1.1 by what auto is told to give for a finer codec.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from far_network import far_link
from report import tell_rows

from common.codecs.calibration import Calibration, open_calibration
from common.codecs.spec import AUTO
from common.console.processes import freeze_loaded_objects, set_up_torch
from common.weights.demo_model import find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.client import BrokerClient
from edge_agent.text.codec_choice import CANDIDATES
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.texts import read_tokens

LINKS = ((20.0, 0.5), (20.0, 5.0), (50.0, 20.0), (5.0, 0.2), (1.0, 1000.0))  # ms, Mbit/s
PROMPT, TOKENS = 448, 16


def write(
    ends: ModelEnds, calibration: Calibration | None, broker: str, codec: str, prompt: list[int]
) -> dict[str, Any]:
    client = BrokerClient([broker])
    client.status()  # a connection is not what is measured
    begun_at = time.monotonic()
    session = Session(ends, client, uniform_settings(codec), calibration)
    probing_s = time.monotonic() - begun_at
    list(session.generate(prompt, TOKENS, SamplingSettings()))
    client.close()
    stats = session.stats
    return {
        "first_ms": stats.first_token_s * 1e3,
        "token_ms": (stats.total_s - stats.first_token_s) / (stats.new_tokens - 1) * 1e3,
        "probing_ms": probing_s * 1e3,
        "chosen": f"{stats.codecs['prompt_up']}, {stats.codecs['decode_up']}",
    }


def measure(rounds: int) -> list[dict[str, Any]]:
    directory = find_model(None)
    ends = load_ends(directory)
    span = (ends.cut.begin, ends.cut.end)
    calibration = open_calibration(None, directory, ends.fingerprint, span)
    prompt = read_text(directory)
    freeze_loaded_objects()
    rows = []
    with LocalPool(PoolSettings(workers=1, threads=1)) as pool:
        write(ends, calibration, pool.edge_endpoint, CANDIDATES[0], prompt)
        for rtt_ms, mbit in LINKS:
            with far_link(pool.edge_endpoint, rtt_ms, mbit) as broker:
                runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (*CANDIDATES, AUTO)}
                for _ in range(rounds):
                    for name, own in runs.items():
                        own.append(write(ends, calibration, broker, name, prompt))
            rows.append({"rtt_ms": rtt_ms, "mbit": mbit} | describe(runs))
    return rows


def read_text(directory: Path) -> list[int]:
    """A prompt of PROMPT tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text((directory / "validation.txt").read_text()[:8000])
        return read_tokens(text, TextTokenizer(directory), False, PROMPT)


def describe(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key in ("first_ms", "token_ms"):
        by_codec = {name: median(run[key] for run in own) for name, own in runs.items()}
        row |= {f"{name}_{key}": round(ms, 1) for name, ms in by_codec.items()}
        best = min(by_codec[name] for name in CANDIDATES)
        row[f"auto_to_best_{key}"] = round(by_codec[AUTO] / best, 2)
    row["probing_ms"] = round(median(run["probing_ms"] for run in runs[AUTO]))
    row["chosen"] = " / ".join(sorted({run["chosen"] for run in runs[AUTO]}))
    return row


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(rounds: int, as_json: bool) -> None:
    set_up_torch(1)
    rows = measure(rounds)
    tell_rows(rows, as_json)


if __name__ == "__main__":
    main()
