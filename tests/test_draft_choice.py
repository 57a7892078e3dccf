"""Which drafter a session gets, by what lies with its model; and what auto asks first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from random_models import save_random_model
from torch import Tensor
from transformers import LlamaConfig, Mamba2Config

from common.errors import CheckpointError, SettingsError
from edge_agent.text.drafting.auto import AutoDrafter
from edge_agent.text.drafting.choice import FOLDER, Drafters, Kind, layer_path, table_path
from edge_agent.text.drafting.drafter import Draft
from edge_agent.text.drafting.grades import MODEL
from edge_agent.text.drafting.layer import LayerDrafter
from edge_agent.text.drafting.layer_file import save_layer
from edge_agent.text.drafting.layer_model import LayerModel, shape_for
from edge_agent.text.drafting.layer_worth import LayerWorth
from edge_agent.text.drafting.lookup import LookupDrafter
from edge_agent.text.drafting.ngram import NgramDrafter
from edge_agent.text.drafting.ngram_table import build_table
from edge_agent.text.ends import ModelEnds, load_ends

VOCABULARY, HIDDEN = 100, 16


def save_model(directory: Path) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return save_random_model(config, directory)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> ModelEnds:
    """A model with which no drafters lie."""
    return load_ends(save_model(tmp_path_factory.mktemp("bare")), "1-3")


@pytest.fixture(scope="module")
def equipped(tmp_path_factory: pytest.TempPathFactory) -> ModelEnds:
    """A model with both, the layer for span 1-3."""
    ends = load_ends(save_model(tmp_path_factory.mktemp("equipped")), "1-3")
    build_table([([1, 2, 3], [2, 3, 4])], VOCABULARY).save(table_path(ends.directory / FOLDER))
    layer = LayerModel(shape_for(HIDDEN))
    save_layer(layer, layer_path(ends.directory / FOLDER, "1-3"), ends.fingerprint, "1-3")
    return ends


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("off", type(None)), ("lookup", LookupDrafter), ("ngram", NgramDrafter),
        ("model", LayerDrafter), ("auto", AutoDrafter),
    ],
)  # fmt: skip
def test_a_session_gets_the_drafter_that_was_asked_for(
    equipped: ModelEnds, kind: Kind, expected: type
) -> None:
    assert type(Drafters(kind)(equipped, equipped.new_caches())) is expected


def test_files_are_read_once_for_all_sessions(equipped: ModelEnds) -> None:
    drafters = Drafters("auto")
    files = drafters.load(equipped)
    assert files.table is not None
    assert files.layer is not None
    assert drafters.load(load_ends(equipped.directory, "1-3")) is files


def test_what_was_asked_for_and_is_not_there_is_named(bare: ModelEnds, equipped: ModelEnds) -> None:
    with pytest.raises(CheckpointError, match=r"no table of n-grams \(drafting/ngrams.safet"):
        Drafters("ngram").load(bare)
    with pytest.raises(CheckpointError, match=r"no trained drafter for span 1-3 \(it has none\)"):
        Drafters("model").load(bare)
    other_cut = load_ends(equipped.directory, "2-3")
    with pytest.raises(CheckpointError, match=r"for span 2-3 \(it has those for 1-3\)"):
        Drafters("model").load(other_cut)


def test_ends_that_cannot_be_run_for_guesses_are_told_why(
    equipped: ModelEnds, tmp_path: Path
) -> None:
    with pytest.raises(SettingsError, match="the tail is in the pool"):
        Drafters("model").load(load_ends(equipped.directory, "1:"))
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=3, num_heads=4, head_dim=8,
        state_size=8, n_groups=1, chunk_size=8,
    )  # fmt: skip
    with pytest.raises(SettingsError, match="keep a state of the text"):
        Drafters("model").load(load_ends(save_random_model(config, tmp_path), "1-2"))


def test_auto_goes_on_without_what_is_not_there(bare: ModelEnds, equipped: ModelEnds) -> None:
    for ends, parts in (
        (bare, (False, False)),
        (load_ends(equipped.directory, "2-3"), (True, False)),
        (load_ends(equipped.directory, "1:"), (True, False)),
    ):
        files = Drafters("auto").load(ends)
        assert (files.table is not None, files.layer is not None) == parts
        assert isinstance(files.open(ends, ends.new_caches()), AutoDrafter)


def test_auto_says_what_it_could_not_read(
    bare: ModelEnds, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = load_ends(save_model(tmp_path), "1-3")
    for path in (table_path(tmp_path / FOLDER), layer_path(tmp_path / FOLDER, "1-3")):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"broken")
    with caplog.at_level(logging.INFO, logger="midspan.drafting"):
        files = Drafters("auto").load(ends)
    assert files.table is None
    assert files.layer is None
    assert [text[:34] for text in caplog.messages] == [
        "drafting goes on without n-grams: ", "drafting goes on without a trained",
    ]  # fmt: skip


def test_what_the_model_wrote_is_kept_only_if_that_is_wanted(
    bare: ModelEnds, tmp_path: Path
) -> None:
    drafters = Drafters("ngram", tmp_path / "kept")
    drafters.keep(bare, [7, 8], [9, 10, 11])
    again = Drafters("ngram", tmp_path / "kept")(bare, bare.new_caches())
    assert again is not None
    assert [draft.token_id for draft in again.propose([3, 8], 9)] == [9, 10, 11]
    unwanted = Drafters("auto")
    unwanted.keep(bare, [7, 8], [9, 10, 11])
    assert unwanted.load(bare).outputs is None


def test_outputs_are_shared_by_the_cuts_of_a_model(equipped: ModelEnds, tmp_path: Path) -> None:
    drafters = Drafters("auto", tmp_path)
    first, second = (drafters.load(load_ends(equipped.directory, span)) for span in ("1-3", "2-3"))
    assert first.outputs is second.outputs


class Clock:
    """Goes on when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fixed:
    """Guesses the same tokens of the same grades each time, and notes what it is told."""

    def __init__(self, name: str, *grades: int, clock: Clock, guess_s: float = 0.0) -> None:
        self.name = name
        self.drafts = [Draft(number, grade) for number, grade in enumerate(grades)]
        self.told: list[object] = []
        self._clock, self._guess_s = clock, guess_s

    def propose(self, token_ids: Sequence[int], limit: int) -> list[Draft]:
        drafts = self.drafts[:limit]
        self._clock.now += self._guess_s * len(drafts)
        return drafts

    def observe(self, boundary: Tensor, tail_inputs: Tensor) -> None:
        self.told.append(len(boundary))

    def cut_back(self, position: int) -> None:
        self.told.append(("cut back", position))


def propose_after_steps(
    drafter: AutoDrafter, clock: Clock, text: list[int], limit: int, step_s: float
) -> list[Draft]:
    """The proposal after a text of which each token took a round trip of so many seconds."""
    for end in range(1, len(text)):
        drafter.propose(text[:end], limit)
        clock.now += step_s
    return drafter.propose(text, limit)


COPY = [1, 2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("text", "ngrams", "layer", "limit", "name"),
    [
        pytest.param([*COPY, 0, *COPY[:5]], [9] * 4, [15] * 4, 4, "lookup", id="long match"),
        pytest.param([*COPY, 0, *COPY[:3]], [9] * 4, [15] * 4, 4, "ngram", id="short match"),
        pytest.param([0, 1], [9, 7, 2, 7], [15] * 4, 4, "ngram", id="all sure"),
        pytest.param([0, 1], [9, 9, 6, 6], [15] * 4, 4, "model", id="some unsure"),
        pytest.param([0, 1], [9, 9, 6, 6], [15] * 4, 2, "ngram", id="unsure beyond the limit"),
        pytest.param([0, 1], [9, 9], [15] * 4, 4, "model", id="too few"),
        pytest.param([0, 1], [9, 6], [], 4, "ngram", id="layer without rows"),
        pytest.param([0, 1], [6, 5], None, 4, "ngram", id="no layer"),
        pytest.param([*COPY, 0, *COPY[:3]], None, None, 4, "lookup", id="short match alone"),
    ],
)
def test_auto_asks_for_copies_then_sure_ngrams_then_the_layer(
    text: list[int], ngrams: list[int] | None, layer: list[int] | None, limit: int, name: str
) -> None:
    clock = Clock()
    first, second = (
        None if grades is None else Fixed(kind, *grades, clock=clock)
        for kind, grades in (("ngram", ngrams), ("model", layer))
    )
    drafter = AutoDrafter(first, second, clock)
    drafts = propose_after_steps(drafter, clock, text, limit, step_s=1.0)
    assert drafter.name == name
    assert 0 < len(drafts) <= limit
    assert {draft.grade >= MODEL for draft in drafts} == {name == "model"}


def test_auto_tells_all_of_its_drafters_what_happens() -> None:
    ngrams, layer = Fixed("ngram", clock=Clock()), Fixed("model", clock=Clock())
    drafter = AutoDrafter(ngrams, layer)
    drafter.observe(torch.zeros(3, HIDDEN), torch.zeros(3, HIDDEN))
    drafter.cut_back(2)
    assert ngrams.told == layer.told == [3, ("cut back", 2)]


@pytest.mark.parametrize(
    ("step_s", "name"), [(0.5, "model"), (0.05, "model"), (0.01, "ngram"), (0.001, "ngram")]
)
def test_the_layer_is_asked_where_the_link_is_slower_than_it(step_s: float, name: str) -> None:
    clock = Clock()
    ngrams = Fixed("ngram", 7, 6, 6, 6, clock=clock)
    layer = Fixed("model", *[15] * 8, clock=clock, guess_s=0.005)
    drafter = AutoDrafter(ngrams, layer, clock)
    drafts = propose_after_steps(drafter, clock, [0, 0], 8, step_s)
    assert drafter.name == name
    # the more a round trip takes, the more guesses are worth their time
    assert len(drafts) == {0.5: 8, 0.05: 8, 0.01: 4, 0.001: 4}[step_s]


def test_a_layer_that_is_mostly_wrong_is_not_asked_any_more() -> None:
    clock = Clock()
    worth, free, wrong = LayerWorth(clock), [Draft(0, 7)] * 2, [Draft(7, 15)] * 8
    worth.on_guessed(0.01, 1)
    asked = []
    for end in range(1, 30):
        worth.begin(list(range(50, 50 + end)))
        asked.append(worth.count_guesses(free, 8))
        worth.end(wrong)
        clock.now += 0.2
    assert asked[1] > 4
    assert asked[-1] == 0


def test_what_is_cut_back_counts_as_neither_right_nor_wrong() -> None:
    worth, draft = LayerWorth(Clock()), Draft(7, 15)
    before = list(worth._right), list(worth._seen)
    worth.begin([1, 2, 3])
    worth.end([draft] * 3)
    worth.cut_back(2)
    worth.begin([1, 2, 8, 9])
    assert (worth._right, worth._seen) == before
    worth.end([draft] * 3)
    worth.cut_back(4)  # nothing of the text
    worth.begin([1, 2, 8, 9, 7])
    assert sum(worth._seen) == sum(before[1]) + 1
