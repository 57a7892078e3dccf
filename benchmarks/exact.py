"""What `--exact` costs: tokens/s of the same sessions, exact and not, and how many bits differ.

    python benchmarks/exact.py [--tokens 96] [--sessions 8] [--repeats 3] [--codec int8] [--json]

The demo model and one with 56 M parameters and random weights, over loopback, one worker, one
thread for each process. One session and several at once, undrafted and drafted: by `ngram` for the
demo model, by `lookup` for the other, which soon says the same again. Exact and not take turns;
medians over the repeats. tokens/s count everything from the first prompt to the last token.

`equal` is the share of tokens whose log-probability is, to the last bit, that of the same text
written alone and without drafts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from overhead import make_model
from report import tell_rows
from round_trips import BEGINNING

from common.console.processes import freeze_loaded_objects, set_up_torch
from common.weights.demo_model import find_model
from deploy.pool import LocalPool, PoolSettings
from edge_agent.engine.engine import Engine
from edge_agent.text.drafting.choice import Drafters, Kind
from edge_agent.text.ends import ModelEnds, load_ends
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

WORDS = {True: "exact", False: "not exact"}
Text = list[tuple[int, float]]  # tokens and their log-probabilities


@dataclass(slots=True)
class Measured:
    """One way of writing, exact or not."""

    tokens_per_s: list[float] = field(default_factory=list)
    equal: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """So many sessions at once, and who guesses for them."""

    name: str
    prompts: Sequence[list[int]]
    kind: Kind


def list_ways(kind: Kind, prompts: list[list[int]]) -> list[Way]:
    many = f"{len(prompts)} sessions"
    return [
        Way("1 session", prompts[:1], "off"),
        Way(f"1 session, {kind}", prompts[:1], kind),
        Way(many, prompts, "off"),
        Way(f"{many}, {kind}", prompts, kind),
    ]


def write(
    ends: ModelEnds, endpoint: str, way: Way, *, tokens: int, codec: str, exact: bool
) -> tuple[float, list[Text]]:
    """Tokens/s of all sessions together, and what each wrote."""
    drafters = None if way.kind == "off" else Drafters(way.kind)
    settings = uniform_settings(codec, exact=exact)
    with Engine(ends, [endpoint], settings, drafters=drafters) as engine:
        begun_at = time.perf_counter()
        streams = [engine.submit(prompt, tokens, top_logprobs=0) for prompt in way.prompts]
        texts: list[Text] = []
        for stream in streams:
            pairs = [(token.token_id, token.logprob) for token in stream]
            texts.append([(token, logprob.logprob) for token, logprob in pairs if logprob])
        took_s = time.perf_counter() - begun_at
    return sum(map(len, texts)) / took_s, texts


def count_equal(texts: list[Text], wanted: list[Text]) -> int:
    """Tokens that come with the bits of the text that was written alone."""
    return sum(
        one == other
        for text, alone in zip(texts, wanted, strict=True)
        for one, other in zip(text, alone, strict=False)
    )


def measure(
    directory: Path, ways: Sequence[Way], *, tokens: int, codec: str, repeats: int
) -> list[dict[str, Any]]:
    ends = load_ends(directory)
    found = {(way.name, exact): Measured() for way in ways for exact in (True, False)}
    with LocalPool(PoolSettings(workers=1, model=str(directory), threads=1)) as pool:

        def run(way: Way, exact: bool) -> tuple[float, list[Text]]:
            return write(ends, pool.edge_endpoint, way, tokens=tokens, codec=codec, exact=exact)

        alone = {
            exact: [run(Way("alone", [prompt], "off"), exact)[1][0] for prompt in ways[-1].prompts]
            for exact in (True, False)
        }
        freeze_loaded_objects()
        for way in [each for each in ways for _ in range(repeats)]:
            for exact in (False, True):
                speed, texts = run(way, exact)
                measured = found[way.name, exact]
                measured.tokens_per_s.append(speed)
                measured.equal += count_equal(texts, alone[exact][: len(texts)])
                measured.tokens += sum(map(len, texts))
    return [summarize(way.name, found[way.name, False], found[way.name, True]) for way in ways]


def summarize(name: str, loose: Measured, exact: Measured) -> dict[str, Any]:
    pairs = zip(exact.tokens_per_s, loose.tokens_per_s, strict=True)
    return {
        "way": name,
        "tokens_per_s": round(statistics.median(loose.tokens_per_s), 1),
        "exact_tokens_per_s": round(statistics.median(exact.tokens_per_s), 1),
        "ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 2),
        "equal": round(loose.equal / loose.tokens, 3),
        "exact_equal": round(exact.equal / exact.tokens, 3),
    }


@click.command()
@click.option("--tokens", default=96, show_default=True)
@click.option("--sessions", default=8, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--codec", default="int8", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(tokens: int, sessions: int, repeats: int, codec: str, as_json: bool) -> None:
    set_up_torch(1)
    rows: list[dict[str, Any]] = []
    demo = find_model(None)
    tokenizer = TextTokenizer(demo)
    stories = (demo / "validation.txt").read_text().split("\n\n")
    beginnings = [tokenizer.encode(story)[:BEGINNING] for story in stories[:sessions]]
    with tempfile.TemporaryDirectory() as scratch:
        large = Path(scratch, "56M")
        make_model(large)
        models: list[tuple[str, Path, Kind]] = [("demo", demo, "ngram"), ("56 M", large, "lookup")]
        for name, directory, kind in models:
            ways = list_ways(kind, beginnings)
            measured = measure(directory, ways, tokens=tokens, codec=codec, repeats=repeats)
            rows += [{"model": name} | row for row in measured]
    tell_rows(rows, as_json)


if __name__ == "__main__":
    main()
