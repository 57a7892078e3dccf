"""`midspan score` against the unsplit model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from forks import error_line, run_midspan

from deploy.pool import LocalPool, PoolSettings
from edge_agent.text.sampler import score
from edge_agent.text.tokenizer import TextTokenizer

PROMPT = "Once upon a time, there was a little girl named Lily. She"
OPTIONS = (" loved to play.", " of", " was very happy because it was sunny.")


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=1)) as running:
        yield running


def options_of(*texts: str) -> list[str]:
    return [word for text in texts for word in ("--option", text)]


def test_the_scores_are_those_of_the_unsplit_model(
    pool: LocalPool, demo_directory: Path, whole_model: torch.nn.Module
) -> None:
    done = run_midspan(
        "score", PROMPT, *options_of(*OPTIONS), "--broker", pool.edge_endpoint,
        "--codec", "fp32", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    tokenizer = TextTokenizer(demo_directory)
    prompt = tokenizer.encode(PROMPT)
    ids = [tokenizer.encode(PROMPT + option)[len(prompt) :] for option in OPTIONS]
    with torch.no_grad():
        want = score(lambda batch: whole_model(batch).logits, prompt, ids)
    assert [one["logprob"] for one in said["options"]] == pytest.approx(want, abs=1e-3)
    assert [one["tokens"] for one in said["options"]] == [len(each) for each in ids]
    best, second = sorted(want, reverse=True)[:2]
    assert said["best"] == OPTIONS[want.index(best)]
    assert said["nats_ahead"] == pytest.approx(best - second, abs=1e-3)


def test_people_are_shown_the_likeliest_first_and_by_how_much(pool: LocalPool) -> None:
    done = run_midspan("score", PROMPT, *options_of(*OPTIONS), "--broker", pool.edge_endpoint)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["continuation", "nats", "a", "token", "tokens"]
    nats = [float(line.split()[-3]) for line in lines[1:4]]
    assert nats == sorted(nats, reverse=True)
    assert "times likelier than" in lines[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--option", ""], "--option is empty"),
        (options_of(" a", " a"), "--option ' a' is given twice"),
        (["--option", "\udcff"], "--option is not UTF-8"),
    ],
)
def test_options_that_are_none_are_named(options: list[str], words: str) -> None:
    assert words in error_line("score", PROMPT, *options)
