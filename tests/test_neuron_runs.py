"""`midspan eval speed`, `hardware` and `tasks` compare all neurons with some over real pools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from common.neurons.lists import NeuronLists, write_lists
from deploy.cli import midspan
from edge_agent.text.tasks import TASKS, Example
from evaluation.neuron_runs import Round, overlap_of_words, share_alike, summarize_rounds


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the demo model."""
    path = tmp_path_factory.mktemp("lists") / "lists.json"
    generator = np.random.default_rng(1)
    write_lists(path, NeuronLists("l", [generator.permutation(352) for _ in range(8)]))
    return path


def run(*arguments: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(midspan, ["eval", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    said: list[dict[str, Any]] = json.loads(done.output)
    return said


@pytest.mark.long
def test_speed_and_memory_are_measured_with_all_neurons_and_with_some(lists: Path) -> None:
    chosen = ["stories-llama", "--neurons", str(lists), "-n", "3", "--sessions", "3"]
    timed = run("speed", *chosen, "--rounds", "2")
    assert [each["neurons"] for each in timed] == ["all neurons", "chosen"]
    assert timed[0]["ratio"] == 1
    assert all(each["tokens_per_s"] > 0 for each in timed)
    weights = [each["edge_weights_mb"] for each in run("hardware", *chosen)]
    left_out = 2 * 3 * (352 - round(0.7 * 352)) * 128 * 4 / 1e6  # of layers 6 and 7
    assert weights[0] - weights[1] == pytest.approx(left_out, abs=0.1)


@pytest.mark.long
def test_tasks_say_how_alike_answers_are(lists: Path) -> None:
    said = run("tasks", "stories-llama", "--neurons", str(lists), "-n", "4")
    assert [(each["neurons"], each["task"]) for each in said] == [
        (kind, task) for kind in ("all neurons", "chosen") for task in TASKS
    ]
    assert [each["as_with_all"] for each in said[:3]] == [1, 1, 1]
    assert all(0 <= each["words"] <= 1 for each in said)


def test_words_are_compared_as_often_as_they_are_there() -> None:
    example = Example("", "the red red house")
    assert overlap_of_words("The red house", example) == pytest.approx(2 * 3 / 7)
    assert overlap_of_words("green", example) == 0
    assert overlap_of_words("", example) == 0


def test_answers_are_alike_up_to_the_first_other_token() -> None:
    assert share_alike([1, 2, 3, 4], [1, 2, 9, 4]) == 0.5
    assert share_alike([1, 2], [1, 2, 3, 4]) == 0.5
    assert share_alike([], []) == 0


def test_the_median_of_rounds_counts() -> None:
    rounds = [Round([], first, speed) for first, speed in ((3.0, 10.0), (1.0, 30.0), (2.0, 5.0))]
    assert summarize_rounds(rounds) == (2.0, 10.0)
