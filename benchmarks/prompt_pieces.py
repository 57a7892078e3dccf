"""What pieces of a prompt on their way together bring: the time to the first token.

    python benchmarks/prompt_pieces.py [--tokens 1024] [--rounds 5] [--json]

A model with the shape of 56 M parameters, whose middle layers are one worker's, or those of two
workers in a row. The same prompt goes through in pieces: each when the one before it is back, or
several on their way at once, so that the head, the link, each worker and the tail work side by
side. Rounds of all ways, one after another in this one call; medians. One thread for each process:
with fewer cores than processes (three or four, and the broker) the ratios are bounded by those.
"""

from __future__ import annotations

import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from overhead import make_model
from report import tell_rows

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.settings import PIECES_AHEAD
from common.spans.cut import Span
from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.sampling import SamplingSettings
from edge_agent.text.session import Session
from edge_agent.text.session_settings import uniform_settings

ONE, TWO = (Span(1, 7),), (Span(1, 4), Span(4, 7))  # of eight layers


def first_token_s(
    pool: LocalPool, ends: ModelEnds, prompt: list[int], route: tuple[Span, ...], ahead: int
) -> tuple[float, int]:
    """Of a session of its own, and the token."""
    client = pool.connect()
    settings = replace(uniform_settings("int8", route=route), pieces_ahead=ahead)
    session = Session(ends, client, settings)
    (token,) = session.generate(prompt, 1, SamplingSettings())
    client.close()
    return session.stats.first_token_s, token


def measure(scratch: Path, tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    make_model(scratch)
    ends = load_ends(scratch, str(*ONE))
    prompt = torch.randint(3, 2000, (tokens,)).tolist()
    freeze_loaded_objects()
    taken: dict[tuple[int, int], list[float]] = defaultdict(list)
    with LocalPool(PoolSettings(workers=0, model=str(scratch))) as pool:
        for span in (*ONE, *TWO):
            pool.start_worker(span=str(span))
        pool.wait_for_workers(3)
        for _ in range(rounds + 1):  # the first one warms up
            said = set()
            for route in (ONE, TWO):
                for ahead in (1, PIECES_AHEAD):
                    seconds, token = first_token_s(pool, ends, prompt, route, ahead)
                    taken[len(route), ahead].append(seconds)
                    said.add(token)
            assert len(said) == 1
    for route in (ONE, TWO):
        alone, together = (
            statistics.median(taken[len(route), ahead][1:]) for ahead in (1, PIECES_AHEAD)
        )
        yield {
            "workers in a row": len(route),
            "one by one, ms": round(1000 * alone),
            f"{PIECES_AHEAD} at once, ms": round(1000 * together),
            "ratio": round(alone / together, 2),
        }


@click.command()
@click.option("--tokens", default=1024, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(tokens: int, rounds: int, as_json: bool) -> None:
    set_up_torch(1)
    with tempfile.TemporaryDirectory() as scratch:
        tell_rows(list(measure(Path(scratch), tokens, rounds)), as_json)


if __name__ == "__main__":
    main()
