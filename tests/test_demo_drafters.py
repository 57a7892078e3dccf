"""What the drafters that come with the demo model reach without a pool; see docs/drafting.md."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edge_agent.text.drafting.choice import Drafters, Kind
from edge_agent.text.drafting.measure import KnownText
from edge_agent.text.ends import ModelEnds
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.drafting.held_out import know_texts, measure_drafter
from evaluation.drafting.making import BEGINNING
from evaluation.drafting.whole_model import WholeModel


@pytest.fixture(scope="module")
def model(demo_ends: ModelEnds) -> WholeModel:
    return WholeModel(demo_ends.directory, demo_ends.cut)


@pytest.fixture(scope="module")
def stories(demo_directory: Path) -> list[list[int]]:
    """Of the validation text, as tokens with the mark that begins them."""
    tokenizer = TextTokenizer(demo_directory)
    documents = (demo_directory / "validation.txt").read_text().split("\n\n")
    return [tokenizer.encode(document) for document in documents[:8]]


@pytest.fixture(scope="module")
def answers(model: WholeModel, demo_ends: ModelEnds, stories: list[list[int]]) -> list[KnownText]:
    """Their beginnings, and what the model says after them."""
    prompts = [story[:BEGINNING] for story in stories]
    written = model.write(prompts, 160, demo_ends.eos_ids)
    texts = [[*prompt, *answer] for prompt, answer in zip(prompts, written, strict=True)]
    return know_texts(model, texts, BEGINNING)


@pytest.mark.parametrize(("kind", "texts", "expected"), [("ngram", 8, 3.2), ("model", 3, 3.8)])
def test_four_drafts_save_most_round_trips(
    demo_ends: ModelEnds, answers: list[KnownText], kind: Kind, texts: int, expected: float
) -> None:
    assert measure_drafter(Drafters(kind), demo_ends, answers[:texts], 4) >= expected


@pytest.mark.parametrize("kind", ["lookup", "auto"])
def test_copies_with_edits_take_few_round_trips(
    model: WholeModel, demo_ends: ModelEnds, stories: list[list[int]], kind: Kind
) -> None:
    rng = random.Random(5)
    texts = []
    for story in stories[:3]:
        copy = [rng.randrange(2, 1024) if rng.random() < 0.05 else token for token in story]
        texts += know_texts(model, [[*story, *copy]], len(story))
    assert measure_drafter(Drafters(kind), demo_ends, texts, 16) >= 4.5
