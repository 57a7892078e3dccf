"""Several cuts of one model: each session draws one, and the text is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from forks import error_line, run_midspan
from pools import PROMPTS, reference_tokens

from common.errors import SettingsError
from deploy.pool import LocalPool, PoolSettings
from edge_agent.commands.codec_options import CodecChoice
from edge_agent.engine.engine import Engine
from edge_agent.text.cuts import CutChoice, draw_span
from edge_agent.text.ends import ModelEnds, load_cuts
from edge_agent.text.session_settings import uniform_settings
from edge_agent.text.tokenizer import TextTokenizer

SPANS = "2:6,1:6,2:"
PARTS = ["1-2", "2-6", "6-8e"]  # of which every cut is made up
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def pool() -> Iterator[LocalPool]:
    with LocalPool(PoolSettings(workers=0)) as running:
        for part in PARTS:
            running.start_worker(span=part)
        running.wait_for_workers(len(PARTS))
        yield running


@pytest.fixture(scope="module")
def cuts(pool: LocalPool, demo_ends: ModelEnds) -> list[ModelEnds]:
    client = pool.connect()
    report = client.status()
    client.close()
    return load_cuts(demo_ends.directory, SPANS, report=report)


def test_sessions_of_several_cuts_at_once_write_what_the_whole_model_writes(
    pool: LocalPool, cuts: list[ModelEnds], whole_model: torch.nn.Module
) -> None:
    tokenizer = TextTokenizer(cuts[0].directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:6]]
    choice = CutChoice(cuts, seed=3)
    with Engine(
        cuts[0], [pool.edge_endpoint], uniform_settings("fp32"), choose_cut=choice
    ) as engine:
        talks = [engine.open() for _ in prompts]
        streams = [talk.submit(p, NEW_TOKENS) for talk, p in zip(talks, prompts, strict=True)]
        written = [[token.token_id for token in stream] for stream in streams]
    assert written == reference_tokens(whole_model, tokenizer, PROMPTS[:6], NEW_TOKENS)
    assert {str(talk._text.ends.cut) for talk in talks} == {"2:6", "1:6", "2:"}


def test_what_two_cuts_have_in_common_is_there_once(cuts: list[ModelEnds]) -> None:
    one, other = cuts[0].head, cuts[1].head
    first = [ends._decoder.layers[0].mlp.up_proj.weight.data_ptr() for ends in (one, other)]
    assert first[0] == first[1]


def test_a_seed_draws_the_same_cuts_again(cuts: list[ModelEnds]) -> None:
    def draw(seed: int) -> list[str]:
        choice = CutChoice(cuts, seed)
        return [str(choice().cut) for _ in range(12)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert len({draw_span("2:6,1:7", None) for _ in range(40)}) == 2


def test_the_command_line_draws_a_cut(
    pool: LocalPool, cuts: list[ModelEnds], whole_model: torch.nn.Module
) -> None:
    options = ["--broker", pool.edge_endpoint, "--no-serve", "--threads", "1", "-n", "8"]
    options += ["--span", SPANS, "--span-seed", "1", "--codec", "fp32", "--temperature", "0"]
    done = run_midspan("ask", PROMPTS[0], *options, "--json")
    assert done.returncode == 0, done.stderr
    tokenizer = TextTokenizer(cuts[0].directory)
    (reference,) = reference_tokens(whole_model, tokenizer, PROMPTS[:1], 8)
    assert json.loads(done.stdout)["text"].strip() == tokenizer.decode(reference).strip()


def test_what_several_cuts_cannot_have_is_said(demo_ends: ModelEnds, cuts: list[ModelEnds]) -> None:
    with pytest.raises(SettingsError, match="'2:6,2-6' names 2-6 twice"):
        load_cuts(demo_ends.directory, "2:6,2-6")
    with pytest.raises(SettingsError, match="codec compact needs a calibration, which is of one"):
        CodecChoice("compact").find_calibration(*cuts)
    line = error_line("serve", "--with-pool", "--span", "2:6,1:7", "--port", "0")
    assert "--with-pool serves one span; --span names 2:6,1:7" in line
    assert "span 1-9 is out of range" in error_line("ask", "x", "--span", "2:6,1:9")
