"""What leaving neurons out costs is measured by the code that writes answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from common.errors import SettingsError
from common.neurons.lists import write_lists
from common.neurons.settings import NeuronSettings
from deploy.cli import midspan
from edge_agent.text.tokenizer import TextTokenizer
from evaluation.neuron_profile import Activity, load_whole, profile_texts, split_texts
from evaluation.neuron_quality import WholeModel, cut_texts, draw_quality, sweep

LAYERS = 8  # of the demo model
PROMPT = 24


@pytest.fixture(scope="module")
def texts(demo_directory: Path) -> list[list[int]]:
    path = demo_directory / "validation.txt"
    return split_texts(path, TextTokenizer(demo_directory), True, 64, 2000)


@pytest.fixture(scope="module")
def settings(
    demo_directory: Path, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> NeuronSettings:
    """Measured on other texts than those that tests score."""
    model, layers = load_whole(demo_directory)
    activity = Activity(layers)
    profile_texts(model, activity, texts[8:20], 1)
    path = tmp_path_factory.mktemp("lists") / "lists.json"
    write_lists(path, activity.lists("l", ""))
    return NeuronSettings((path,), start=-1, end=LAYERS)


@torch.inference_mode()
def test_with_all_neurons_scores_are_those_of_the_whole_model(
    demo_directory: Path, whole_model: Any, texts: list[list[int]]
) -> None:
    ids = texts[0]
    logprobs, right = WholeModel(demo_directory, None).score(ids, PROMPT)
    logits = whole_model(input_ids=torch.tensor([ids])).logits[0, PROMPT - 1 : -1]
    wanted = torch.log_softmax(logits, -1)[range(len(logits)), ids[PROMPT:]]
    torch.testing.assert_close(logprobs, wanted, atol=1e-4, rtol=1e-4)  # cut in two
    assert right.tolist() == (logits.argmax(-1) == torch.tensor(ids[PROMPT:])).tolist()


def test_chosen_neurons_beat_random_ones(
    demo_directory: Path, settings: NeuronSettings, texts: list[list[int]], tmp_path: Path
) -> None:
    long = cut_texts(texts[:8], PROMPT, 64)
    measured = list(sweep(demo_directory, settings, long, PROMPT, (0.4,)))
    by_method = {each.method: each.perplexity for each in measured}
    assert list(by_method) == ["whole", "dense", "partinfer", "coreinfer", "random"]
    assert by_method["whole"] < by_method["dense"] < by_method["partinfer"] < by_method["random"]
    draw_quality(measured, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_texts_too_short_for_the_prompt_are_named(texts: list[list[int]]) -> None:
    with pytest.raises(SettingsError, match="no text has 4 tokens behind a prompt of 61"):
        cut_texts(texts, 61, 64)


def test_the_command_says_what_is_wrong_before_it_measures(
    settings: NeuronSettings, demo_directory: Path
) -> None:
    arguments = ["neurons", "quality", "stories-llama", str(settings.files[0]), "--text"]
    text = str(demo_directory / "validation.txt")
    said = CliRunner().invoke(midspan, [*arguments, text, "--base", "0.9"])
    assert "--base 0.9 is more than --loaded 0.7" in said.output
    said = CliRunner().invoke(midspan, [*arguments, "/nothing"])
    assert "--text /nothing cannot be read" in said.output
