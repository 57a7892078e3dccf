"""Drafts by a trained layer in place of the middle: what it guesses, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import save_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from common.errors import CheckpointError
from edge_agent.text.drafting.grades import MODEL
from edge_agent.text.drafting.layer import LayerDrafter, SeenRows, grade_of
from edge_agent.text.drafting.layer_file import load_layer, save_layer
from edge_agent.text.drafting.layer_model import WINDOW, LayerModel, LayerShape, shape_for
from edge_agent.text.ends import EndCaches, ModelEnds, load_ends
from evaluation.drafting.layer_training import unroll

HIDDEN = 16
SHAPE = LayerShape(hidden=HIDDEN, heads=2, head_size=4, intermediate=24)


@pytest.fixture(scope="module")
def idle_middle(tmp_path_factory: pytest.TempPathFactory) -> ModelEnds:
    """The ends of a model whose middle adds nothing to its rows."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return load_ends(save_random_model(config, tmp_path_factory.mktemp("model")), "1-3")


def draw_layer() -> LayerModel:
    torch.manual_seed(1)
    layer = LayerModel(SHAPE).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return layer


def idle_layer() -> LayerModel:
    """What the pool would give the tail is what the head gave: true of an idle middle."""
    layer = draw_layer()
    layer.skip.fill_(1)
    layer.out.weight.zero_()
    return layer


def run(ends: ModelEnds, token_ids: list[int], caches: EndCaches) -> tuple[Tensor, Tensor]:
    """Head and tail over the next tokens, without a middle; rows (T, D) and logits (T, V)."""
    (rows,) = ends.run_heads([(token_ids, caches)])
    return rows, ends.score_tail(rows, caches)


def write_greedily(ends: ModelEnds, prompt: list[int], tokens: int) -> list[int]:
    caches, new, written = ends.new_caches(), prompt, list[int]()
    while len(written) < tokens:
        _, logits = run(ends, new, caches)
        new = [int(logits[-1].argmax())]
        written += new
    return written


def open_drafter(
    ends: ModelEnds, layer: LayerModel, token_ids: list[int]
) -> tuple[LayerDrafter, EndCaches]:
    """After a text whose last token is not run yet."""
    caches = ends.new_caches()
    drafter = LayerDrafter(layer, ends, caches)
    rows, _ = run(ends, token_ids[:-1], caches)
    drafter.observe(rows, rows)
    return drafter, caches


def test_what_the_layer_estimates_rightly_is_guessed_to_the_last_token(
    idle_middle: ModelEnds,
) -> None:
    prompt = [5, 17, 60, 31, 8]
    answer = write_greedily(idle_middle, prompt, 12)
    drafter, _ = open_drafter(idle_middle, idle_layer(), [*prompt, answer[0]])
    drafts = drafter.propose([*prompt, answer[0]], 11)
    assert [draft.token_id for draft in drafts] == answer[1:]


def snapshot(caches: EndCaches) -> list[Tensor]:
    return [kv.buffer[: kv.length].clone() for kv in (caches.head, caches.tail)]


def test_a_proposal_leaves_caches_and_the_drafter_as_they_were(idle_middle: ModelEnds) -> None:
    text = list(range(20, 30))
    drafter, caches = open_drafter(idle_middle, draw_layer(), text)
    before = snapshot(caches)
    first = drafter.propose(text, 6)
    assert len(first) == 6
    assert all(map(torch.equal, snapshot(caches), before))
    assert drafter.propose(text, 6) == first


def test_a_drafter_that_was_cut_back_guesses_as_a_new_one(idle_middle: ModelEnds) -> None:
    text, other = list(range(20, 40)), [*range(20, 26), 77, 78]
    drafter, caches = open_drafter(idle_middle, draw_layer(), text)
    caches.cut_back(6)
    drafter.cut_back(6)
    rows, _ = run(idle_middle, other[6:-1], caches)
    drafter.observe(rows, rows)
    fresh, _ = open_drafter(idle_middle, draw_layer(), other)
    assert drafter.propose(other, 8) == fresh.propose(other, 8)


def test_nothing_is_guessed_of_a_text_whose_rows_were_not_seen(idle_middle: ModelEnds) -> None:
    text = list(range(20, 30))
    drafter, caches = open_drafter(idle_middle, draw_layer(), text)
    run(idle_middle, text[-1:], caches)
    assert drafter.propose([*text, 31], 4) == []
    assert LayerDrafter(draw_layer(), idle_middle, idle_middle.new_caches()).propose([], 4) == []


def test_guesses_end_with_the_context(idle_middle: ModelEnds) -> None:
    text = [7] * 62
    drafter, _ = open_drafter(idle_middle, draw_layer(), text)
    assert len(drafter.propose(text, 8)) == 64 - 61


def test_a_failure_while_guessing_leaves_caches_as_they_were(
    idle_middle: ModelEnds, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = list(range(20, 30))
    drafter, caches = open_drafter(idle_middle, draw_layer(), text)

    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(SeenRows, "estimate", fail)
    with pytest.raises(MemoryError):
        drafter.propose(text, 6)
    assert caches.head.length == caches.tail.length == 9


def test_estimates_are_those_that_training_unrolls() -> None:
    layer, rows = draw_layer(), torch.randn(2, 1, 30, HIDDEN)
    boundary, tail_inputs = rows
    trained = unroll(layer, boundary, tail_inputs, 4)
    for position in (0, 1, 7, 26):
        seen = SeenRows(layer)
        seen.append(boundary[0, :position], tail_inputs[0, :position])
        for depth in range(4):
            at = position + depth
            estimate = seen.estimate(boundary[0, at : at + 1])
            torch.testing.assert_close(estimate[0], trained[depth][0, at])


@pytest.mark.parametrize("pieces", [[1400], [5, 1395], [300] * 4 + [200], [1] * 20 + [1380]])
def test_long_texts_are_seen_through_a_window_however_they_come(pieces: list[int]) -> None:
    layer, rows = draw_layer(), torch.randn(2, 1401, HIDDEN)
    boundary, tail_inputs = rows
    seen, at = SeenRows(layer), 0
    for piece in pieces:
        seen.append(boundary[at : at + piece], tail_inputs[at : at + piece])
        at += piece
    assert at == seen.length == 1400
    expected = unroll(layer, boundary[None], tail_inputs[None], 1)[0][0, 1400]
    torch.testing.assert_close(seen.estimate(boundary[1400:])[0], expected)
    assert len(seen._keys) == 2 * WINDOW


def test_what_was_cut_off_before_the_window_is_forgotten() -> None:
    layer, rows = draw_layer(), torch.randn(2, 1400, HIDDEN)
    seen = SeenRows(layer)
    seen.append(*rows)
    seen.cut_back(10)
    assert seen.length == 10
    assert torch.isfinite(seen.estimate(rows[0, 10:11])).all()


def test_grades_rise_with_the_probability() -> None:
    grades = [grade_of(percent / 100) for percent in range(101)]
    assert grades == sorted(grades)
    assert set(grades) == set(range(MODEL, 16))


def test_a_layer_is_read_as_it_was_written_in_half_precision(
    idle_middle: ModelEnds, tmp_path: Path
) -> None:
    layer = draw_layer()
    save_layer(layer, tmp_path / "drafting" / "layer", idle_middle.fingerprint, "1-3")
    read = load_layer(tmp_path / "drafting" / "layer", idle_middle)
    assert read.shape == SHAPE
    for name, tensor in layer.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.half().float())


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"format": "other/1"}, "its format is other/1; expected midspan-drafter/1"),
        ({"model": "f0"}, "its model is f0; expected "),
        ({"span": "2-3"}, "its span is 2-3; expected 1-3"),
        ({"hidden": "32"}, "its hidden is 32; expected 16"),
        ({"head_size": "3"}, "its shape is"),
        ({"heads": "-2"}, "its shape is"),
        ({"heads": "many"}, "invalid literal"),
        ({"intermediate": "8"}, "size mismatch"),
    ],
)
def test_what_is_no_layer_for_the_ends_is_refused(
    idle_middle: ModelEnds, tmp_path: Path, about: dict[str, str], reason: str
) -> None:
    path = tmp_path / "layer"
    save_layer(draw_layer(), path, idle_middle.fingerprint, "1-3")
    said = {
        "format": "midspan-drafter/1", "model": idle_middle.fingerprint, "span": "1-3",
        "hidden": "16", "heads": "2", "head_size": "4", "intermediate": "24",
    }  # fmt: skip
    save_file(load_file(path), path, metadata={**said, **about})
    with pytest.raises(CheckpointError, match=f"(?s)layer holds no usable drafter: .*{reason}"):
        load_layer(path, idle_middle)


def test_weights_that_are_no_numbers_are_refused(idle_middle: ModelEnds, tmp_path: Path) -> None:
    layer = draw_layer()
    layer.skip[3] = float("nan")
    save_layer(layer, tmp_path / "layer", idle_middle.fingerprint, "1-3")
    with pytest.raises(CheckpointError, match="not all finite"):
        load_layer(tmp_path / "layer", idle_middle)


def test_shapes_are_as_wide_as_the_model() -> None:
    for hidden in (8, 16, 128, 576, 2048, 4096):
        shape = shape_for(hidden)
        assert shape.heads * shape.head_size == hidden
        assert shape.head_size % 2 == 0
    assert replace(shape_for(4096), intermediate=0) == LayerShape(4096, 64, 64, 0)
