"""Making drafters: the whole model as a teacher, training, and the command."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from random_models import save_random_model
from transformers import LlamaConfig

from common.spans.attention import Segment
from common.spans.cut import parse_cut
from common.weights.checkpoint import Checkpoint
from common.weights.loading import load_span
from deploy.cli import midspan
from edge_agent.text.drafting.choice import Drafters
from edge_agent.text.drafting.layer_model import LayerModel, shape_for
from edge_agent.text.ends import load_ends
from evaluation.drafting.held_out import know_texts, measure_drafter
from evaluation.drafting.layer_training import TrainingSettings, cut_window, train_layer
from evaluation.drafting.whole_model import WholeModel, cut_at_end

HIDDEN, CONTEXT = 16, 48
TEXTS = [[3, 9, 200, 41, 7, 700, 5], [8, 500, 31, 2]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, demo_directory: Path) -> Path:
    """A small model of random weights that speaks with the demo model's tokenizer."""
    config = LlamaConfig(
        vocab_size=1024, hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=CONTEXT,
        bos_token_id=0, eos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    directory = save_random_model(config, tmp_path_factory.mktemp("small"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_directory / name, directory)
    return directory


@pytest.fixture(scope="module")
def model(directory: Path) -> WholeModel:
    return WholeModel(directory, parse_cut("1-3", 4))


def test_rows_are_those_that_a_split_model_sends_and_gets(
    directory: Path, model: WholeModel
) -> None:
    ends, checkpoint = load_ends(directory, "1-3"), Checkpoint(directory)
    middle = load_span(checkpoint, ends.cut.middle)
    boundary, tail_inputs = model.rows(TEXTS)
    for index, text in enumerate(TEXTS):
        (sent,) = ends.run_heads([(text, ends.new_caches())])
        got = middle.run(sent, [Segment(middle.new_kv(), 0, len(text))])
        torch.testing.assert_close(boundary[index, : len(text)], sent)
        torch.testing.assert_close(tail_inputs[index, : len(text)], got)


def test_the_tail_judges_true_rows_as_the_whole_model_does(model: WholeModel) -> None:
    (text, _), (_, rows) = TEXTS, model.rows(TEXTS[:1])
    rows.requires_grad_(True)
    logits = model.judge(rows)
    assert logits[0].argmax(-1).tolist() == model.say_next(text)
    torch.autograd.backward(logits[0, -1, 5])
    assert rows.grad is not None
    assert (rows.grad.abs().sum(-1) > 0).all()
    assert model.say_next(text) == logits[0].argmax(-1).tolist()  # its layers are whole again


def test_what_it_writes_is_what_it_would_say_next(model: WholeModel) -> None:
    prompts = [[3, 9, 200], [8, 500, 31]]
    for prompt, answer in zip(prompts, model.write(prompts, 8, set()), strict=True):
        assert len(answer) == 8
        assert model.say_next([*prompt, *answer])[2:-1] == answer


def test_texts_end_with_the_mark_that_ends_them() -> None:
    assert cut_at_end([5, 1, 1, 7], {1}) == [5, 1]
    assert cut_at_end([5, 7], {1}) == [5, 7]


def test_windows_of_long_texts_are_from_everywhere() -> None:
    rng, text = random.Random(0), list(range(100))
    windows = [cut_window(text, 30, rng) for _ in range(60)]
    assert {len(window) for window in windows} == {30}
    assert all(window == text[window[0] :][:30] for window in windows)
    assert len({window[0] for window in windows}) > 10
    assert cut_window(text[:20], 30, rng) == text[:20]


def test_training_lowers_the_loss_and_comes_out_the_same_again(model: WholeModel) -> None:
    rng = random.Random(4)
    texts = [[rng.randrange(1024) for _ in range(20)] for _ in range(12)]

    def train() -> list[float]:
        torch.manual_seed(2)
        losses: list[float] = []
        settings = TrainingSettings(steps=30, batch=4, window=16, depth=2)
        train_layer(LayerModel(shape_for(HIDDEN)), model, texts, settings, losses.append)
        return losses

    losses = train()
    assert len(losses) == 30
    assert max(losses[-5:]) < min(losses[:5])
    assert train() == losses


def test_what_is_measured_without_a_drafter_is_one_token_a_round_trip(
    directory: Path, model: WholeModel
) -> None:
    ends = load_ends(directory, "1-3")
    known = know_texts(model, TEXTS, 2)
    assert measure_drafter(Drafters("off"), ends, known, 4) == 1


def run(*arguments: str) -> Result:
    return CliRunner().invoke(midspan, ["train-drafter", *arguments])


def test_the_command_makes_files_that_sessions_draft_with(
    directory: Path, demo_directory: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(directory, tmp_path / "model")
    text = demo_directory / "validation.txt"
    done = run(
        str(model), "--text", str(text), "--documents", "--span", "1-3", "--own-texts", "21",
        "--training-steps", "2", "--threads", "1",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    names = ["layer-1-3.safetensors", "ngrams.safetensors"]
    assert sorted(path.name for path in (model / "drafting").iterdir()) == names
    assert all(name in done.output for name in names)
    assert "Tokens per round trip, 2 texts held out:" in done.output
    kinds = [line.split()[0] for line in done.output.splitlines()[-3:]]
    assert kinds == ["lookup", "ngram", "model"]
    files = Drafters("auto").load(load_ends(model, "1-3"))
    assert files.table is not None
    assert files.layer is not None


def test_a_text_with_too_few_beginnings_is_named(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Once upon a time.")
    done = run(str(directory), "--text", str(tmp_path / "short.txt"), "--span", "1-3")
    assert done.exit_code == 1
    assert "short.txt has 0 beginnings of 24 tokens; at least 20 are needed" in done.output


def test_no_layer_is_trained_for_a_device_without_a_tail(directory: Path, tmp_path: Path) -> None:
    done = run(str(directory), "--text", "any", "--span", "1:", "-o", str(tmp_path))
    assert done.exit_code == 1
    assert "the tail is in the pool; --kind ngram" in done.output
